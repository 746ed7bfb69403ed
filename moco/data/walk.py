"""The image files of a tree, in an order that depends on their names alone."""

import os
from collections import Counter

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def walk(folder: str) -> tuple[list[str], Counter[str]]:
    """Relative paths of all images with / between the parts, sorted, and what else was found, counted by kind.

    Links are followed, and each real folder counts once, so that a link to a parent does no harm. Links wait, in order,
    until all real folders are done: a folder keeps its own name, whatever order the file system lists.
    """
    paths: list[str] = []
    ignored: Counter[str] = Counter()
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
        with os.scandir(real) as entries:
            for entry in entries:
                path = f"{relative}/{entry.name}" if relative else entry.name
                if entry.name.startswith("."):
                    ignored["hidden"] += 1
                elif entry.is_symlink() and not os.path.exists(entry.path):  # to nowhere, or round in a circle
                    ignored["broken link"] += 1
                elif entry.is_dir():
                    (links if entry.is_symlink() else folders).append(path)
                elif entry.name.lower().endswith(IMAGE_ENDINGS) and entry.is_file():
                    paths.append(path)
                else:
                    ignored[os.path.splitext(entry.name)[1].lower() or "without ending"] += 1
    return sorted(paths), ignored
