"""A fixture for all fault tests."""

from collections.abc import Iterator

import pytest

from tests.faults import runs


@pytest.fixture(autouse=True)
def kill_remaining_processes() -> Iterator[None]:
    yield
    runs.clean_up()
