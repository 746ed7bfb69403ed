"""The Python examples of docs/howto/library.md run as they stand, and the training loop learns."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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
    with torch.random.fork_rng():
        exec(compile(EXAMPLES[line], f"{PAGE.name}:{line}", "exec"), {})
    losses = [float(loss) for loss in re.findall(r"^epoch \d: loss ([0-9.]+)", capsys.readouterr().out, re.MULTILINE)]
    assert losses == sorted(losses, reverse=True)  # of the training loop


def test_the_training_loop_has_at_most_forty_lines() -> None:
    (loop,) = [text for text in EXAMPLES.values() if "update_momentum_encoder" in text]
    assert len(loop.splitlines()) <= 40
