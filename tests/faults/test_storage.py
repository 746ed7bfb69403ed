"""A disk that is really full, and pictures that vanish, while a run goes on."""

import csv
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from moco.engine import checkpoint
from tests.data.broken import folder
from tests.faults import runs
from tests.faults.runs import LONG


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path) -> None:
    """Takes every byte that is left."""
    with (place / "ballast").open("ab", buffering=0) as file:
        try:
            while file.write(bytes(1 << 20)):
                pass
        except OSError:
            pass


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_a_sentence_and_with_room_it_goes_on_bit_for_bit(
    small_disk: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    runs.to_the_end(whole)
    turns = 10 if LONG else 2
    for turn in range(turns):
        run = tmp_path / f"run{turn}"
        run.symlink_to(small_disk / run.name)  # its words go to a disk that has room
        (small_disk / run.name).mkdir()
        processes = runs.start(run)
        assert runs.until_saved(run, 2 + runs.chance(turn).randrange(20), processes), runs.said(run)
        fill(small_disk)
        assert runs.wait(processes) == [1], runs.said(run)
        (line,) = [each for each in runs.said(run).splitlines() if "No space left on device" in each]
        assert line.startswith("moco: ")
        assert "make room there" in line
        assert "Traceback" not in runs.said(run)
        assert not list((run / "checkpoints").glob("*.tmp"))
        (small_disk / "ballast").unlink()
        assert checkpoint.load(checkpoint.found(run / "checkpoints")[0])["step"] == runs.saved(run)
        runs.to_the_end(run)
        assert "falling back" not in runs.said(run)
        runs.same_end(run, whole)
        shutil.rmtree(small_disk / run.name)
    print(f"faults: {turns} full disks")


@pytest.mark.slow
def test_pictures_that_vanish_while_training_are_replaced_and_listed(tmp_path: Path) -> None:
    """Five of forty pictures go while loader processes read them."""
    root, run = folder(tmp_path / "pictures", good=40, bad=False), tmp_path / "run"
    given = ["data=folder", f"data.root={root}", "data.workers=1", "data.on_bad_image=replace", "data.max_bad=0.2"]
    given += ["batch_size=16", "model.bn_group_size=8", "epochs=20", "method.queue_size=32", "augment=cifar"]
    processes = runs.start(run, *given)
    assert runs.until_saved(run, 5, processes), runs.said(run)
    gone = [f"{i:02}.png" for i in range(3, 8)]
    for name in gone:
        os.unlink(root / name)
    assert runs.wait(processes) == [0], runs.said(run)
    with (run / "bad_images.csv").open(newline="") as file:
        listed = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert listed == dict.fromkeys(gone, "No such file or directory")
