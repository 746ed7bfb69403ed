"""`moco.load_classifier`: it predicts what `moco.linear` measured, and refuses another encoder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moco
from moco.config import ConfigError, DataConfig
from moco.data.sources import Source, load_source
from moco.evaluation.linear_probe import load_head, save_head
from tests.evaluation.test_linear import encoder_file, official, run, swept


@pytest.fixture(scope="module")
def held_out() -> Source:
    source = load_source(DataConfig("digits")).held_out
    assert source is not None
    return source


@pytest.mark.parametrize("kind", ["sweep, a layer", "sweep, unit length", "official"])
def test_the_predictions_have_the_accuracy_that_was_measured(kind: str, held_out: Source, tmp_path: Path) -> None:
    config = official(tmp_path) if kind == "official" else swept(tmp_path)
    if kind == "sweep, a layer":
        config.sweep.layers, config.images.size, config.images.resize = ["layers.8"], 20, 24
    if kind == "sweep, unit length":
        config.sweep.normalize = "l2"
    figures = run(config)[0]["figures"]
    classifier = moco.load_classifier(next(tmp_path.glob("linear*.safetensors")))
    images = torch.stack([classifier.encoder.transform(held_out.image(i)) for i in range(len(held_out))])
    assert images.shape[2] == (20 if kind == "sweep, a layer" else 16)
    predicted = classifier(images).argmax(dim=1).numpy()
    assert 100 * np.mean(predicted == held_out.labels) == pytest.approx(figures["top1"])
    assert classifier.classes == list("0123456789")
    assert not classifier(images[:1]).requires_grad


def test_an_encoder_that_has_moved_is_given_and_another_one_is_refused(tmp_path: Path) -> None:
    run(swept(tmp_path))
    head, own = tmp_path / "linear.safetensors", tmp_path / "encoder.safetensors"
    own.rename(tmp_path / "moved.safetensors")
    with pytest.raises(FileNotFoundError, match=r"encoder\.safetensors does not exist"):
        moco.load_classifier(head)
    encoder = moco.load_encoder(tmp_path / "moved.safetensors")
    assert moco.load_classifier(head, encoder).encoder is encoder
    with pytest.raises(ConfigError, match=r"images prepared as .*'size': 16.*'size': 32.* encoder=moco\.load_encoder"):
        moco.load_classifier(head, moco.load_encoder(tmp_path / "moved.safetensors", size=32, resize=32))
    torch.manual_seed(1)
    other = moco.load_encoder(encoder_file(tmp_path / "other"))
    encoder.info["sha256"] = "0"
    with pytest.raises(ConfigError, match=r"belongs to the encoder .*\(step 12\), and .* has other weights"):
        moco.load_classifier(head, encoder)
    old = load_head(head)  # of an earlier version: only the network and the step are known
    del old.about["sha256"], old.about["options"]
    save_head(head, old)
    assert moco.load_classifier(head, other).encoder is other
    other.info["step"] = 13
    with pytest.raises(ConfigError, match="has other weights"):
        moco.load_classifier(head, other)


@pytest.mark.parametrize("kind", ["missing", "text", "encoder"])
def test_another_file_is_refused_in_a_sentence(kind: str, tmp_path: Path) -> None:
    path = encoder_file(tmp_path) if kind == "encoder" else tmp_path / "linear.safetensors"
    if kind == "text":
        path.write_text("text")
    error: Any = FileNotFoundError if kind == "missing" else ValueError
    with pytest.raises(error, match=str(path)) as caught:
        moco.load_classifier(path)
    assert "\n" not in str(caught.value)
