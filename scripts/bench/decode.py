"""Two crops of a large image, decoded at full size and decoded as small as the crops allow (scaled JPEG decoding).

--data is a folder of photographs. Some of them are enlarged (bicubic) to several sizes and encoded again. The error is
the difference between the crops of both variants, in levels of 255.
"""

import io
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from moco.config import DataConfig
from moco.data import decode
from moco.data.augment import crop_one, largest_shrink
from moco.data.folder import FolderSource
from moco.data.sources import load_source
from moco.data.view import View, draw_crop
from moco.data.walk import IMAGE_FORMATS
from scripts.bench.recipes import views
from scripts.bench.timing import Table, alternate, compared, per_second

ShrinkOfCrops = Callable[[list[NDArray[np.float32]]], decode.Shrink]  # takes the random numbers of an image's crops


def arguments(parser: ArgumentParser) -> None:
    """Add the arguments of this comparison."""
    parser.add_argument("--sides", type=int, nargs="+", default=[1000, 1500, 2000, 3000, 4000], help="longer side, px")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--quality", type=int, default=90)


def run(options: Namespace) -> Iterator[Table]:
    """Yield a table per size (images per second) and a table of the errors."""
    source = load_source(DataConfig("folder", options.data)).train
    assert isinstance(source, FolderSource)
    recipe, errors = views("moco_v2"), []
    decode.SCALED_FROM = 0  # smaller images too: this benchmark shows from which size on scaled decoding is faster
    ways: dict[str, ShrinkOfCrops] = {
        "full size": lambda uniforms: lambda height, width: 1,
        "as small as the crops allow": lambda uniforms: partial(largest_shrink, recipe, uniforms),
    }
    for side in options.sides:
        files = [_enlarged(path, side, options.quality) for path in islice(_paths(source), options.images)]
        work = {name: partial(_crop_all, files, recipe, way) for name, way in ways.items()}
        variants = {name: partial(per_second, len(files), each, options.clock) for name, each in work.items()}
        title = f"Two crops of {len(files)} JPEGs, longer side {side} px, images/s, {options.clock} time"
        yield compared(title, alternate(variants, options.rounds), "images/s")
        full, small = (torch.stack(each()).float() for each in work.values())
        error = (full - small).abs().flatten(1)
        errors.append([f"{side} px", *(f"{x:.2f}" for x in (error.mean(), error.mean(1).max(), _shift(full)))])
    columns = ["", "mean error", "mean error of the worst crop", "for comparison: full-size crops shifted by one pixel"]
    yield Table("Crops of images decoded at a smaller size, levels of 255", columns, errors)


def _paths(source: FolderSource) -> Iterator[str]:
    return (source.path(i) for i in range(len(source)))


def _enlarged(path: str, side: int, quality: int) -> bytes:
    with Image.open(path, formats=IMAGE_FORMATS) as image:
        factor = side / max(image.size)
        size = (round(image.width * factor), round(image.height * factor))
        file = io.BytesIO()
        image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
    return file.getvalue()


def _crop_all(files: list[bytes], recipe: list[View], way: ShrinkOfCrops) -> list[Tensor]:
    """Crop each image twice."""
    cropped = []
    for i, data in enumerate(files):
        uniforms = [draw_crop(0, 0, [i], stream)[0] for stream in range(len(recipe))]
        image = decode.decode_scaled(f"{i}.jpg", data, way(uniforms))
        for view, each in zip(recipe, uniforms, strict=True):
            cropped.append(crop_one(image.pixels, each, view, image.size, image.factor))
    return cropped


def _shift(crops: Tensor) -> Tensor:
    """Measure the sharpness of the images as the difference that a shift by one pixel makes."""
    return (crops[..., 1:] - crops[..., :-1]).abs().mean()
