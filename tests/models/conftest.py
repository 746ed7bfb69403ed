"""Fixtures for the tests of networks."""

import pytest


@pytest.fixture(params=[(), ("cpu",)], ids=["plain", "fused"])
def norm_devices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with BN's operations of the CPU, and with the fused ones of a GPU."""
    monkeypatch.setattr("moco.models.norm.FUSED_DEVICES", request.param)
