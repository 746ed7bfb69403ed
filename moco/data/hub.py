"""Hugging Face data sets: from the hub, from a folder that `save_to_disk` wrote, or from a folder of parquet files.

The images stay in memory-mapped Arrow files. No code of a data set is ever run: the library `datasets` cannot do so
from version 4 on.

Legend: N images, L classes.
"""

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moco.config import DataConfig
from moco.config.base import optional_module
from moco.data.bands import encode_bands
from moco.data.base import Source, Sources, entries_digest, labeled, labels_at
from moco.data.decode import ImageError, decode_bytes, read_bytes
from moco.data.labels import HELD_OUT, read_label_sets, read_labels
from moco.data.pixel_format import RGB, PixelFormat
from moco.data.walk import size_and_time
from moco.runtime.retries import quiet_retries


@dataclass(frozen=True, eq=False)
class HubSource(Source):
    """One split of a data set, each image read on request."""

    table: Any  # a datasets.Dataset with the one column `column`
    column: str
    split: str
    rows: NDArray[np.int64]  # (N,), rows of the table
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    pixel_format: PixelFormat = RGB
    encoded: bool = True  # whether the column holds image files, not arrays
    multi_labels: NDArray[np.bool_] | None = None  # see `Source`

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, i: int) -> Tensor:
        return decode_bytes(self.name(i), self.content(i), self.pixel_format)

    def name(self, i: int) -> str:
        return f"{self.split}/{self.rows[i]}"

    def content(self, i: int) -> bytes:
        stored = self.table[int(self.rows[i])][self.column]
        if not self.encoded and stored is not None:
            return encode_bands(torch.from_numpy(np.array(stored)))
        stored = stored or {}
        if stored.get("bytes"):
            return bytes(stored["bytes"])
        if stored.get("path"):
            return read_bytes(stored["path"])
        raise ImageError(f"cannot read image {self.name(i)}: the row has no image", "empty", "the row has no image")

    def subset(self, rows: NDArray[np.int64]) -> "HubSource":
        labels, several = labels_at(self.labels, rows), labels_at(self.multi_labels, rows)
        return replace(self, rows=self.rows[rows], labels=labels, multi_labels=several)

    def content_fingerprints(self) -> NDArray[np.int64]:
        """Return the size of each image in bytes, which Arrow's offsets give without reading the image.

        For a column of arrays, return 0 for each image: `moco.data.duplicates` then compares the pixels of all images.
        """
        if not self.encoded:
            return np.zeros(len(self), np.int64)
        pc = importlib.import_module("pyarrow.compute")
        sizes: list[int] = []
        for part in self.table.with_format("arrow").iter(batch_size=1000):
            stored = part[self.column].combine_chunks()
            within = pc.binary_length(pc.struct_field(stored, "bytes")).to_pylist()
            paths = pc.struct_field(stored, "path").to_pylist()
            sizes += [size or size_and_time(path or "")[0] for size, path in zip(within, paths, strict=True)]
        own = np.array(sizes, np.int64)[self.rows]
        return np.where(own > 0, own, super().content_fingerprints())

    def content_digest(self) -> str:
        # datasets' own hash of the table and of all operations on it. For a folder of parquet files it contains their
        # paths, so the digest changes if the folder is moved.
        return entries_digest(
            ([self.name(i)] for i in range(len(self))), str(self.table._fingerprint), self.pixel_format
        )


def open_hub(config: DataConfig) -> Sources:
    """Open the training split of a data set, and a labeled held-out split if there is one.

    Raises:
        FileNotFoundError, ValueError: if the data set cannot be opened, or a configured split or column does not fit.
    """
    split, eval_split = config.split, config.eval_split
    splits = _load(config.root, config.subset)
    train = _open_split(splits, config, "split", split)
    if eval_split == split:
        raise ValueError(
            f"data.eval_split={eval_split} equals data.split, so accuracy would be measured on training images: set "
            f"another of {', '.join(splits)}"
        )
    usual = [each for each in HELD_OUT if each != split and each in splits] if train.classes else []
    for name in [eval_split] if eval_split else usual:
        held_out = _open_split(splits, config, "eval_split", name)
        if not held_out.classes and not eval_split:
            continue
        if not (held_out.classes and train.classes):
            unlabeled = split if held_out.classes else name
            raise ValueError(f"data.eval_split={name}: {unlabeled} has no labels: leave data.eval_split empty")
        return labeled(train, held_out, f"data.eval_split={name}")
    return labeled(train)


