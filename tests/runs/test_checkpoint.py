"""Checkpoints: damaged ones are refused, and loading one runs no code."""

import collections
import os
import pickle
import re
import shlex
import subprocess
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from moco.digest import digest
from moco.files import WriteError
from moco.runs import checkpoint
from moco.runs.checkpoint import CheckpointError, load, load_newest, save
from tests.runs.states import same, state, steps

# ---- round trip ----


def test_load_returns_what_was_saved(tmp_path: Path) -> None:
    path = save(tmp_path / "new" / "folder", 12, state(), keep_last=2)
    assert path == tmp_path / "new" / "folder" / "step_00000012.pt"
    assert same(load(path), state())
    assert sorted(os.listdir(path.parent)) == ["step_00000012.pt"]


def test_saving_does_not_change_the_state(tmp_path: Path) -> None:
    given = state()
    save(tmp_path, 1, given, keep_last=1)
    assert same(given, state())


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1, state(1), keep_last=2)
    assert same(load(save(tmp_path, 1, state(2), keep_last=2)), state(2))
    assert steps(tmp_path) == ["step_00000001.pt"]


# ---- how many are kept ----


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_only_the_newest_checkpoints_are_kept(keep_last: int, tmp_path: Path) -> None:
    for step in (1, 2, 10, 9):
        save(tmp_path, step, state(step), keep_last)
    assert steps(tmp_path) == [f"step_{step:08d}.pt" for step in sorted((1, 2, 10, 9))[::-1][:keep_last]]


def test_permanent_checkpoints_are_kept_in_addition(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, step, state(step), keep_last=2, keep=step % 2 == 1)
    assert steps(tmp_path) == [f"step_{n:08d}{'.keep' * (n % 2)}.pt" for n in (6, 5, 4, 3, 1)]
    newest = load_newest(tmp_path)
    assert newest is not None
    assert newest["step"] == 6


def test_a_permanent_checkpoint_can_be_the_newest(tmp_path: Path) -> None:
    save(tmp_path, 1, state(1), keep_last=1)
    save(tmp_path, 2, state(2), keep_last=1, keep=True)
    newest = load_newest(tmp_path)
    assert newest is not None
    assert newest["step"] == 2


# ---- the best checkpoint ----


def test_is_best() -> None:
    scores = {0: 99.0, 10: 50.0, 20: 60.0, 30: 60.0, 40: 55.0, 50: 61.0}  # step 0 does not count
    history = [{"step": step, "knn": [score, 0.0, 1]} for step, score in scores.items()]
    assert [step for step in range(60) if checkpoint.is_best(history, step)] == [10, 20, 50]
    assert not checkpoint.is_best([], 10)


@pytest.mark.parametrize("links", [True, False])
def test_the_best_checkpoint_is_kept(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    history: list[dict[str, Any]] = []
    for step, score in ((1, 40.0), (2, 70.0), (3, 60.0), (4, 50.0)):
        history.append({"step": step, "knn": [score, 0.0, 1]})
        save(tmp_path, step, state(step), keep_last=1, best=checkpoint.is_best(history, step))
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "step_00000004.pt"]
    assert load(tmp_path / "best.pt")["step"] == 2
    newest = load_newest(tmp_path)
    assert newest is not None
    assert newest["step"] == 4
    (tmp_path / "step_00000004.pt").write_bytes(b"damaged")
    assert same(load(tmp_path / "best.pt"), state(2))


# ---- atomic writes ----


