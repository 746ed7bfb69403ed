"""The Python examples of docs/howto/library.md run as they stand, and the training loop learns."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moco.config import DataConfig
from moco.config.linear import LinearConfig
from moco.data.sources import load_source
from moco.evaluation.linear import evaluate_linear
from tests.docs.pages import REPOSITORY, blocks
from tests.evaluation.runs import trained

PAGE = REPOSITORY / "docs" / "howto" / "library.md"
EXAMPLES = dict(blocks(PAGE, "python"))


@pytest.mark.parametrize("line", EXAMPLES)
def test_examples_run(
    line: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    trained(Path("runs/digits"))
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save("image.png")
    top1 = classified_digits() if "load_classifier" in EXAMPLES[line] else None
    with torch.random.fork_rng():
        exec(compile(EXAMPLES[line], f"{PAGE.name}:{line}", "exec"), {})
    losses = [float(loss) for loss in re.findall(r"^epoch \d: loss ([0-9.]+)", capsys.readouterr().out, re.MULTILINE)]
    assert losses == sorted(losses, reverse=True)  # of the training loop
    if top1 is not None:
        rows = list(csv.DictReader(Path("predictions.csv").read_text().splitlines()))
        right = [Path(row["path"]).stem.endswith(f"_{row['class']}") for row in rows]
        assert len(rows) == 500
        assert 100 * np.mean(right) == pytest.approx(top1)


def classified_digits() -> float:
    """Train a linear classifier on runs/digits, write the held-out digits to IMAGES, and return its top-1 on them."""
    config = LinearConfig(run="runs/digits", epochs=4, batch_size=256, threads=1)
    config.sweep.lrs, config.sweep.weight_decays = [0.1, 1.0], [0.0]
    evaluate_linear(config)
    held_out = load_source(DataConfig("digits")).held_out
    assert held_out is not None
    assert held_out.labels is not None
    Path("IMAGES").mkdir()
    for i, label in enumerate(held_out.labels):
        Image.fromarray(held_out.image(i).permute(1, 2, 0).numpy()).save(f"IMAGES/{i}_{label}.png")
    (entry,) = json.loads(Path("runs/digits/results.json").read_text())
    return float(entry["figures"]["top1"])


def test_the_training_loop_has_at_most_forty_lines() -> None:
    (loop,) = [text for text in EXAMPLES.values() if "update_momentum_encoder" in text]
    assert len(loop.splitlines()) <= 40
