"""A disk that is really full, and images that are deleted, while a run trains.

In the short form single files meet a full disk in tests/training/test_nonfinite.py, tests/interop/test_weights.py,
tests/data/test_bad_images.py and tests/training/test_summary.py.
"""

import csv
import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from moco.data.unreadable import UnreadableImages
from moco.interop import weights
from moco.interop.encoder_file import read_encoder
from moco.runs import checkpoint
from moco.training import summary as messages
from moco.training.nonfinite import NonFiniteGuard
from tests.data.unreadable_files import folder
from tests.faults import runs
from tests.faults.runs import LONG


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 32 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path) -> None:
    """Use all remaining space."""
    with (place / "ballast").open("ab", buffering=0) as file:
        try:
            while file.write(bytes(1 << 20)):
                pass
        except OSError:
            pass


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_a_sentence_and_later_it_resumes_bit_for_bit(
    small_disk: Path, tmp_path: Path
) -> None:
    reference = tmp_path / "reference"
    runs.to_the_end(reference)
    turns = 10 if LONG else 1
    for turn in range(turns):
        run = tmp_path / f"run{turn}"
        run.symlink_to(small_disk / run.name)  # its output is on another disk
        (small_disk / run.name).mkdir()
        processes = runs.start(run)
        assert runs.until_saved(run, 2 + runs.generator(turn).randrange(20), processes), runs.output(run)
        fill(small_disk)
        assert runs.wait(processes) == [1], runs.output(run)
        (line,) = [each for each in runs.output(run).splitlines() if "No space left on device" in each]
        assert line.startswith("moco: ")
        assert "free some space" in line
        assert "Traceback" not in runs.output(run)
        assert not list((run / "checkpoints").glob("*.tmp"))
        (small_disk / "ballast").unlink()
        assert checkpoint.load(checkpoint.list_checkpoints(run / "checkpoints")[0])["step"] == runs.saved(run)
        runs.to_the_end(run)
        assert "using the previous" not in runs.output(run)
        runs.same_end(run, reference)
        shutil.rmtree(small_disk / run.name)
    print(f"faults: {turns} full disks")


# The files of a run other than checkpoints and metrics: the owner and the name of the function that writes it.
WRITERS: dict[str, tuple[Any, str]] = {
    "encoder.safetensors": (weights, "save"),
    "views.png": (messages, "save_image"),
    "bad_images.csv": (UnreadableImages, "_write"),
    "nonfinite/step_": (NonFiniteGuard, "_write"),
}


def full_before(place: Path, name: str) -> None:
    """In the process of the run: fill the disk before the file is written."""
    owner, function = WRITERS[name]
    write = getattr(owner, function)

    def on_a_full_disk(*given: Any, **named: Any) -> Any:
        fill(place)
        return write(*given, **named)

    setattr(owner, function, on_a_full_disk)


@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="the long form: MOCO_FAULTS=long; single files are tested where they are written")
@pytest.mark.parametrize("name", list(WRITERS))
def test_a_full_disk_at_any_file_of_a_run_is_reported_in_one_sentence_and_later_the_file_is_written(
    name: str, small_disk: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.symlink_to(small_disk / run.name)
    (small_disk / run.name).mkdir()
    given = ["epochs=1"]
    if name == "bad_images.csv":
        root = folder(tmp_path / "images", good=40)
        given += ["data=folder", f"data.root={root}", "data.on_bad_image=replace", "data.max_bad=0.5", "augment=cifar"]
        given += ["batch_size=16", "model.bn_group_size=8", "method.queue_size=32"]
    if name.startswith("nonfinite"):
        given += ["optim.lr=1e30", "optim.warmup_epochs=0"]
    assert runs.wait(runs.start(run, *given, prepare=partial(full_before, small_disk, name))) == [1], runs.output(run)
    output = runs.output(run)
    (line,) = [each for each in output.splitlines() if name in each and "No space left on device" in each]
    assert "Traceback" not in output
    if name == "views.png":  # only a warning: the next record ends the run
        assert line.startswith("moco: warning: ")
        assert line.endswith("training continues without it")
        assert sum("No space left on device" in each for each in output.splitlines()) == 2
    elif name.startswith("nonfinite"):
        assert line.startswith("moco: step ")
        assert "(the state could not be saved to " in line
    else:
        assert line.startswith("moco: ")
        assert "free some space" in line
    assert not [each for each in (small_disk / run.name).rglob("*") if each.suffix == ".tmp" or name in str(each)]
    (small_disk / "ballast").unlink()
    if name.startswith("nonfinite"):
        assert runs.wait(runs.start(run, *given)) == [1]
        (kept,) = (run / "nonfinite").iterdir()
        assert "method" in torch.load(kept, weights_only=True)
        return
    runs.to_the_end(run, *given)
    assert (run / name).stat().st_size > 0
    assert read_encoder(run / "encoder.safetensors").step == runs.saved(run) > 0


@pytest.mark.slow
def test_images_deleted_while_training_are_replaced_and_listed(tmp_path: Path) -> None:
    """Five of forty images are deleted while loader processes read them."""
    root, run = folder(tmp_path / "images", good=40, unreadable=False), tmp_path / "run"
    given = ["data=folder", f"data.root={root}", "data.workers=1", "data.on_bad_image=replace", "data.max_bad=0.2"]
    given += ["batch_size=16", "model.bn_group_size=8", "epochs=20", "method.queue_size=32", "augment=cifar"]
    processes = runs.start(run, *given)
    assert runs.until_saved(run, 5, processes), runs.output(run)
    gone = [f"{i:02}.png" for i in range(3, 8)]
    for name in gone:
        os.unlink(root / name)
    assert runs.wait(processes) == [0], runs.output(run)
    with (run / "bad_images.csv").open(newline="") as file:
        listed = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert listed == dict.fromkeys(gone, "No such file or directory")