@pytest.mark.parametrize("where", ["write", "flush", "rename"])
def test_a_failure_while_writing_leaves_the_previous_checkpoint(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, state(1), keep_last=1)
    real = torch.save

    def half(what: Any, file: Any) -> None:
        real(what, tmp_path / "complete")
        file.write((tmp_path / "complete").read_bytes()[:500])
        (tmp_path / "complete").unlink()
        raise OSError(28, "No space left on device")

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        if where == "write":
            patch.setattr(torch, "save", half)
        elif where == "flush":
            patch.setattr(os, "fsync", fail)
        else:
            patch.setattr(Path, "replace", fail)
        with pytest.raises(WriteError, match=r"No space left|Input/output"):
            save(tmp_path, 2, state(2), keep_last=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        newest = load_newest(tmp_path)
    assert newest is not None
    assert same(newest, state(1))
    assert steps(tmp_path) == ["step_00000001.pt"]
    save(tmp_path, 2, state(2), keep_last=1)
    assert sorted(os.listdir(tmp_path)) == ["step_00000002.pt"]


def test_the_file_is_renamed_after_it_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    real = os.fsync

    def record(descriptor: int) -> None:
        seen.append(steps(tmp_path))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    save(tmp_path, 1, state(), keep_last=1)
    assert seen == [[], ["step_00000001.pt"]]  # the file, then the directory


# ---- damage ----


def test_a_flipped_byte_of_a_tensor_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1, state(), keep_last=1)
    data = bytearray(path.read_bytes())
    weight = state()["method"]["0.weight"].numpy().tobytes()
    at = bytes(data).index(weight)
    data[at + 5] ^= 1
    path.write_bytes(data)
    assert not same(torch.load(path, weights_only=True)["method"], state()["method"])  # torch does not notice
    with pytest.raises(CheckpointError, match="was altered after it was written: its SHA-256 does not match"):
        load(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_flipped_byte_anywhere_is_refused_or_harmless(tmp_path: Path) -> None:
    small = {"step": 3, "method": {"weight": torch.arange(12.0)}, "names": ["abc", 0.5]}
    path = save(tmp_path, 1, small, keep_last=1)
    complete, refused, harmless = path.read_bytes(), 0, 0
    for at in range(0, len(complete), 5):
        data = bytearray(complete)
        data[at] ^= 0x10
        path.write_bytes(data)
        try:
            loaded = load(path)
        except CheckpointError:
            refused += 1
        else:  # padding, time stamps, torch's own check sums
            assert same(loaded, small), f"byte {at}"
            harmless += 1
    assert refused > 50
    assert harmless > 50


@pytest.mark.parametrize("left", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(left: float, tmp_path: Path) -> None:
    path = save(tmp_path, 1, state(), keep_last=1)
    data = path.read_bytes()
    path.write_bytes(data[: int(left * len(data))])
    with pytest.raises(CheckpointError, match=r"cannot be read as a checkpoint: it is (damaged|truncated)"):
        load(path)


def test_a_missing_file_and_other_content_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint: No such file or directory"):
        load(tmp_path / "step_00000001.pt")
    for content in ([1, 2], torch.ones(3), {"step": 1}):
        torch.save(content, tmp_path / "step_00000001.pt")
        with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
            load(tmp_path / "step_00000001.pt")


# ---- the newest checkpoint ----


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_newest(tmp_path) is None
    assert load_newest(tmp_path / "missing") is None


def test_an_unreadable_checkpoint_is_skipped_with_a_warning(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, state(step), keep_last=3)
    (tmp_path / "step_00000003.pt").write_bytes(b"")
    (tmp_path / "step_00000002.pt").write_bytes(b"PK and more")
    with pytest.warns(UserWarning, match="using the previous checkpoint") as caught:
        newest = load_newest(tmp_path)
    assert newest is not None
    assert same(newest, state(1))
    assert [f"step_0000000{step}" in str(each.message) for step, each in zip((3, 2), caught, strict=True)] == [True] * 2


def test_no_readable_checkpoint_is_an_error_and_not_a_new_start(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, state(step), keep_last=2).write_bytes(b"x")
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(
            CheckpointError, match=r"step_00000001\.pt cannot .* none of the 2 checkpoints in .* can be read; move them"
        ),
    ):
        load_newest(tmp_path)


def test_a_single_damaged_checkpoint_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, 1, state(1), keep_last=2).write_bytes(b"x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError, match=r"step_00000001\.pt cannot be read .*; move it away"):
            load_newest(tmp_path)


def test_the_error_tells_how_to_resume_from_the_best_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    save(folder, 2, state(2), keep_last=1, best=True)
    save(folder, 3, state(3), keep_last=1).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"best\.pt can be read: run cp .* step 2$") as caught:
        load_newest(folder)
    copy = re.search(r"run (cp .*), then", str(caught.value))
    assert copy is not None
    subprocess.run(shlex.split(copy[1]), check=True)
    with pytest.warns(UserWarning, match=r"step_00000003.*using the previous checkpoint"):
        newest = load_newest(folder)
    assert newest is not None
    assert same(newest, state(2))


# ---- malicious files ----


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(form: str, tmp_path: Path) -> None:
    path, target = tmp_path / "step_00000001.pt", tmp_path / "executed"
    bomb = {**state(), "config": Evil(target), "sha256": digest(state())}
    if form == "torch":
        torch.save(bomb, path)
        assert zipfile.is_zipfile(path)
    else:
        path.write_bytes(pickle.dumps(bomb))
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        load(path)
    assert not target.exists()
    pickle.loads(pickle.dumps(Evil(target)))  # with plain pickle the code runs
    assert target.exists()


def test_objects_of_other_types_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1, {"config": tmp_path}, keep_last=1)  # a Path
    with pytest.raises(CheckpointError):
        checkpoint.load(path)
    ordered = save(tmp_path, 2, {"method": collections.OrderedDict(a=torch.ones(1))}, keep_last=1)
    assert list(load(ordered)["method"]) == ["a"]
