"""Hugging Face datasets as a source: from the hub, from what `save_to_disk` wrote, or from a folder of parquet files.

The pictures stay in Arrow files, of which the system maps what is asked for. No code of a data set's own is ever run:
from version 4 on the library has no way to.

Legend: N images.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moco.data.decode import ImageError, decode_bytes, read_bytes

HELD_OUT = ("test", "validation", "valid", "val")  # looked for in this order


@dataclass(frozen=True, eq=False)
class HubSource:
    """One split of a data set, each picture read when asked for."""

    table: Any  # a datasets.Dataset with the one column `column`, of encoded pictures
    column: str
    split: str
    rows: NDArray[np.int64]  # (N,), which of the table's
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()

    @property
    def images(self) -> None:
        return None

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, i: int) -> Tensor:
        return decode_bytes(self.name(i), self.content(i))

    def content(self, i: int) -> bytes:
        """The bytes of image i's file.

        Raises:
            ImageError: if there are none.
        """
        stored = self.table[int(self.rows[i])][self.column] or {}
        if stored.get("bytes"):
            return bytes(stored["bytes"])
        if stored.get("path"):
            return read_bytes(stored["path"])
        raise ImageError(
            f"cannot read image {self.name(i)}: the row holds no picture", "empty", "no picture in the row"
        )

    def name(self, i: int) -> str:
        return f"{self.split}/{self.rows[i]}"

    def subset(self, rows: NDArray[np.int64]) -> "HubSource":
        """Some of the images, in the order of `rows`."""
        labels = None if self.labels is None else self.labels[rows]
        return replace(self, rows=self.rows[rows], labels=labels)


def open_hub(
    root: str,
    subset: str = "",
    split: str = "train",
    eval_split: str = "",
    image_column: str = "",
    label_column: str = "",
) -> tuple[HubSource, HubSource | None]:
    """The training split of a data set, and a labeled held-out one if it has any.

    Args:
        root: a folder that `save_to_disk` wrote, one of data files (parquet, pictures), or a name on the hub.
        subset: one of the data set's configurations, where it has several.
        split: to train on.
        eval_split: to measure accuracy on; "": the first of test, validation, valid and val that has labels.
        image_column: "": the only one that holds images.
        label_column: "": the only one that holds class labels, if any; "none": no labels.

    Raises:
        FileNotFoundError: if there is no such data set, or it cannot be fetched.
        ValueError: if datasets is not installed, or an argument does not fit the data set.
    """
    every = _load(root, subset)
    train = _open_split(every, root, split, "split", image_column, label_column)
    if eval_split == split:
        raise ValueError(
            f"data.eval_split={eval_split} is data.split too, so accuracy would be measured on training images: name "
            f"another of {', '.join(every)}"
        )
    if train.labels is None and not eval_split:
        return train, None
    for name in [eval_split] if eval_split else [each for each in HELD_OUT if each != split and each in every]:
        held_out = _open_split(every, root, name, "eval_split", image_column, label_column)
        if held_out.labels is None and not eval_split:
            continue
        if held_out.labels is None or held_out.classes != train.classes:
            raise ValueError(
                f"data.eval_split={name}: its classes ({', '.join(held_out.classes[:5]) or 'none'}) are not those of "
                f"{split} ({', '.join(train.classes[:5]) or 'none'}): name another split"
            )
        return train, held_out
    return train, None


def _datasets() -> Any:
    try:
        import datasets  # costs a second, and only this source needs it
    except ImportError as error:
        raise ValueError(
            "data.name=huggingface needs datasets: pip install 'momentum-contrast[huggingface]'"
        ) from error
    return datasets


def _load(root: str, subset: str) -> Mapping[str, Any]:
    """All splits by name."""
    datasets = _datasets()
    folder = Path(root).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            found = datasets.load_from_disk(str(folder))
        elif folder.exists() or os.path.isabs(root) or root.startswith("."):
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder} is no folder")
            found = datasets.load_dataset(str(folder), name=subset or None)
        else:
            found = datasets.load_dataset(root, name=subset or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise FileNotFoundError(
            f"data.root={root} could not be opened as a Hugging Face data set ({said.rstrip('.')}): correct the name "
            "or data.subset, check the network, or name a folder that save_to_disk wrote"
        ) from error
    return found if isinstance(found, Mapping) else {"train": found}


def _open_split(
    every: Mapping[str, Any], root: str, split: str, field: str, image_column: str, label_column: str
) -> HubSource:
    datasets = _datasets()
    if split not in every:
        raise ValueError(f"data.{field}={split}: {root} has the splits {', '.join(every)}")
    table = every[split]
    images = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
    column = _column("image_column", image_column, images, table.column_names, f"{root} ({split})", "images")
    if column not in images:
        raise ValueError(
            f"data.image_column={column}: this column of {root} holds no images" + _or_one_of("image_column", images)
        )
    labels, classes = _labels(table, label_column, f"{root} ({split})")
    # Encoded, as they are: the same decoder as for files, with the same pixels and the same errors.
    encoded = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return HubSource(encoded, column, split, np.arange(len(table)), labels, classes)


def _column(field: str, wanted: str, fitting: Sequence[str], there: Sequence[str], where: str, what: str) -> str:
    """The column that a field names, or the only one that fits."""
    if wanted:
        if wanted not in there:
            raise ValueError(f"data.{field}={wanted}: {where} has the columns {', '.join(there)}")
        return wanted
    if len(fitting) != 1:
        found = f"{len(fitting)} columns with {what} ({', '.join(fitting)})" if fitting else f"no column with {what}"
        raise ValueError(
            f"{where} has {found}: "
            + (f"set data.{field} to one of them" if fitting else f"its columns are {', '.join(there)}")
        )
    return fitting[0]


def _or_one_of(field: str, names: Sequence[str]) -> str:
    return f"; set data.{field} to one of {', '.join(names)}" if names else ""


def _labels(table: Any, wanted: str, where: str) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """Labels (N,) and their names; (None, ()) without a label column, or where it says -1 for unknown throughout.

    Raises:
        ValueError: if there are several and none is named, or some of the rows have no label.
    """
    datasets = _datasets()
    fitting = [name for name, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
    if wanted == "none" or (not wanted and not fitting):
        return None, ()
    column = _column("label_column", wanted, fitting, table.column_names, where, "class labels")
    values = table.with_format("numpy").select_columns([column])[:][column]
    kind = table.features[column]
    if not isinstance(kind, datasets.ClassLabel):  # whole numbers or text: the classes are the values that occur
        names, labels = np.unique(values, return_inverse=True)
        if values.dtype.kind not in "iuUSOT" or len(names) < 2:
            raise ValueError(
                f"data.label_column={column}: this column of {where} holds no classes; set another, or none"
            )
        return labels.astype(np.int64), tuple(str(name) for name in names)
    labels = np.asarray(values, np.int64)
    if (labels < 0).all():  # a test split whose labels are kept back
        return None, ()
    if (labels < 0).any():
        raise ValueError(f"{int((labels < 0).sum())} rows of {where} have no label: set data.label_column=none")
    return labels, tuple(kind.names)
