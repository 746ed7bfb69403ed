"""Labels and splits of a folder's images from a table: a CSV or Parquet file with a row per image.

The column `path` names an image relative to the folder, `label` is its class (a text or a whole number), and `split`,
if there is such a column, says to which split the image belongs. Upper and lower case and spaces around the name of a
column do not matter. Other columns are ignored. An image has several labels if a separator is given, as in cat;dog, or
if the column of a Parquet file holds lists. Images of the split "unused" need no label: they are not read.

Legend: N images.
"""

import csv
import difflib
import itertools
import posixpath
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moco.config.base import RunWarning, optional_module
from moco.data.file_names import other_forms
from moco.data.labels import HELD_OUT, first_names, is_missing
from moco.distributed import is_rank_zero

COLUMNS = ("path", "label", "split")
UNUSED = "unused"  # the split of images that are neither trained on nor evaluated
# What to do about an empty value of a column. Removing only the row is not enough: each image needs a row.
_EMPTY = "fill it in, or remove the row and move its image out of data.root"
_EMPTY_LABEL = (
    f"fill it in, or give the row the split {UNUSED}; if images can have several labels or none, set "
    "data.label_separator"
)


class Row(NamedTuple):
    """The label and the split of an image."""

    place: str  # of the row in the table: "line 8" of a CSV file, or "row 7" of a Parquet file
    label: str | tuple[str, ...]  # a tuple of any length if images can have several labels
    split: str  # "" if the table has no such column


def read_label_file(file: str, separator: str = "") -> dict[str, Row]:
    """Return the row of each path, in the order of the file. Equal rows count once.

    Args:
        file: its path.
        separator: the text between the labels of an image that has several, data.label_separator; "": one label.

    Raises:
        ConfigError: if the file is Parquet and pyarrow is not installed.
        FileNotFoundError: if there is no such file.
        ValueError: if it is no table with the columns path and label, or has one of them twice; if a path or split is
            empty; if a label is empty, except in the split `UNUSED` or where images can have several labels; if a path
            has rows with different labels or splits; or if the separator does not occur.

    Warns:
        RunWarning: about ignored columns whose names resemble path, label or split.
    """
    where = f"data.label_file={file}"
    if not Path(file).is_file():
        raise FileNotFoundError(f"{where} {'is no file' if Path(file).exists() else 'does not exist'}: check the path")
    read = _parquet_rows if file.lower().endswith((".parquet", ".pq")) else _csv_rows
    rows: dict[str, Row] = {}
    for place, values in read(file, where):
        path, *split = (_text(value, where, place) for value in (values[0], *values[2:]))
        label = _label(values[1], separator, where, place)
        row = Row(place, label, split[0] if split else "")
        for column, text in zip(COLUMNS, (path, label, *split), strict=False):
            if text == "" and not (column == "label" and row.split == UNUSED):
                fix = _EMPTY_LABEL if column == "label" else _EMPTY
                raise ValueError(f"{where}: {place} has an empty {column}: {fix}")
        path = posixpath.normpath(path)
        first = rows.setdefault(path, row)
        if first[1:] != row[1:]:
            raise ValueError(
                f"{where}: {first.place} and {place} give {path} different labels or splits "
                f"({_shown(first)} and {_shown(row)}): keep one of them; several labels of an image belong in one row, "
                "with data.label_separator"
            )
    if not rows:
        raise ValueError(f"{where} has no rows: add one for each image, with its path and label")
    if separator and all(len(row.label) < 2 for row in rows.values()):
        raise ValueError(
            f"{where}: no row has labels separated by data.label_separator={separator!r}: correct the separator, or "
            "leave it empty if each image has one label"
        )
    return rows


def rows_of_images(rows: dict[str, Row], images: Sequence[str], where: str, file: str) -> list[Row]:
    """Return the row of each image (N); refuse rows without an image and images without a row.

    Args:
        rows: from `read_label_file`.
        images: the paths of all images, relative to their folder.
        where: the folder, for errors.
        file: the table, for errors.

    Raises:
        ValueError: if the paths of the table and of the folder differ.
    """
    image_of = other_forms(rows, images)
    rows = {image_of.get(path, path): row for path, row in rows.items()}
    known = set(images)
    if absent := [f"{path} ({row.place})" for path, row in rows.items() if path not in known]:
        raise ValueError(
            f"data.label_file={file} names {len(absent):,} image{'s' * (len(absent) > 1)} that {where} does not hold: "
            f"{first_names(absent, 3)}; write each path as it is below data.root, or remove its row"
        )
    if unlabeled := [path for path in images if path not in rows]:
        raise ValueError(
            f"data.label_file={file} has no row for {len(unlabeled):,} of the {len(images):,} images in {where}: "
            f"{first_names(unlabeled, 3)}; add a row for each (with the split {UNUSED}, it needs no label), or move "
            "them out of data.root"
        )
    return [rows[path] for path in images]


