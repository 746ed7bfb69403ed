"""The commands that start a training on several processes: their recipes support this number of processes."""

import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from moco import composition
from moco.config import TrainConfig
from moco.config.train import check
from tests.docs.pages import REPOSITORY

STARTS = re.compile(r"^[`# ]*((?:[A-Z_]+=\S+ )*(?:sbatch|torchrun|scripts/train_\w+\.sh) [^`\n]*)", re.MULTILINE)
GPUS = 8  # per machine, for a command that uses all


def training_commands() -> list[str]:
    """Return the commands of all texts that start moco.train on several processes with a certain recipe."""
    found = set()
    for path in [REPOSITORY / "README.md", *(each for name in ("docs", "configs", "scripts") for each in files(name))]:
        text = re.sub(r" \\\n[# ]*", " ", path.read_text(encoding="utf-8"))
        found |= {each for each in STARTS.findall(text) if "experiment=" in each and "experiment=NAME" not in each}
    return sorted(found)


def files(folder: str) -> list[Path]:
    return [each for each in (REPOSITORY / folder).rglob("*.*") if each.suffix in (".md", ".yaml", ".sh", ".sbatch")]


def processes_of(words: list[str]) -> int:
    """Return the number of processes: machines times GPUs per machine."""

    def number(default: int, *names: str) -> int:
        values = [re.fullmatch(rf"(?:{'|'.join(names)})[= ](\d+)", each) for each in pairs]
        return next((int(each[1]) for each in values if each), default)

    pairs = [*words, *map(" ".join, pairwise(words))]
    return number(1, "NODES", "--nodes", "--nnodes") * number(GPUS, "GPUS", "--gpus-per-node", "--nproc-per-node")


@pytest.mark.parametrize("line", training_commands())
def test_the_recipe_supports_the_number_of_processes(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line)
    first = next(place for place, word in enumerate(words) if word.startswith("experiment="))
    monkeypatch.setattr(sys, "argv", ["moco.train", *words[first:]])
    (config,) = composition.compose("train", TrainConfig)
    check(config, processes_of(words))


def test_all_kinds_of_commands_are_found() -> None:
    found = training_commands()
    assert len(found) >= 20
    for start in ("torchrun", "sbatch", "GPUS=8 RESTARTS=3 scripts/train_single", "NODES=2 NODE_RANK=0"):
        assert any(each.startswith(start) for each in found), start
    assert processes_of(shlex.split("sbatch --nodes=2 --gpus-per-node=8 scripts/train_slurm.sbatch")) == 16
    assert processes_of(shlex.split("torchrun --nnodes 3 --nproc-per-node 2 -m moco.train")) == 6