def _load(root: str, subset: str) -> Mapping[str, Any]:
    """Return all splits by name."""
    datasets = optional_module("datasets", "data.name=huggingface", "huggingface")  # the import takes a second
    folder = Path(root).expanduser()
    is_path = folder.exists() or os.path.isabs(root) or root.startswith(".")
    try:
        if is_path and not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder")
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            found = datasets.load_from_disk(str(folder))
        else:
            with quiet_retries():
                found = datasets.load_dataset(str(folder) if is_path else root, name=subset or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise FileNotFoundError(
            f"data.root={root} could not be opened as a Hugging Face data set ({reason.rstrip('.')}): correct the name "
            "or data.subset, check the connection, or set a folder that save_to_disk wrote"
        ) from error
    return found if isinstance(found, Mapping) else {"train": found}


def _open_split(splits: Mapping[str, Any], config: DataConfig, field: str, split: str) -> HubSource:
    import datasets

    if split not in splits:
        raise ValueError(f"data.{field}={split}: {config.root} has the splits {', '.join(splits)}: set one of them")
    table, where = splits[split], f"{config.root} ({split})"
    arrays = [name for name, kind in table.features.items() if isinstance(kind, datasets.Array2D | datasets.Array3D)]
    images = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
    if (config.channels, config.dtype) != (RGB.channels, RGB.dtype):
        images += arrays
    column = _column("image_column", config.image_column, images, table.column_names, where, "images")
    if column not in images:
        fix = f"; set data.image_column to one of {', '.join(images)}" if images else ""
        raise ValueError(f"data.image_column={column}: this column of {config.root} contains no images{fix}")
    # A held-out split with labels may hold images of a single class.
    labels, classes = _labels(table, config.label_column, where, min_classes=2 if field == "split" else 1)
    several = labels is not None and labels.ndim == 2
    known: dict[str, Any] = {"classes": classes, "multi_labels" if several else "labels": labels}
    chosen, rows = table.select_columns([column]), np.arange(len(table))
    if column in arrays:
        numbers = chosen.with_format("numpy", dtype=np.dtype(table.features[column].dtype))  # as they are stored
        return HubSource(numbers, column, split, rows, encoded=False, **known)
    # `datasets` must not decode: `decode_bytes` does, so that pixels and errors are the same as for image files.
    return HubSource(chosen.cast_column(column, datasets.Image(decode=False)), column, split, rows, **known)


def _column(field: str, requested: str, fitting: Sequence[str], present: Sequence[str], where: str, what: str) -> str:
    """Return the column that a field names, or the only one that fits."""
    if requested:
        if requested not in present:
            raise ValueError(f"data.{field}={requested}: {where} has the columns {', '.join(present)}: set one of them")
        return requested
    if len(fitting) > 1:
        raise ValueError(
            f"{where} has {len(fitting)} columns with {what} ({', '.join(fitting)}): set data.{field} to one of them"
        )
    if not fitting:
        raise ValueError(
            f"{where} has no column with {what}: its columns are {', '.join(present)}; cast one to datasets.Image"
        )
    return fitting[0]


def _labels(
    table: Any, given: str, where: str, min_classes: int = 2
) -> tuple[NDArray[np.int64] | NDArray[np.bool_] | None, tuple[str, ...]]:
    """Return labels (N,), or multi_labels (N, L) for a column of lists, and class names; (None, ()) if unlabeled."""
    import datasets

    features = table.features
    kinds = {name: _element(kind) for name, kind in features.items()}  # for a column of lists, the type of the elements
    classes = [name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    # Columns with one class per image; if there are none, columns of lists.
    fitting = [name for name in classes if kinds[name] is features[name]] or classes
    if given == "none" or (not given and not fitting):
        return None, ()
    column = _column("label_column", given, fitting, table.column_names, where, "class labels")
    field, fix = f"data.label_column={column} of {where}", "set data.label_column to another column or to none"
    kind = kinds[column]
    if not isinstance(kind, datasets.ClassLabel | datasets.Value):  # the values are not read: they may be images
        raise ValueError(f"{field}: this column contains no classes; {fix}")
    values = table.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    names = kind.names if isinstance(kind, datasets.ClassLabel) else ()
    if kind is not features[column]:
        return read_label_sets(values, field, fix, names)
    return read_labels(values, field, fix, names, min_classes)


def _element(kind: Any) -> Any:
    """Return the type of the elements if a column holds lists; otherwise the type of the column."""
    import datasets

    if isinstance(kind, datasets.List | datasets.LargeList):
        return kind.feature
    return kind[0] if isinstance(kind, list) and kind else kind
