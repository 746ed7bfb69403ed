"""A source written as docs/howto/extend.md says: it trains, is limited by evaluate.bank_size, and is fine-tuned."""

import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from moco.config import AugmentConfig, DataConfig, ModelConfig, TrainConfig
from moco.config.finetune import FinetuneConfig
from moco.data import sources
from moco.data.arrays import open_digits
from moco.data.base import Source, Sources
from moco.data.sources import Kind, load_source
from moco.evaluation.finetune import evaluate_finetune
from moco.interop.encoder_file import save_encoder
from moco.methods.moco_config import MoCoConfig
from moco.models.backbones import build_backbone
from moco.training.trainer import pretrain


class Scans(Source):
    """The required members only: images that are made on request, without paths or encoded bytes."""

    def __init__(self, pixels: Tensor, labels: NDArray[np.int64]) -> None:
        self._pixels, self._labels = pixels, labels

    @property
    def labels(self) -> NDArray[np.int64]:
        return self._labels

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple("0123456789")

    def __len__(self) -> int:
        return len(self._pixels)

    def image(self, i: int) -> Tensor:
        return self._pixels[i]

    def name(self, i: int) -> str:
        return f"scan/{i}"

    def subset(self, rows: NDArray[np.int64]) -> "Scans":
        return Scans(self._pixels[torch.from_numpy(rows)], self._labels[rows])

    def content_digest(self) -> str:
        return hashlib.sha256(self._pixels.numpy().tobytes()).hexdigest()


class Incomplete(Source):
    """As `Scans` before this test was written: without `subset` and others."""

    def __len__(self) -> int:
        return 1


class Structural:
    """Not derived from `Source`, and without its members."""

    labels = None

    def __len__(self) -> int:
        return 1


def open_scans(config: DataConfig) -> Sources:
    digits = open_digits(config)

    def scans(source: Any, count: int) -> Scans:
        return Scans(source.images[:count], source.labels[:count])

    train = scans(digits.train, 256)
    return Sources(train, train, scans(digits.held_out, 64))


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sources.SOURCES, "scans", Kind(open_scans, root=""))
    monkeypatch.setitem(sources.SOURCES, "structural", Kind(lambda _: Sources(Structural()), root=""))  # type: ignore[arg-type]


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a run keeps its lock open
def test_it_trains_and_its_bank_is_limited(tmp_path: Path, resident: bool, capsys: pytest.CaptureFixture[str]) -> None:
    config = TrainConfig(method=MoCoConfig(queue_size=64), run=str(tmp_path / "run"), epochs=1, batch_size=128)
    config.data = replace(config.data, name="scans", resident=resident, workers=0)
    config.device, config.threads, config.augment.size = "cpu", 1, 16
    config.model = ModelConfig(backbone="convnet", options={"width": 2}, dim=8)
    config.evaluate.bank_size, config.evaluate.k, config.evaluate.raw_pixels = 100, 5, False
    pretrain(config)
    assert "256 images" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "run" / "encoder.safetensors").is_file()


def test_it_is_fine_tuned_on_a_part_of_its_labels(tmp_path: Path) -> None:
    about = {
        "seed": 0,
        "model": asdict(ModelConfig(backbone="convnet", options={"width": 2})),
        "augment": asdict(AugmentConfig(size=16, mean=[0.5] * 3, std=[0.5] * 3)),
        "data": asdict(DataConfig(name="scans")),
    }
    save_encoder(tmp_path / "x.safetensors", build_backbone("convnet", {"width": 2}), about, 1)
    config = FinetuneConfig(checkpoint=str(tmp_path / "x.safetensors"), output=str(tmp_path), device="cpu")
    config.encoders, config.epochs, config.min_steps, config.labels_per_class = ["pretrained"], 1, 2, 5
    evaluate_finetune(config)
    assert (tmp_path / "results.json").is_file()


def test_an_incomplete_source_names_what_is_missing() -> None:
    with pytest.raises(TypeError, match=r"Incomplete.*subset"):
        Incomplete()  # type: ignore[abstract]
    with pytest.raises(TypeError, match=r"data\.name=structural: Structural lacks .*classes.*image.*subset"):
        load_source(DataConfig(name="structural"))


def test_published_weights_that_cannot_be_loaded_name_the_field(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("couldn't connect to the hub\nsecond line")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        ValueError, match=r"model\.options=\{'pretrained': True\}.*couldn't connect to the hub.*init_from=FILE"
    ):
        build_backbone("timm/resnet18", {"pretrained": True})
    with pytest.raises(OSError, match="couldn't connect"):
        build_backbone("timm/resnet18", {})
