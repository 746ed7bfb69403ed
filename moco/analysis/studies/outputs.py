"""The outputs of a checkpoint for the images of a study: features and projections of plain and augmented views.

Legend: N images, D feature dimension, C projection dimension, S image size.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from moco.config import AugmentConfig, DataConfig
from moco.data.augment import augment, crop_one
from moco.data.opening import build_views
from moco.data.sources import Source
from moco.data.view import draw, draw_crop
from moco.evaluation.features import EvalTransform, Inference, extract
from moco.interop.encoder_file import EncoderFile, build
from moco.models.encoder import Encoder
from moco.runtime.console import log

BATCH = 256  # images or queries per batch; bounds the memory, does not change results
VOTE_TEMPERATURE = 0.1  # T of the kNN votes: a neighbor's weight is exp(similarity / T); has no effect with k = 1


@dataclass(frozen=True, eq=False)
class Outputs:
    """An encoder in eval mode and its outputs for N images, float32."""

    step: int  # of training
    encoder: Encoder
    features: Tensor  # (N, D), backbone, plain evaluation views
    projection: Tensor  # (N, C)
    view_features: tuple[Tensor, Tensor]  # of two augmented views, each (N, D)


def encode(file: EncoderFile, images: Source, views: list[Tensor], device: torch.device) -> Outputs:
    """Compute the outputs of a checkpoint. `views` are the `augmented_views` of the images."""
    encoder = build(file).to(device)
    features = plain_features(encoder.backbone, images, file, device)
    first, second = (in_parts(encoder.backbone, view) for view in views)
    return Outputs(file.step, encoder, features, in_parts(encoder.head, features), (first, second))


def plain_features(network: nn.Module, source: Source, file: EncoderFile, device: torch.device) -> Tensor:
    """Compute the features (N, D) of the plain evaluation views of a source, in its order."""
    view = file.images
    transform = EvalTransform(view["size"], view["resize"], view["mean"], view["std"])
    return extract(network, source, transform, Inference(device, BATCH))


def augmented_views(source: Source, file: EncoderFile, device: torch.device) -> list[Tensor]:
    """Make two augmented views of each image with the run's own recipe, each (N, channels, S, S).

    The random numbers of a view depend only on the position of its image in `source`, so all runs with one recipe are
    measured on the same views. A training run with seed 0 uses the same random numbers in epoch 0, for the images at
    these positions of its data set.
    """
    made = []
    data = DataConfig(channels=file.channels, dtype=file.config["data"].get("dtype", DataConfig.dtype))
    recipe = AugmentConfig(**file.config["augment"] | {"views": 2, "small_views": 0})
    for stream, view in enumerate(build_views(recipe, data)):
        parts = []
        for start in range(0, len(source), BATCH):
            index = np.arange(start, min(start + BATCH, len(source)))
            uniforms = draw_crop(0, 0, index, stream)
            crops = [crop_one(source.image(int(i)), each, view) for i, each in zip(index, uniforms, strict=True)]
            parts.append(augment(torch.stack(crops).to(device), draw(view, 0, 0, index, stream), view))
        made.append(torch.cat(parts))
    return made


@torch.no_grad()
def in_parts(network: nn.Module, inputs: Tensor) -> Tensor:
    """Compute a network's outputs for `BATCH` inputs at a time, float32."""
    return torch.cat([network(part).float() for part in inputs.split(BATCH)])


def note_several_labels(source: Source) -> None:
    """Log why a study measures no accuracy if its images have several labels each."""
    if source.multi_labels is not None:
        log("images with several labels each: no accuracy is measured here; moco.knn and moco.linear measure the mAP")
