"""The digest of tensors and plain values."""

import pytest
import torch

from moco.digest import digest


@pytest.mark.parametrize("change", ["value", "type", "shape", "name", "plain"])
def test_digest_detects_every_kind_of_change(change: str) -> None:
    x = torch.tensor([1.0, 2.0])
    changed = {
        "value": {"x": torch.tensor([1.0, 2.0 + 2**-22]), "step": 1},
        "type": {"x": x.view(torch.int32), "step": 1},
        "shape": {"x": x.view(2, 1), "step": 1},
        "name": {"y": x, "step": 1},
        "plain": {"x": x, "step": 2},
    }[change]
    assert digest({"x": x, "step": 1}) == digest({"x": x.clone(), "step": 1})
    assert digest({"x": x, "step": 1}) != digest(changed)


def test_digest_does_not_depend_on_the_memory_format() -> None:
    x = torch.randn(2, 3, 4, 4)
    assert digest(x) == digest(x.to(memory_format=torch.channels_last))
    assert digest(x[:, 1]) == digest(x[:, 1].contiguous())
