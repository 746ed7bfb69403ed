"""The table of moco.embed: one line for each row of the features, with its image and the classes of the image.

The columns are row (in the features), id (in the source) and path. Labeled images also have label (an index) and class
(its name). If images can have several labels each, the columns labels and classes replace label and class. In Parquet,
labels and classes hold lists. In CSV they hold strings whose parts are separated by data.label_separator, or by a
semicolon if that field is empty.
"""

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from moco.config.base import optional_module, require
from moco.data.base import Source, classes_of
from moco.files import atomic_write, write_csv

_SEPARATOR = ";"  # in CSV, if data.label_separator is empty
_ROWS_AT_ONCE = 65_536  # rows of a table in memory


def check_table(source: Source, table: str, separator: str) -> None:
    """Refuse a table that cannot be written; call it before the features are computed.

    Args:
        source: the images.
        table: "csv" or "parquet".
        separator: data.label_separator.

    Raises:
        ConfigError: for "parquet" if pyarrow is not installed; for "csv" if images can have several labels and the name
            of a class contains the separator.
    """
    if table == "parquet":
        pyarrow()
    elif source.multi_labels is not None:
        used = separator or _SEPARATOR
        name = next((each for each in source.classes if used in each), None)
        problem = f"table=csv separates the classes of an image by {used!r}, and the class {name!r} contains it"
        require(name is None, f"{problem}: set table=parquet")


def write_table(folder: Path, source: Source, ids: Sequence[int], table: str, separator: str) -> None:
    """Write index.csv or index.parquet for the images `ids` of a source, in this order; see `check_table`."""
    several = source.multi_labels is not None
    names = ["labels", "classes"] if several else ["label", "class"] if source.labels is not None else []
    columns, lines = ["row", "id", "path", *names], _lines(source, ids)
    path = folder / f"index.{table}"
    if table == "parquet":
        _write_parquet(path, columns, lines)
    else:
        write_csv(path, columns, _joined(lines, separator or _SEPARATOR) if several else lines)


def _lines(source: Source, ids: Sequence[int]) -> Iterator[list[Any]]:
    """Yield the values of each line; if images can have several labels, the last two values are lists."""
    for row, i in enumerate(ids):
        line: list[Any] = [row, i, source.name(i)]
        classes = classes_of(source, i)
        if classes is not None:
            names = [source.classes[each] for each in classes]
            line += [classes, names] if source.multi_labels is not None else [classes[0], names[0]]
        yield line


def _joined(lines: Iterator[list[Any]], separator: str) -> Iterator[list[Any]]:
    for *image, labels, classes in lines:
        yield [*image, separator.join(map(str, labels)), separator.join(classes)]


def _write_parquet(path: Path, columns: Sequence[str], lines: Iterator[Sequence[Any]]) -> None:
    arrow, parquet = pyarrow(), pyarrow("pyarrow.parquet")
    kinds = {"path": arrow.string(), "class": arrow.string()}
    kinds |= {"labels": arrow.list_(arrow.int64()), "classes": arrow.list_(arrow.string())}
    schema = arrow.schema([(name, kinds.get(name, arrow.int64())) for name in columns])
    with atomic_write(path) as temporary, parquet.ParquetWriter(str(temporary), schema) as writer:
        while part := list(islice(lines, _ROWS_AT_ONCE)):
            values = {name: list(column) for name, column in zip(columns, zip(*part, strict=True), strict=True)}
            # Parquet's strings are UTF-8: other bytes of a path or class are written as escapes.
            for name in {"path", "class"} & values.keys():
                values[name] = [os.fsencode(each).decode("utf-8", "backslashreplace") for each in values[name]]
            writer.write_table(arrow.table(list(values.values()), schema=schema))


def pyarrow(module: str = "pyarrow") -> Any:
    """Return pyarrow or a module of it; raise ConfigError if it is not installed."""
    return optional_module(module, "table=parquet", "parquet", ", or set table=csv")
