"""The image or video files below a folder, in an order that depends on their names only."""

import errno
import os
from collections import Counter
from dataclasses import dataclass, field

# The order matters in tar files: if a sample has several images, the one whose ending comes first in this list is used.
IMAGE_ENDINGS = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".jpe", ".jfif", ".ppm", ".pgm", ".pbm", ".pnm"),
)
# Endings of image formats that are not read: formats of phones, raw formats of cameras, and others. Such images must be
# converted first.
OTHER_IMAGE_ENDINGS = frozenset(
    (".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf")
)
# Endings of arrays, which are images only in a data set of other channels or another depth than RGB in 8 bits.
ARRAY_ENDINGS = (".npy", ".npz")
# Endings of videos, whose frames are the images of data.name=video.
VIDEO_ENDINGS = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".mts", ".m2ts", ".ts"),
    *(".wmv", ".asf", ".flv", ".ogv", ".3gp", ".3g2", ".mxf"),
)
# PIL's names of the formats of `IMAGE_ENDINGS`. Only these formats may be opened: PIL's EPS reader, for example, runs
# another program. PIL's JPEG reader also opens a JPEG file that contains a second image; PIL calls this format MPO.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
# Files and folders of operating systems, storage devices and editors, in lower case. They may hold images: thumbnails,
# deleted files. Like hidden files (.NAME), they are left out in every folder.
SYSTEM_NAMES = {
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"),  # Synology and QNAP
    *("$recycle.bin", "recycler", "system volume information", "thumbs.db", "desktop.ini"),  # Windows
    *("__macosx", "lost+found", "__pycache__"),
}
SPECIAL_FILE = "not a regular file"  # the kind of a pipe, socket or device
BROKEN_LINK = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # errors of a link with no target, or in a cycle


@dataclass
class Tree:
    """The content of a folder; all paths are relative to it, with / between the parts."""

    images: list[str] = field(default_factory=list)  # sorted
    ignored: Counter[str] = field(default_factory=Counter)  # other files, counted by kind
    unlistable: dict[str, str] = field(default_factory=dict)  # folders that cannot be listed -> reason; "": the root
    broken: dict[str, str] = field(default_factory=dict)  # broken links whose names have no image ending -> target


def walk(folder: str, endings: tuple[str, ...] = IMAGE_ENDINGS, table: str = "") -> Tree:
    """Find all images below a folder: the files with one of the endings. Other files are counted.

    The file with the path `table`, a table of labels, is skipped. Links are followed, and each real folder is listed
    once, so a link to a parent folder is harmless. Links to folders are followed last, in the order of their names: a
    folder is listed under its own path even if a link points to it. A link with an image's name that cannot be followed
    (no target, a cycle, no permission) counts as an image: it keeps its position and is unreadable.
    """
    tree = Tree()
    table_folder, table_name = os.path.realpath(os.path.dirname(table)), os.path.basename(table)
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
                    if entry.name == table_name and real == table_folder:
                        continue
                    path = f"{relative}/{entry.name}" if relative else entry.name
                    _add(tree, entry, path, links if entry.is_symlink() else folders, endings)
        except OSError as error:
            tree.unlistable[relative] = error.strerror or str(error)
    tree.images.sort()
    return tree


def _add(tree: Tree, entry: os.DirEntry[str], path: str, folders: list[str], endings: tuple[str, ...]) -> None:
    """Add one entry of a folder to the tree, or to the `folders` that remain to be listed."""
    is_image = entry.name.lower().endswith(endings)
    link_error: OSError | None = None
    if entry.is_symlink():
        try:
            os.stat(entry.path)
        except OSError as error:
            link_error = error
    if is_system_name(entry.name):
        tree.ignored["hidden" if entry.name.startswith(".") else entry.name] += 1
    elif link_error is not None and not is_image:
        if link_error.errno in BROKEN_LINK:
            tree.broken[path] = os.readlink(entry.path)
        else:  # its target may be a folder of images
            tree.unlistable[path] = link_error.strerror or str(link_error)
    elif link_error is not None:
        tree.images.append(path)
    elif entry.is_dir():
        folders.append(path)
    elif not entry.is_file():
        tree.ignored[SPECIAL_FILE] += 1
    elif is_image:
        tree.images.append(path)
    else:
        tree.ignored[os.path.splitext(entry.name)[1].lower() or "without ending"] += 1


def size_and_time(path: str) -> tuple[int, int]:
    """Return size and modification time of a file; (-1, -1) if they cannot be read, as with a broken link."""
    try:
        stat = os.stat(path)
    except OSError:
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def is_system_name(name: str) -> bool:
    """Return whether a file or folder of this name is hidden or one of `SYSTEM_NAMES`."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES
