"""Folders of images: generated trees, what is left out, classes, held-out folders, ImageNet."""

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
from tests.data.images import gradient, names, write_image

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


def test_labels_are_first_level_folders(tmp_path: Path) -> None:
    for i, name in enumerate(("dog/1.png", "cat/x/2.png", "cat/3.png", "cat-like/4.png")):
        write_image(tmp_path / name, i)
    (tmp_path / "empty").mkdir()
    sources = load_source(DataConfig("folder", str(tmp_path), labels="folder"))
    train = sources.train
    assert train.classes == ("cat", "cat-like", "dog")
    assert train.labels is not None
    assert train.labels.dtype == np.int64
    assert {name: train.classes[label] for name, label in zip(names(train), train.labels, strict=True)} == {
        "cat/3.png": "cat",
        "cat/x/2.png": "cat",
        "cat-like/4.png": "cat-like",
        "dog/1.png": "dog",
    }
    assert sources.bank is train
    assert sources.held_out is None


def test_invalid_class_folders_are_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "only/1.png")
    with pytest.raises(ValueError, match=r"one class folder only \(only\)"):
        load_source(DataConfig("folder", str(tmp_path), labels="folder"))
    write_image(tmp_path / "stray.png")
    with pytest.raises(ValueError, match=r"1 images outside class folders \(stray\.png\).*data\.labels=none"):
        load_source(DataConfig("folder", str(tmp_path), labels="folder"))
    with pytest.raises(ValueError, match=r"data\.labels='class' must be one of none, folder"):
        load_source(DataConfig("folder", str(tmp_path), labels="class"))


def test_eval_root_is_held_out(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/2.png", "test/b/3.png", "test/a/4.png"):
        write_image(tmp_path / name)
    sources = load_source(
        DataConfig("folder", str(tmp_path / "train"), labels="folder", eval_root=str(tmp_path / "test"))
    )
    assert sources.bank is sources.train
    assert sources.held_out is not None
    assert names(sources.held_out) == ["a/4.png", "b/3.png"]
    assert sources.held_out.classes == sources.train.classes


def test_an_invalid_eval_root_is_refused(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/2.png", "test/b/3.png", "test/c/4.png"):
        write_image(tmp_path / name)
    train, test = str(tmp_path / "train"), str(tmp_path / "test")
    with pytest.raises(ValueError, match=r"data\.eval_root=\S*test has images of c, "):
        load_source(DataConfig("folder", train, labels="folder", eval_root=test))
    with pytest.raises(ValueError, match=r"data\.labels=none: set data\.labels=folder"):
        load_source(DataConfig("folder", train, eval_root=test))
    with pytest.raises(FileNotFoundError, match=r"data\.eval_root=.*gone.* does not exist"):
        load_source(DataConfig("folder", train, labels="folder", eval_root=str(tmp_path / "gone")))
    for inside in (train, str(tmp_path), os.path.join(train, "b")):
        with pytest.raises(ValueError, match="accuracy would be measured on training images"):
            load_source(DataConfig("folder", train, labels="folder", eval_root=inside))
    with pytest.raises(ValueError, match=r"data\.eval_root=.* data\.name=folder or video only"):
        load_source(DataConfig("digits", eval_root=test))


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.root=\S*gone does not exist: check the path"):
        load_source(DataConfig("folder", str(tmp_path / "gone")))
    with pytest.raises(FileNotFoundError, match=r"found nothing; images are files that end in \.jpg \.jpeg"):
        load_source(DataConfig("folder", str(tmp_path)))
    for name in ("a.txt", "b.TXT", "c.zip", "README", ".x.jpg"):
        (tmp_path / name).write_text("x")
    with pytest.raises(FileNotFoundError, match=r"found 2 \.txt, 1 \.zip, 1 hidden, 1 without ending;"):
        load_source(DataConfig("folder", str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="is a file, not a folder"):
        load_source(DataConfig("folder", str(tmp_path / "a.txt")))


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


# ---- ImageNet ----


def test_imagenet_tree(tmp_path: Path) -> None:
    for name in ("train/n02/1.JPEG", "train/n01/2.JPEG", "val/n01/3.JPEG", "val/n02/4.JPEG"):
        write_image(tmp_path / name)
    sources = load_source(DataConfig("imagenet", str(tmp_path)))
    assert sources.bank is sources.train
    assert sources.held_out is not None
    assert names(sources.train) == ["n01/2.JPEG", "n02/1.JPEG"]
    assert names(sources.held_out) == ["n01/3.JPEG", "n02/4.JPEG"]
    assert sources.held_out.labels is not None
    assert sources.held_out.labels.tolist() == [0, 1]
    (tmp_path / "val/n02").rename(tmp_path / "val/n03")
    with pytest.raises(ValueError, match=r"data\.root=\S*val has images of n03, "):
        load_source(DataConfig("imagenet", str(tmp_path)))


def test_an_incomplete_imagenet_is_refused(tmp_path: Path) -> None:
    def message(root: Path) -> str:
        with pytest.raises(FileNotFoundError) as caught:
            load_source(DataConfig("imagenet", str(root)))
        assert "image-net.org" in str(caught.value)
        assert "train/CLASS" in str(caught.value)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "does not exist" in message(tmp_path / "gone")
    assert "contains nothing" in message(tmp_path)
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(b"x")
    assert "contains ILSVRC2012_img_train.tar" in message(tmp_path)
    write_image(tmp_path / "train/n01/1.JPEG")
    write_image(tmp_path / "train/n02/1.JPEG")
    write_image(tmp_path / "val/ILSVRC2012_val_00000001.JPEG")  # the validation archive contains no class folders
    with pytest.raises(ValueError, match=r"val has 1 images outside class folders \(ILSVRC2012_val_00000001\.JPEG\)"):
        load_source(DataConfig("imagenet", str(tmp_path)))


def test_folders_of_splits_as_classes_are_reported(tmp_path: Path) -> None:
    for name in ("train", "Test"):
        write_image(tmp_path / name / "cat" / "a.png")
    with pytest.warns(RunWarning, match=r"its folders Test, train are used as classes, .* set data\.root to"):
        load_source(DataConfig("folder", str(tmp_path), labels="folder"))
