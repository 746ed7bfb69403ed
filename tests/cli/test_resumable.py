"""moco.finetune, moco.segment and moco.detect are stopped, killed or hang, and resume bit for bit."""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moco.cli import run_command
from moco.config.segment import SegmentConfig
from moco.distributed import rank
from moco.evaluation import resumable
from moco.models.backbones import build_backbone
from moco.runtime.watchdog import HUNG
from moco.segment import segment
from scripts.canvases import write_canvases
from tests.cli.conftest import Run
from tests.distributed.launch import run_ranks

ENCODER = ("checkpoint=plain.pt", "backbone=convnet", "+options.width=4", "device=cpu", "threads=1", "log_every=1")
SEGMENT = ("masks.root=c/train", "masks.eval_root=c/test", "masks.workers=0", "crop=16", "batch_size=4", "steps=6")
BOXES = ("boxes.root=c/train/images", "boxes.file=c/train/boxes.json", "boxes.eval_root=c/test/images")
SIZES = (
    "sizes=[32]",
    "eval_size=32",
    "max_size=48",
    "width=8",
    "box_samples=16",
    "anchor_samples=16",
    "boxes.workers=0",
)
DETECT = (*BOXES, "boxes.eval_file=c/test/boxes.json", *SIZES, "batch_size=2", "steps=6")
DIGITS = ("data=digits", "images.size=16", "images.resize=0", "fraction=0.1", "min_steps=6", "batch_size=50")
COMMANDS: dict[str, tuple[tuple[str, ...], str]] = {  # the fields, and the module that calls `train_step`
    "segment": ((*SEGMENT, "lr=0.01"), "moco.segmentation.training"),
    "detect": (DETECT, "moco.detection.training"),
    "finetune": ((*DIGITS, "epochs=3", "mixup=0.2", "seeds=1"), "moco.evaluation.finetuning"),
}


@pytest.fixture
def canvases(tmp_path: Path) -> Path:
    write_canvases(tmp_path / "c", 8, 3, side=32)
    torch.manual_seed(0)
    torch.save(build_backbone("convnet", {"width": 4}).state_dict(), tmp_path / "plain.pt")
    return tmp_path


@contextlib.contextmanager
def before_step(module: str, step: int, action: Callable[[], object]) -> Any:
    """Call `action` at the start of the `step`-th step from now."""
    loaded, count = vars(importlib.import_module(module)), 0
    real = loaded["train_step"]

    def train_step(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == step:
            action()
        return real(*arguments)

    loaded["train_step"] = train_step
    try:
        yield
    finally:
        loaded["train_step"] = real


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.name}:{name}": value
        for file in folder.glob("*/pretrained_*/*.safetensors")
        for name, value in load_file(file).items()
    }


def records(folder: Path) -> list[dict[str, float]]:
    """Return the records of a training without its speed, and check those of the report."""
    (file,) = folder.glob("*/pretrained_*_seed0_*/metrics.jsonl")
    assert list(file.parent.glob("events.out.tfevents.*"))
    (copy,) = folder.glob("*/pretrained_*/training.jsonl")
    assert copy.read_bytes() == file.read_bytes()
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert all({"speed/images_per_second", "speed/data_wait"} <= each.keys() for each in found)
    return [{name: value for name, value in each.items() if not name.startswith("speed/")} for each in found]


