"""File names from a table, a list or a person: Unicode has several forms of the same text.

The letter ü is one character, or the letter u and a mark. macOS and some archives write the second form (NFD), editors
and keyboards the first one (NFC).
"""

import os
import unicodedata
from collections.abc import Collection, Iterable
from functools import lru_cache
from pathlib import Path

from moco.config import ConfigError, require
from moco.files import cause


def other_forms(names: Collection[str], known: Iterable[str]) -> dict[str, str]:
    """Return, for each of `names` that is known only in another form of Unicode, the known name.

    A name is left out if several known names are forms of it, or if another of `names` is a form of the same known
    name. Known names that also occur in `names` are not returned.
    """
    if all(map(str.isascii, names)):
        return {}
    written, known = set(names), set(known)
    missing, free = (_by_form(each) for each in (written - known, known - written))
    pairs = ((missing[form], free.get(form, [])) for form in missing)
    return {here[0]: there[0] for here, there in pairs if len(here) == len(there) == 1}


def existing_path(path: str) -> str:
    """Return the path of a file or folder in the form of Unicode in which it exists.

    Return `path` itself if it exists, or if no form or several forms of it exist.
    """
    if path.isascii() or os.path.lexists(path):
        return path
    folder, name = os.path.split(path)
    folder = existing_path(folder) if folder not in ("", path) else folder
    try:
        entries = _entries(folder or ".", Path(folder or ".").stat().st_mtime_ns)
    except OSError:
        return path
    same = entries.get(normal_form(name), [])
    return path if len(same) != 1 else f"{folder}/{same[0]}" if folder else same[0]


def normal_form(name: str) -> str:
    """Return a text in Unicode's form NFC, which is the same for all forms of the text."""
    return unicodedata.normalize("NFC", name)


def _by_form(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(normal_form(name), []).append(name)
    return found


@lru_cache(maxsize=16)
def _entries(folder: str, _modified: int) -> dict[str, list[str]]:  # with a new time, the folder is listed again
    return _by_form(path.name for path in Path(folder).iterdir())


def listed_names(path: Path) -> list[str]:
    """Return the lines of a list of names, without empty lines.

    Raises:
        ConfigError: if the file cannot be read, is not in UTF-8, or has only empty lines.
    """
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a list of names in UTF-8 ({cause(error)}): correct it") from error
    require(bool(names), f"{path} lists no image: choose another split")
    return names
