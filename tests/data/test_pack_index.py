"""A packed folder whose index or rows were changed and sealed again: one sentence, or the same images (R14)."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moco.config import DataConfig
from moco.data.decode import decode
from moco.data.shard_index import INDEX, file_digest, sealed
from moco.data.sources import load_source
from tests.data.packed import class_folders, packed

VALUES: list[Any] = [None, True, -1, 0, 7, 2**40, 0.5, "", "x", "../../etc/passwd", [], [[]], [1], {}, {"a": 1}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("changed")
    packed(root / "out", class_folders(root / "train"))
    return root / "out"


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every entry of nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@pytest.fixture(scope="module")
def images(folder: Path) -> list[Tensor]:
    """The packed images, read from their own files."""
    return [decode(path) for path in sorted((folder.parent / "train").rglob("*.*"))]


def read_all(folder: Path, images: list[Tensor]) -> str:
    """Read all images of a packed folder; return the error, "" without one. Anything but a ValueError is raised.

    What can be read must equal `images`, up to the first error.
    """
    try:
        source = load_source(DataConfig(name="shards", root=str(folder))).train
        for i in range(len(source)):
            assert torch.equal(source.image(i), images[i])
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    assert len(source) == len(images)
    return ""


def test_every_entry_of_the_index(folder: Path, images: list[Tensor]) -> None:
    index = folder / INDEX
    before = index.read_bytes()
    content = {name: value for name, value in json.loads(before).items() if name != "sha256"}
    rng, refused, cases = random.Random(0), 0, 0
    try:
        for path in list(places(content)):
            for value in rng.sample(VALUES, 4):
                changed = json.loads(json.dumps(content))
                at = changed
                for key in path[:-1]:
                    at = at[key]
                at[path[-1]] = value
                index.write_text(json.dumps(sealed(changed)))
                error = read_all(folder, images)
                assert "\n" not in error
                refused, cases = refused + bool(error), cases + 1
    finally:
        index.write_bytes(before)
    assert cases > 100
    assert refused > cases / 2  # the settings, among others, do not matter for reading


def test_rows_that_differ(folder: Path, images: list[Tensor]) -> None:
    index, file = folder / INDEX, folder / "train.npy"
    before, rows = (index.read_bytes(), file.read_bytes()), np.load(file)
    content = {name: value for name, value in json.loads(before[0]).items() if name != "sha256"}
    invalid: list[Any] = [rows[:-1], rows[None], rows["offset"], np.zeros(len(rows))]
    outside = {"shard": (-1, 99), "offset": (-1, 2**40), "size": (-1, 2**40), "label": (-2, 99)}
    invalid += [_with_first(rows, name, value) for name, values in outside.items() for value in values]
    elsewhere = {"shard": 1, "offset": 0, "size": int(rows["size"][0]) - 1, "crc": 0}
    within = [_with_first(rows, name, value) for name, value in elsewhere.items()]
    try:
        for changed in [*invalid, *within]:
            np.save(file, changed)
            content["splits"]["train"]["sha256"] = file_digest(file)
            index.write_text(json.dumps(sealed(content)))
            flaw = "its checksum does not match" if any(changed is each for each in within) else "train.npy is damaged"
            assert flaw in read_all(folder, images)
    finally:
        index.write_bytes(before[0])
        file.write_bytes(before[1])
    assert read_all(folder, images) == ""


def _with_first(rows: Any, name: str, value: int) -> Any:
    """Return the rows with another value of the first image."""
    changed = rows.copy()
    changed[name][0] = value
    return changed
