"""Cached features equal the computed ones, are found only by their key, and are complete."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from moco.config import DataConfig
from moco.data.sources import ArraySource, load_source
from moco.digest import digest
from moco.evaluation.cache import cached
from moco.files import WriteError

FEATURES = torch.arange(7 * 3, dtype=torch.float32).view(7, 3)


def keep(folder: Path, key: str = "k", count: int = 7) -> tuple[Tensor, list[int]]:
    """The features of `count` rows through the cache, and which rows were computed for it."""
    seen: list[int] = []

    def compute(rows: Sequence[int]) -> Iterator[Tensor]:
        for row in rows:
            seen.append(row)
            yield FEATURES[row : row + 1]

    return cached(folder, key, count, 3, compute), seen


def test_the_second_time_nothing_is_computed(tmp_path: Path) -> None:
    first, seen = keep(tmp_path / "new" / "features")
    assert torch.equal(first, FEATURES)
    assert seen == list(range(7))
    second, seen = keep(tmp_path / "new" / "features")
    assert torch.equal(second, FEATURES)
    assert seen == []
    assert [path.name for path in (tmp_path / "new" / "features").iterdir()] == ["k.npy"]


def test_another_key_is_computed_anew(tmp_path: Path) -> None:
    keep(tmp_path)
    assert len(keep(tmp_path, "other")[1]) == 7


def test_an_interrupted_writer_leaves_nothing_that_counts(tmp_path: Path) -> None:
    def broken(rows: Sequence[int]) -> Iterator[Tensor]:
        yield FEATURES[:2]
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        cached(tmp_path, "k", 7, 3, broken)
    assert not (tmp_path / "k.npy").exists()
    again, seen = keep(tmp_path)
    assert torch.equal(again, FEATURES)
    assert len(seen) == 7


def test_two_commands_at_once_write_their_own_files(tmp_path: Path) -> None:
    def while_another_computes(rows: Sequence[int]) -> Iterator[Tensor]:
        yield FEATURES[:3]
        (in_use,) = tmp_path.glob("k.npy.*.tmp")
        (owner := os.fork()) or os._exit(
            0 if torch.equal(keep(tmp_path)[0], FEATURES) else 1
        )  # a process has its own locks
        assert os.waitstatus_to_exitcode(os.waitpid(owner, 0)[1]) == 0
        assert in_use.exists()
        assert torch.equal(torch.from_numpy(np.load(tmp_path / "k.npy")), FEATURES)
        yield FEATURES[3:]

    assert torch.equal(cached(tmp_path, "k", 7, 3, while_another_computes), FEATURES)
    assert [path.name for path in tmp_path.iterdir()] == ["k.npy"]


def test_the_file_of_a_killed_command_is_removed(tmp_path: Path) -> None:
    (tmp_path / "k.npy.12345678.tmp").write_bytes(b"half")
    (tmp_path / "k.npy.12345678.lock").write_text("1 on a host")
    keep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["k.npy"]


def test_a_full_disk_is_reported_in_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(WriteError, match="No space left on device"):
        keep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_file_is_computed_again(tmp_path: Path) -> None:
    keep(tmp_path)
    content = (tmp_path / "k.npy").read_bytes()
    (tmp_path / "k.npy").write_bytes(content[:-9])
    again, seen = keep(tmp_path)
    assert torch.equal(again, FEATURES)
    assert len(seen) == 7


def test_changes_of_the_features_do_not_reach_the_file(tmp_path: Path) -> None:
    keep(tmp_path)[0].zero_()
    assert torch.equal(keep(tmp_path)[0], FEATURES)


# ---- keys ----


def test_the_key_depends_on_every_part() -> None:
    parts = {"weights": {"a": torch.ones(3)}, "look": {"size": 16}, "layers": ["output"]}
    others = [
        parts | {"weights": {"a": torch.tensor([1, 1, 1.0000001])}},
        parts | {"look": {"size": 32}},
        parts | {"layers": ["output", "layer3"]},
    ]
    keys = {digest(each) for each in [parts, *others]}
    assert len(keys) == 4
    assert digest(parts | {"weights": {"a": torch.ones(3)}}) in keys


def test_images_in_memory_are_distinguished_by_their_pixels_and_names() -> None:
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    other = images.clone()
    other[1, 0, 0, 0] = 1
    digests = {ArraySource(*each).content_digest() for each in [(images, "ab"), (other, "ab"), (images, "ac")]}
    assert len(digests) == 3
    assert ArraySource(images.clone(), "ab").content_digest() in digests


def test_files_are_distinguished_by_name_size_and_time(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(image)
    before = load_source(DataConfig("folder", str(tmp_path))).train.content_digest()
    assert load_source(DataConfig("folder", str(tmp_path))).train.content_digest() == before
    with tempfile.TemporaryDirectory() as other:
        shutil.copy2(image, other)  # with its time
        assert load_source(DataConfig("folder", other)).train.content_digest() == before
    Image.fromarray(np.full((4, 4, 3), 9, np.uint8)).save(image)
    assert load_source(DataConfig("folder", str(tmp_path))).train.content_digest() != before
