"""The files of a folder: all images in a fixed order, links, and folders that cannot be listed."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from moco.config import DataConfig, RunWarning, config_dir
from moco.data.decode import ImageError
from moco.data.sources import FolderSource, load_source
from moco.data.unreadable import find_unreadable
from tests.data.images import names, write_image
from tests.data.unreadable_files import forbid


def test_folder_finds_all_images_in_sorted_order(tmp_path: Path) -> None:
    wanted = ["B/Z.PNG", "a.jpg", "a/deep/er/x.webp", "b.Jpeg", "b/ü 漢字.png", "c.bmp", "d.tif", "e.TIFF", "f.gif"]
    lost = "broken-link.jpg"  # has an image's name: keeps its position and is unreadable
    for i, name in enumerate(reversed(wanted)):
        write_image(tmp_path / name, i * 20)
    for name in (".hidden.jpg", ".cache/x.jpg", "notes.txt", "a/list.csv", "Makefile", lost, "b/notes"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name in (lost, "b/notes"):
            (tmp_path / name).symlink_to("gone.jpg")
        else:
            (tmp_path / name).write_text("x")
    os.mkfifo(tmp_path / "b" / "pipe.jpg")
    with pytest.warns(RunWarning, match=r"data\.root=.*: 1 broken links are ignored: b/notes -> gone\.jpg"):
        sources = load_source(DataConfig("folder", str(tmp_path)))
    train = sources.train
    assert isinstance(train, FolderSource)
    assert names(train) == sorted([*wanted, lost])
    with pytest.raises(ImageError, match=r"broken-link\.jpg: a link to gone\.jpg: No such file or directory") as caught:
        train.image(names(train).index(lost))
    assert caught.value.kind == "broken link"
    wanted = names(train)
    assert train.ignored == {"hidden": 2, ".txt": 1, ".csv": 1, "without ending": 1, "not a regular file": 1}
    assert (train.unlistable, train.broken) == ({}, {"b/notes": "gone.jpg"})
    assert (train.labels, train.classes, train.images, sources.bank, sources.held_out) == (None, (), None, None, None)
    assert train.image(wanted.index("b/ü 漢字.png")).shape == (3, 5, 6)
    assert train.image(wanted.index("f.gif")).flatten().tolist() == [0] * 90


def test_a_link_that_cannot_be_followed_is_one_unreadable_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(tmp_path / "good.png")
    (tmp_path / "cycle.jpg").symlink_to("cycle.jpg")
    (tmp_path / "one.png").symlink_to("two.png")
    (tmp_path / "two.png").symlink_to("one.png")
    (tmp_path / "in_a_file.gif").symlink_to("good.png/x.gif")
    (tmp_path / "denied.jpg").symlink_to("forbidden/x.jpg")
    stat = os.stat

    def denied(path: Any, *given: Any, **named: Any) -> os.stat_result:
        if str(path).endswith("denied.jpg") and named.get("follow_symlinks", True):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return stat(path, *given, **named)

    monkeypatch.setattr(os, "stat", denied)
    train = load_source(DataConfig("folder", str(tmp_path))).train
    assert names(train) == ["cycle.jpg", "denied.jpg", "good.png", "in_a_file.gif", "one.png", "two.png"]
    digest = train.content_digest()
    unreadable = find_unreadable(train, range(len(train)))
    assert {train.name(i): error.kind for i, error in unreadable.items()} == {
        name: "broken link" for name in names(train) if name != "good.png"
    }
    write_image(tmp_path / "forbidden/x.jpg")
    monkeypatch.undo()
    train = load_source(DataConfig("folder", str(tmp_path))).train
    assert names(train)[1] == "denied.jpg"
    assert train.image(1).shape == (3, 5, 6)
    assert train.content_digest() != digest


def test_order_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    for name in ("b/1.png", "a/2.png", "a/c/3.png", "4.png"):
        write_image(root / name)
    (root / "a/to_b").symlink_to(root / "b")
    write_image(tmp_path / "outside/5.png")
    (root / "link2").symlink_to(tmp_path)  # contains this tree, and the target of link3
    (root / "link3").symlink_to(tmp_path / "outside")
    (root / "link1").symlink_to(root / "a")
    expected = names(load_source(DataConfig("folder", str(root))).train)
    assert expected == ["4.png", "a/2.png", "a/c/3.png", "b/1.png", "link2/outside/5.png"]
    scandir = os.scandir

    class Backwards:
        def __init__(self, path: str) -> None:
            with scandir(path) as entries:
                self.entries = list(entries)[::-1]

        def __enter__(self) -> Sequence[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(os, "scandir", Backwards)
    assert names(load_source(DataConfig("folder", str(root))).train) == expected


def test_links_are_followed_once_and_cycles_are_harmless(tmp_path: Path) -> None:
    write_image(tmp_path / "outside/x.png")
    write_image(tmp_path / "root/real/y.png")
    (tmp_path / "root/a_link").symlink_to(tmp_path / "root/real")  # sorts first, but the real folder keeps its name
    (tmp_path / "root/real/loop").symlink_to(tmp_path / "root")
    (tmp_path / "root/elsewhere").symlink_to(tmp_path / "outside")
    (tmp_path / "root/zz").symlink_to(tmp_path / "outside")
    (tmp_path / "outside/back").symlink_to(tmp_path / "root")
    assert names(load_source(DataConfig("folder", str(tmp_path / "root"))).train) == ["elsewhere/x.png", "real/y.png"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1.png", "b/2.png", "c/deep/3.png"):
        write_image(tmp_path / name)
    forbid(monkeypatch, tmp_path / "b", tmp_path / "c/deep")
    for labels in ("none", "folder"):
        with pytest.raises(
            ValueError,
            match=r"^data\.root=\S+ contains 2 folders that cannot be listed: b \(Permission denied\), c/deep "
            r"\(Permission denied\); give this user permission",
        ):
            load_source(DataConfig("folder", str(tmp_path), labels=labels))
    train = load_source(DataConfig("folder", str(tmp_path)), keep_unlistable=True).train
    assert isinstance(train, FolderSource)
    assert (names(train), set(train.unlistable)) == (["a/1.png"], {"b", "c/deep"})
    with pytest.raises(ValueError, match="2 folders that cannot be listed"):  # only one class is left
        load_source(DataConfig("folder", str(tmp_path), labels="folder"), keep_unlistable=True)
    forbid(monkeypatch, tmp_path)
    for keep in (False, True):
        with pytest.raises(ValueError, match=r"data\.root=.* cannot be listed: \. \(Permission denied\)"):
            load_source(DataConfig("folder", str(tmp_path)), keep_unlistable=keep)


def test_a_forbidden_link_is_not_a_broken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "1.png")
    (tmp_path / "more").symlink_to(tmp_path / "elsewhere")
    stat = os.stat

    def denied(path: Any, *given: Any, **named: Any) -> os.stat_result:
        if str(path).endswith("more"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return stat(path, *given, **named)

    monkeypatch.setattr(os, "stat", denied)
    with pytest.raises(ValueError, match=r"1 folder that cannot be listed: more \(Permission denied\)"):
        load_source(DataConfig("folder", str(tmp_path)))


_setpriv = shutil.which("setpriv")
_UNPRIVILEGED = ["--bounding-set", "-dac_override,-dac_read_search", "--inh-caps", "-dac_override,-dac_read_search"]


@pytest.mark.skipif(os.geteuid() == 0 and _setpriv is None, reason="root needs setpriv to be refused")
def test_a_folder_that_cannot_be_listed_in_a_separate_process(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/2.png"):
        write_image(tmp_path / name)
    (tmp_path / "b").chmod(0)
    try:
        script = "import sys; from moco.data.walk import walk; t = walk(sys.argv[1]); print(t.images, t.unlistable)"
        command = [sys.executable, "-c", script, str(tmp_path)]
        if os.geteuid() == 0:
            command = [str(_setpriv), *_UNPRIVILEGED, *command]
        done = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": str(Path(config_dir()).parent)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        (tmp_path / "b").chmod(0o755)
    assert done.stdout == "['a/1.png'] {'b': 'Permission denied'}\n", done.stderr


def test_files_with_names_that_are_not_utf8_can_be_opened(tmp_path: Path) -> None:
    write_image(tmp_path / "x.png", 7)
    os.rename(tmp_path / "x.png", os.fsencode(tmp_path) + b"/\xff\xfe.png")
    train = load_source(DataConfig("folder", str(tmp_path))).train
    assert os.fsencode(train.name(0)) == b"\xff\xfe.png"
    assert (train.image(0) == 7).all()
