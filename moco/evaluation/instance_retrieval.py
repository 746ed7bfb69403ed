"""Instance retrieval, a measure of features that needs no labels.

Each image is cropped twice at random. Each crop of the first set is compared with all crops of the second, and vice
versa. The retrieval at 1 is the share of crops whose most similar crop shows their own image, or a byte-identical copy
of it; chance is 1 / M without copies. The two crops differ in position, size and mirroring, not in color, so that raw
pixels are a fair baseline.

Legend: M images, D feature dimension, S image size.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.data.base import Source
from moco.data.duplicates import content_groups
from moco.data.loader import Batch, batches
from moco.data.pixel_format import per_channel
from moco.data.plan import Plan
from moco.data.unreadable import OnUnreadable
from moco.data.view import View
from moco.distributed import gather, rank, world_size
from moco.evaluation.features import EvalTransform, Inference, Network, pixels
from moco.evaluation.knn_classifier import Accuracy
from moco.models.modes import evaluating
from moco.runtime.device import float64_device
from moco.runtime.precision import autocast

MOST_IMAGES = 1024  # enough for a standard error of 1.6 points; more images only cost time
SEED = 0  # of the choice of the images and of their crops
CROP_SCALE = (0.2, 1.0)  # area of a crop, as a fraction of the image's, as in MoCo


def retrieval_at_1(first: Tensor, second: Tensor, groups: Tensor) -> Accuracy:
    """Return the share of crops that find the other crop of their image, in percent, over both directions.

    The spread is the standard error over the images, each with both of its directions.

    Args:
        first, second: features (M, D) of two crops of the same M images. Their similarity is the cosine. Of equal
            similarities the first one counts, so constant features have a retrieval of 1 / M.
        groups: numbers of the images (M,). Those with the same number are copies: the crop of any of them is right.
    """
    similarity = F.normalize(first.double(), dim=1) @ F.normalize(second.double(), dim=1).T  # (M, M)
    right = [(groups[each.argmax(dim=1)] == groups).double() for each in (similarity, similarity.T)]
    found = 50 * (right[0] + right[1])  # (M,)
    count = len(found)
    error = float(found.std()) / count**0.5 if count > 1 else 0.0
    return Accuracy(float(found.mean()), error, count)


def instance_retrieval(
    networks: Mapping[str, Network],
    source: Source,
    transform: EvalTransform,
    inference: Inference,
    on_unreadable: OnUnreadable | None = None,
    heartbeat: Callable[[], None] = lambda: None,
) -> dict[str, Accuracy]:
    """Return the retrieval at 1 of several networks, in percent, by their names. Collective.

    Uses the first images of a random order, as many as `images_used` returns. All networks see the same crops.

    Args:
        networks: modules, which are put into eval mode for the measurement; `pixels` for raw pixels.
        transform: its size, mean and std are those of the crops; `pixels` gets crops that are not normalized.
        inference: its batch size is that of all processes together.
        on_unreadable: see `moco.data.loader.batches`.
        heartbeat: called before each batch.
    """
    features: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in networks}
    rows: list[Tensor] = []
    modules = [network for network in networks.values() if isinstance(network, nn.Module)]
    device, batch_size = inference.device, inference.batch_size
    mean, std = (per_channel(each, device) for each in (transform.mean, transform.std))
    result_device = float64_device(device)
    with ExitStack() as modes:
        for module in modules:
            modes.enter_context(evaluating(module))
        for batch in _crop_pairs(source, transform.size, device, batch_size, inference.workers, on_unreadable):
            heartbeat()
            rows.append(batch.index.to(result_device))
            for name, network in networks.items():
                for images, out in zip(batch.views, features[name], strict=True):
                    with torch.no_grad(), autocast(device, inference.precision):
                        output = network(images if network is pixels else (images - mean) / std)
                    out.append(output.float().to(result_device))
    # `gather` returns rows and features of all ranks in the same order.
    groups = _content_groups(source, gather(torch.cat(rows)), heartbeat)
    found = {}
    for name, crops in features.items():
        first, second = (gather(torch.cat(parts)) for parts in crops)
        found[name] = retrieval_at_1(first, second, groups)
    return found


def _content_groups(source: Source, rows: Tensor, heartbeat: Callable[[], None]) -> Tensor:
    """Return a number per image of `rows`, (M,): equal for the same image and for copies of it. Collective."""
    if source.stream is not None:  # its images cannot be read again
        return rows
    different, places = rows.unique(return_inverse=True)
    subset = source.subset(different.cpu().numpy())
    return torch.from_numpy(content_groups(subset, lambda *_: heartbeat())).to(rows.device)[places]


def images_used(length: int, batch_size: int) -> int:
    """Return M, a multiple of the batch size, for a source of `length` images.

    M is at most `MOST_IMAGES`, unless a single batch is larger.
    """
    return min(length // batch_size, max(1, MOST_IMAGES // batch_size)) * batch_size


def _crop_pairs(
    source: Source,
    size: int,
    device: torch.device,
    batch_size: int,
    workers: int | None,
    on_unreadable: OnUnreadable | None,
) -> Iterator[Batch]:
    """Yield this rank's batches: two crops of each image, 2 of (n, C, S, S), not normalized."""
    plan = Plan(len(source), batch_size, 1, SEED, rank(), world_size())
    zeros, ones = (0.0,) * source.pixel_format.channels, (1.0,) * source.pixel_format.channels
    view = View(size, crop_scale=CROP_SCALE, flip_p=0.5, mean=zeros, std=ones)
    count = images_used(len(source), batch_size) // batch_size
    with closing(batches(source, plan, (view, view), device, workers, on_unreadable=on_unreadable)) as stream:
        yield from islice(stream, count)
