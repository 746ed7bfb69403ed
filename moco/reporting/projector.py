"""Write the embedding of a report's images for TensorBoard's projector."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moco.config import ConfigError
from moco.evaluation.features import evaluation_view
from moco.reporting.image_map import Map
from moco.reporting.images import ImageFeatures
from moco.reporting.markup import plain_utf8
from moco.reporting.run_record import Run

_IMAGE = 64  # pixels, maximum per side of an image
_SPRITE = 8192  # pixels, TensorBoard's limit for the side of the sprite, which contains all images


def write_projector(run: Run, images: ImageFeatures, drawn: Map | None) -> Path:
    """Write features, names, groups and images to projector/ in the run, and return that directory.

    Raises:
        ConfigError: if a file cannot be written.
    """
    from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

    folder, shown = run.path / "projector", images.shown
    groups = drawn.groups if drawn else {}
    columns = [[shown.name(i) for i in range(len(shown))], *groups.values()]
    rows = [[plain_utf8(cell) for cell in row] for row in zip(*columns, strict=True)]
    side = min(_IMAGE, _SPRITE // int(np.ceil(len(shown) ** 0.5)))
    small = torch.stack([evaluation_view(shown.image(i), 0, side) for i in range(len(shown))])
    features = torch.from_numpy(shown.features)
    metadata: list[Any] = rows if groups else [row[0] for row in rows]
    header = ["name", *groups] if groups else None  # TensorBoard expects no header for a single column
    try:
        shutil.rmtree(folder, ignore_errors=True)  # add_embedding would append to an earlier embedding
        with SummaryWriter(str(folder)) as writer:
            writer.add_embedding(features, metadata, small.float() / 255, run.step, "backbone", header)
        for events in folder.glob("events.out.tfevents.*"):  # TensorBoard would list the folder as a run
            events.unlink()
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}): set projector=false") from error
    return folder