def held_out_split(rows: Sequence[Row], train: str, held_out: str, file: str) -> str:
    """Return the name of the held-out split; "" if the table has none.

    Args:
        rows: of all images.
        train: the training split, data.split.
        held_out: the held-out split, data.eval_split; "": the first of `HELD_OUT` that occurs.
        file: the table, for errors.

    Raises:
        ValueError: if a requested split is `UNUSED` or has no image, if both are the same, or if the table has a split
            with an unknown name.
    """
    found = {row.split: row for row in reversed(rows)}  # the first row of each split
    for name, split in (("split", train), ("eval_split", held_out)):
        if split == UNUSED:
            raise ValueError(f"data.{name}={split}: images of this split are not used: name another split")
        if split and split not in found:
            raise ValueError(
                f"data.label_file={file} has no row of data.{name}={split!r}: its splits are "
                f"{first_names(sorted(found))}; correct the field or the file"
            )
    if held_out == train:
        raise ValueError(
            f"data.eval_split={held_out!r} is also data.split, so accuracy would be measured on training "
            "images: set another one"
        )
    for split, row in found.items():
        if split not in (train, held_out, "train", *HELD_OUT, UNUSED):
            raise ValueError(
                f"data.label_file={file}: {row.place} has the unknown split {split!r}: use train, "
                f"{', '.join(HELD_OUT)} or, for images to leave out, {UNUSED}; or name it in data.split or "
                "data.eval_split"
            )
    return held_out or next((split for split in HELD_OUT if split in found and split != train), "")


def _columns(names: Sequence[str], where: str) -> list[str]:
    """Return the columns to read, as the table names them: path, label and, if there is one, split.

    Raises:
        ValueError: if path or label is missing, or if two columns have the same name.
    """
    found: dict[str, list[str]] = {column: [] for column in COLUMNS}
    others: list[str] = []
    for name in names:
        found.get(name.strip().casefold(), others).append(name)
    if missing := [column for column in ("path", "label") if not found[column]]:
        listed = f"its columns are {first_names(names, 8)}" if names else "it is empty"
        raise ValueError(
            f"{where} has no column {' and no column '.join(missing)}: {listed}; rename its columns to path and "
            "label, and for a held-out split add a column split; the columns of a CSV file are separated by commas"
        )
    if twice := [same for same in found.values() if len(same) > 1]:
        raise ValueError(
            f"{where} has the columns {' and '.join(map(repr, twice[0]))}, whose names count as the same: rename or "
            "remove one of them"
        )
    if (similar := [name for name in others if _resembles(name)]) and is_rank_zero():
        given = f"the column{'s' * (len(similar) > 1)} {first_names([*map(repr, similar)])}"
        used = ", ".join(column for column in COLUMNS if found[column])
        warnings.warn(f"{where}: not used: {given}; used: {used}", RunWarning, stacklevel=2)
    return [same[0] for same in found.values() if same]


def _resembles(name: str) -> bool:
    """Return whether the name of a column contains one of `COLUMNS`, or looks like one with a typing mistake."""
    lower = name.strip().casefold()
    return any(column in lower for column in COLUMNS) or bool(difflib.get_close_matches(lower, COLUMNS, 1, 0.75))


def _csv_rows(file: str, where: str) -> Iterator[tuple[str, list[Any]]]:
    try:
        with Path(file).open(newline="", encoding="utf-8-sig") as lines:
            table = csv.DictReader(lines)
            columns = _columns(table.fieldnames or [], where)
            for row in table:
                place = f"line {table.line_num}"  # the last line of the row, if a value in quotes has several lines
                if None in row:
                    raise ValueError(
                        f"{where}: {place} has more values than there are columns: put a value that contains a "
                        "comma in double quotes"
                    )
                yield place, [row[name] for name in columns]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{where} is no CSV file in UTF-8 ({error}): save it as one, or as .parquet") from error


def _parquet_rows(file: str, where: str) -> Iterator[tuple[str, Sequence[Any]]]:
    parquet = optional_module("pyarrow.parquet", where, "parquet", ", or save the table as CSV")
    try:
        table = parquet.ParquetFile(file)
        names = table.schema_arrow.names
    except (ValueError, OSError) as error:  # pyarrow's errors derive from one of these
        raise ValueError(f"{where} is no Parquet file ({error}): save it as one, or as .csv") from error
    columns = _columns(names, where)
    places = (f"row {number}" for number in itertools.count(1))
    for batch in table.iter_batches(columns=columns):
        values = zip(*(batch.column(name).to_pylist() for name in columns), strict=True)
        yield from ((next(places), each) for each in values)


def _label(value: Any, separator: str, where: str, place: str) -> str | tuple[str, ...]:
    """Return the label of a row as text, or a tuple of labels if images can have several."""
    if isinstance(value, list):
        each = [_text(item, where, place) for item in value]
    elif separator:
        each = [part.strip() for part in _text(value, where, place).split(separator)]
    else:
        return _text(value, where, place)
    return tuple(dict.fromkeys(part for part in each if part))


def _text(value: Any, where: str, place: str) -> str:
    """Return a value of the table as text: "" for one that means "missing", and "1" for the float 1.0 in Parquet."""
    if is_missing(value) or value == "-1":
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        raise ValueError(
            f"{where}: {place} holds {value!r} ({type(value).__name__}): use one text or whole number per image"
        )
    return str(value).strip()


def _shown(row: Row) -> str:
    label = (row.label if isinstance(row.label, str) else " and ".join(row.label)) or "none"
    return f"{label} in {row.split}" if row.split else label
