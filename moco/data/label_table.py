"""Statistics of multi-label data sets: images of each label, images without a label, labels that occur together.

Legend: N images, L labels.
"""

from typing import Any

import numpy as np

from moco.data.base import Source
from moco.runtime.console import table

_ROWS_AT_ONCE = 65_536
SHOWN = 20  # labels in the table; the report holds all


def label_facts(source: Source) -> dict[str, Any]:
    """Return plain values about the labels of a source; {} unless its images can have several labels each.

    Returns:
        "images": the number of images with each label; "per_image": the number of images with 0, 1, 2, ... labels;
        "together": for each label, the other label that occurs most often in its images, and in how many of them.
    """
    labels = source.multi_labels
    if labels is None:
        return {}
    both = np.zeros((labels.shape[1], labels.shape[1]), np.int64)  # (L, L), images that have both labels
    for start in range(0, len(labels), _ROWS_AT_ONCE):
        part = labels[start : start + _ROWS_AT_ONCE].astype(np.float32)  # exact, and multiplied by BLAS
        both += (part.T @ part).astype(np.int64)
    images = both.diagonal().copy()  # (L,)
    np.fill_diagonal(both, 0)
    most = both.argmax(axis=1)
    return {
        "images": dict(zip(source.classes, images.tolist(), strict=True)),
        "per_image": np.bincount(labels.sum(axis=1)).tolist(),
        "together": {
            name: [source.classes[most[i]], int(both[i, most[i]])]
            for i, name in enumerate(source.classes)
            if both[i, most[i]]
        },
    }


def show_labels(facts: dict[str, dict[str, Any]]) -> None:
    """Print the result of `label_facts` of each split as one table, the most frequent label first."""
    splits = {name.replace("_", "-"): each for name, each in facts.items() if each}
    if not splits:
        return
    training = next(iter(splits.values()))
    ordered = sorted(training["images"], key=lambda name: -training["images"][name])
    rows = []
    for name in ordered[:SHOWN]:
        other, count = training["together"].get(name, ("", 0))
        share = f"{other}, {100 * count / training['images'][name]:.0f} %" if count else ""
        rows.append([name, *(f"{each['images'][name]:,}" for each in splits.values()), share])
    if more := ordered[SHOWN:]:
        rows.append([f"{len(more):,} more", *("" for _ in splits), ""])
    rows.append(["without a label", *(f"{each['per_image'][0]:,}" for each in splits.values()), ""])
    per_image = [f"{images:,} with {count}" for count, images in enumerate(training["per_image"]) if images]
    table(
        f"{len(ordered):,} labels, several per image",
        ["label", *(f"{name} images" for name in splits), "most often with"],
        rows,
        f"training images by their number of labels: {', '.join(per_image)}\n"
        "most often with: the other label that occurs most often in a label's training images, and in which share",
        left=(0, len(splits) + 1),
    )
