"""The image files of a tree, in an order that depends on their names alone."""

import errno
import os
from collections import Counter
from dataclasses import dataclass, field

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
# What PIL calls the formats that these endings stand for, and the only ones that it may open: of those that it knows
# besides, one (EPS) hands the file to another program. A JPEG with a second picture behind the first (MPO) is a JPEG.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # of a link: its end is not there, or it goes round in a circle


@dataclass
class Tree:
    """What is below a folder, all by paths relative to it with / between the parts."""

    pictures: list[str] = field(default_factory=list)  # sorted
    ignored: Counter[str] = field(default_factory=Counter)  # other files, counted by kind
    unreadable: dict[str, str] = field(default_factory=dict)  # folders that cannot be listed ("": the tree), and why
    broken: dict[str, str] = field(default_factory=dict)  # links that lead nowhere, and to where; no pictures by name


def walk(folder: str) -> Tree:
    """Finds all images below a folder, and what else is there.

    Links are followed, and each real folder counts once, so that a link to a parent does no harm. Links wait, in order,
    until all real folders are done: a folder keeps its own name, whatever order the file system lists. A link that
    leads nowhere is a picture if its name is one: it keeps its place, and cannot be read.
    """
    tree = Tree()
    seen: set[str] = set()
    folders, links = [""], list[str]()
    while folders or links:
        if not folders:
            links.sort()
        relative = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(os.path.join(folder, relative))
        if real in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(real) as entries:
                for entry in entries:
                    path = f"{relative}/{entry.name}" if relative else entry.name
                    _sort_in(tree, entry, path, links if entry.is_symlink() else folders)
        except OSError as error:
            tree.unreadable[relative] = error.strerror or str(error)
    tree.pictures.sort()
    return tree


def _sort_in(tree: Tree, entry: os.DirEntry[str], path: str, folders: list[str]) -> None:
    """Puts one entry of a folder to its kind; a folder waits in `folders`."""
    named = entry.name.lower().endswith(IMAGE_ENDINGS)
    lost = _lost(entry)
    if entry.name.startswith("."):
        tree.ignored["hidden"] += 1
    elif lost is not None and not named:
        if lost.errno in GONE:
            tree.broken[path] = os.readlink(entry.path)
        else:  # whatever it leads to, a folder of pictures perhaps
            tree.unreadable[path] = lost.strerror or str(lost)
    elif entry.is_dir():
        folders.append(path)
    elif named and (lost is not None or entry.is_file()):
        tree.pictures.append(path)
    else:
        tree.ignored[os.path.splitext(entry.name)[1].lower() or "without ending"] += 1


def _lost(entry: os.DirEntry[str]) -> OSError | None:
    """Why a link cannot be followed to its end; None: it can, or this is no link."""
    if entry.is_symlink():
        try:
            os.stat(entry.path)
        except OSError as error:
            return error
    return None
