"""Generated folder trees: exactly the images are found; what is left out is counted; classes of two folders."""

import os
import shutil
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moco.config import DataConfig, RunWarning
from moco.data.folder import FolderSource
from moco.data.opening import MAX_CLASSES, class_line, opening_lines
from moco.data.sources import load_source
from moco.data.walk import IMAGE_ENDINGS, IMAGE_FORMATS, walk
from tests.data.images import gradient

ORDINARY = ["a", "B", "cat.jpg.d", "caf\u00e9", "cafe\u0301", "sp ace", "new\nline", "[x]", "__x__", "train"]
SYSTEM = ["@eaDir", "$RECYCLE.BIN", "lost+found", "__MACOSX", ".ipynb_checkpoints", "System Volume Information", ".git"]
IMAGE_NAMES = ["x.jpg", "x.JPEG", "y.jfif", "y.JPE", "z.ppm", "z.PGM", "t.Tiff", "ü.webp", "-.png", "..png"]
OTHER_NAMES = ["x.avif", "x.heic", "x.jp2", "x.txt", "jpg", "x.jpg.part", "notes", ".DS_Store", "._x.jpg", "Thumbs.db"]

FOLDERS = st.lists(st.sampled_from(ORDINARY + SYSTEM), max_size=3)
FILES = st.tuples(FOLDERS, st.sampled_from(IMAGE_NAMES + OTHER_NAMES))


@given(st.sets(FILES.map(lambda file: (*file[0], file[1])), max_size=8), st.lists(FOLDERS, max_size=2), st.booleans())
@settings(max_examples=50, deadline=None)
def test_exactly_the_images_of_any_tree_are_found(
    files: set[tuple[str, ...]], empty: list[list[str]], linked: bool
) -> None:
    root = Path(tempfile.mkdtemp())
    try:
        for parts in files:
            root.joinpath(*parts).parent.mkdir(parents=True, exist_ok=True)
            root.joinpath(*parts).write_bytes(b"")
        for parts in map(tuple, empty):
            root.joinpath(*parts).mkdir(parents=True, exist_ok=True)
        if linked:
            (root / "zz_loop").symlink_to(root)  # each real folder counts once
        system = {name.lower() for name in SYSTEM}
        shown = [p for p in files if not any(n.startswith(".") or n.lower() in system for n in p)]
        expected = sorted("/".join(p) for p in shown if p[-1].lower().endswith(IMAGE_ENDINGS))
        tree = walk(str(root))
        assert tree.images == expected
        others = Counter(os.path.splitext(p[-1])[1].lower() or "without ending" for p in shown if p[-1] != "Thumbs.db")
        kinds = [kind for kind in tree.ignored if kind.startswith(".") or kind == "without ending"]
        images = Counter(os.path.splitext(p[-1])[1].lower() for p in shown if p[-1].lower().endswith(IMAGE_ENDINGS))
        assert {kind: tree.ignored[kind] for kind in kinds} == dict(others - images)
    finally:
        shutil.rmtree(root)


def files(root: Path, **counts: int) -> Path:
    for name, count in counts.items():
        for i in range(count):
            write(root / name / f"{i}.png", i)
    return root


def write(path: Path, seed: int = 0, kind: str = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    gradient(seed, 8, 8).save(path, kind)


def test_every_ending_of_an_image_is_read(tmp_path: Path) -> None:
    kinds = {".jfif": "JPEG", ".jpe": "JPEG", ".ppm": "PPM", ".pnm": "PPM"}
    for ending, kind in kinds.items():
        write(tmp_path / f"x{ending}", kind=kind)
    gradient(0, 8, 8).convert("L").save(tmp_path / "x.pgm")
    gradient(0, 8, 8).convert("1").save(tmp_path / "x.pbm")
    train = load_source(DataConfig("folder", str(tmp_path))).train
    assert len(train) == 6
    assert {train.image(i).shape for i in range(6)} == {(3, 8, 8)}
    assert "PPM" in IMAGE_FORMATS


def test_files_that_are_left_out_are_mentioned(tmp_path: Path) -> None:
    files(tmp_path, a=2, b=2)
    for name in ("1.avif", "2.avif", "3.heic", ".DS_Store", "notes"):
        (tmp_path / "a" / name).write_bytes(b"x")
    files(tmp_path / "a", **{"@eaDir": 3})
    for resident in (False, True):
        sources = load_source(DataConfig("folder", str(tmp_path), resident=resident))
        assert len(sources.train) == 4
        (line,) = opening_lines(sources)
        assert line.endswith(
            ": 2 .avif, 1 .heic, 1 @eaDir, 1 hidden, 1 without ending; to use .avif, .heic, convert to JPEG or PNG"
        )


def test_the_classes_are_shown_with_their_counts(tmp_path: Path) -> None:
    train, held_out = files(tmp_path / "train", cat=2, dog=1, owl=3), files(tmp_path / "test", dog=2)
    (held_out / "owl").mkdir()
    sources = load_source(DataConfig("folder", str(train), labels="folder", eval_root=str(held_out)))
    assert opening_lines(sources) == ["3 classes: cat (2), dog (1), owl (3)", "no held-out image of: cat, owl"]
    assert sources.held_out is not None
    assert sources.held_out.labels is not None
    assert sources.held_out.classes == ("cat", "dog", "owl")
    assert sources.held_out.labels.tolist() == [1, 1]  # an index into the classes of training
    many = FolderSource("", np.zeros(0, "S1"), np.zeros(0, np.int64), tuple(map(str, range(30))))
    assert class_line(many).endswith(f"9 (0) and {30 - MAX_CLASSES} more; 0 to 0 images each")


def test_classes_with_the_names_of_splits_are_warned_of(tmp_path: Path) -> None:
    files(tmp_path, train=2, Val=2)
    with pytest.warns(RunWarning, match="the classes Val, train have the names of splits"):
        opening_lines(load_source(DataConfig("folder", str(tmp_path), labels="folder")))


def test_held_out_classes_that_training_lacks_are_refused(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    train, held_out = files(tmp_path / "train", dog=1, **{composed: 1}), files(tmp_path / "test", **{decomposed: 1})
    config = DataConfig("folder", str(train), labels="folder", eval_root=str(held_out))
    with pytest.raises(ValueError, match=r"data\.eval_root=\S+test has .*Unicode form: rename one"):
        load_source(config)
