"""Safetensors files are written atomically."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from moco.files import WriteError
from moco.interop import weights
from moco.interop.weights import save_weights
from tests.full_disk import full_disk


def test_a_full_disk_is_reported_in_one_sentence_and_keeps_the_previous_file(tmp_path: Path) -> None:
    file = tmp_path / "encoder.safetensors"
    save_weights(file, {"w": torch.zeros(3)})
    with full_disk(), pytest.raises(WriteError, match=r"encoder\.safetensors cannot be written \(File too large\)"):
        save_weights(file, {"w": torch.ones(30_000)})
    assert os.listdir(tmp_path) == ["encoder.safetensors"]
    assert load_file(file)["w"].tolist() == [0, 0, 0]
    save_weights(file, {"w": torch.ones(3)})
    assert load_file(file)["w"].tolist() == [1, 1, 1]


def test_other_errors_of_safetensors_are_not_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise SafetensorError("invalid header")

    monkeypatch.setattr(weights, "save", refuse)
    with pytest.raises(SafetensorError, match="invalid header"):
        save_weights(tmp_path / "a.safetensors", {})
    assert os.listdir(tmp_path) == []