def same_end(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert records(one) == records(other)
    assert [each["step"] for each in records(one)] == [1, 2, 3, 4, 5, 6]
    assert records(one)[0].keys() == {"step", "train/loss", "train/lr", "train/gradient_norm"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_stopped_and_a_killed_training_resume_to_the_same_end(
    name: str, canvases: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields, module = COMMANDS[name]
    arguments = (name, *ENCODER, *fields, "encoders=[pretrained]", "save_every=2")
    assert run(*arguments, "output=whole")[0] == 0
    with before_step(module, 3, send(signal.SIGTERM)):
        status, out, err = run(*arguments, "output=cut")
    assert (status, err.count("\n")) == (75, 1), err
    assert err.startswith("moco: stopped by SIGTERM after step 3 of 6, which is saved: run the same command again")
    real = resumable.save_state

    def killed(path: Path, network: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        real(path, network, optimizer, step)
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resumable, "save_state", killed)
        status, out, err = run(*arguments, "output=cut")
    assert (status, "resumed at step 3" in out) == (130, True)
    assert "saved steps are kept: run the same command again to resume" in err
    status, out, err = run(*arguments, "output=cut")
    assert status == 0, err
    assert "resumed at step 4" in out
    assert re.findall(r"^step (\d)/6 · .*loss", out, re.MULTILINE) == ["5", "6"]  # no finished step
    same_end(canvases / "whole", canvases / "cut")


def test_each_reason_saves_the_step_and_a_stop_in_the_evaluation_keeps_the_training(
    canvases: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("segment", *ENCODER, *SEGMENT, "encoders=[pretrained]", "save_every=0", "output=out")
    status, _, err = run(*arguments, "stop_after=0.00001")
    assert (status, "stopped by the time limit stop_after after step 1 of 6" in err) == (75, True), err
    for step, (number, expected) in enumerate({signal.SIGINT: 130, signal.SIGHUP: 75, signal.SIGUSR1: 75}.items(), 2):
        with before_step("moco.segmentation.training", 1, send(number)):
            status, _, err = run(*arguments)
        assert (status, f"stopped by {number.name} after step {step} of 6" in err) == (expected, True), err
    segmentation = importlib.import_module("moco.segmentation.segment")
    real = vars(segmentation)["evaluate"]

    def evaluate(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(segmentation, "evaluate", evaluate)
        status, _, err = run(*arguments)
    assert (status, "stopped by SIGTERM after step 6 of 6, which is saved" in err) == (75, True), err
    assert not list(canvases.glob("out/segment/*/network.safetensors"))
    status, out, err = run(*arguments)
    assert (status, "already trained" in out, "step 1/" in out) == (0, True, False), err


@pytest.mark.parametrize(
    ("name", "field"), [("segment", "save_every=-1"), ("detect", "hang_after=-1"), ("finetune", "stop_after=nan")]
)
def test_invalid_intervals_are_refused(name: str, field: str, run: Run) -> None:
    status, _, err = run(name, *ENCODER, *COMMANDS[name][0], field)
    assert (status, field.partition("=")[0] in err) == (2, True), err


def attempts(folder: Path) -> list[tuple[Any, str]]:
    """Run moco.segment once without an interruption, once with a signal to rank 1 in the third step, and again.

    Returns the status and the output of each attempt.
    """
    os.chdir(folder)
    module, found = "moco.segmentation.training", []
    for output, step in (("whole", 0), ("cut", 3), ("cut", 0)):
        sys.argv = ["segment", *ENCODER, *SEGMENT, "lr=0.01", "encoders=[pretrained]", f"output={output}"]
        text, action = io.StringIO(), send(signal.SIGTERM if rank() == 1 else 0)  # 0: no signal is sent
        status: Any = 0
        with contextlib.redirect_stderr(text), contextlib.redirect_stdout(text), before_step(module, step, action):
            try:
                run_command("segment", SegmentConfig, segment)
            except SystemExit as end:
                status = end.code
        found.append((status, text.getvalue()))
    return found


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_and_loses_no_step(canvases: Path) -> None:
    found = run_ranks(2, attempts, canvases)
    assert [[status for status, _ in each] for each in found] == [[0, 75, 0]] * 2, found
    assert "stopped by SIGTERM after step 4 of 6, which is saved" in found[0][1][1]  # ranks agree one step later
    assert "resumed at step 4" in found[0][2][1]
    same_end(canvases / "whole", canvases / "cut")


def hanging(folder: Path) -> None:
    os.chdir(folder)
    sys.argv = ["segment", *ENCODER, *SEGMENT, "encoders=[pretrained]", "output=out", "hang_after=0.01"]
    log = os.open("hang.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)
    with before_step("moco.segmentation.training", 3, lambda: time.sleep(100)):
        run_command("segment", SegmentConfig, segment)


@pytest.mark.slow
def test_a_training_that_hangs_ends_with_a_sentence(canvases: Path) -> None:
    process = multiprocessing.get_context("forkserver").Process(target=hanging, args=(canvases,))
    process.start()
    process.join(60)
    message = (canvases / "hang.log").read_text()
    assert process.exitcode == HUNG, message
    assert message.startswith("moco: rank 0 hangs: no progress for 0.01 minutes; rank 0 after step 2, at moco/segm")
