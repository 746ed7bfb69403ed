"""Both crops of one large picture, decoded whole and decoded as small as its crops allow (libjpeg's scaled decoding).

--data is a folder of photographs: some of them are enlarged (bicubic) to several sizes and encoded again. The error is
that of the crops against those of the whole picture, in levels of 255.
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
from scripts.bench.measure import Table, alternate, compared, per_second
from scripts.bench.recipes import views

Shrink = Callable[[list[NDArray[np.float32]]], decode.Shrink]  # from the picture's uniforms


def arguments(parser: ArgumentParser) -> None:
    """What this comparison takes besides the common arguments."""
    parser.add_argument("--sides", type=int, nargs="+", default=[1000, 1500, 2000, 3000, 4000], help="longer side, px")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--quality", type=int, default=90)


def run(options: Namespace) -> Iterator[Table]:
    """A table for each size: pictures a second, and one of the errors."""
    source = load_source(DataConfig("folder", options.data)).train
    assert isinstance(source, FolderSource)
    recipe, errors = views("moco_v2"), []
    decode.SCALED_FROM = 0  # here it is asked where it pays
    ways: dict[str, Shrink] = {
        "whole": lambda uniforms: lambda height, width: 1,
        "as small as the crops allow": lambda uniforms: partial(largest_shrink, recipe, uniforms),
    }
    for side in options.sides:
        files = [_enlarged(path, side, options.quality) for path in islice(_paths(source), options.pictures)]
        work = {name: partial(_cut_all, files, recipe, way) for name, way in ways.items()}
        forms = {name: partial(per_second, len(files), each, options.clock) for name, each in work.items()}
        title = f"Two crops of {len(files)} JPEGs, longer side {side} px, pictures/s, {options.clock} time"
        yield compared(title, alternate(forms, options.rounds), "pictures/s")
        whole, small = (torch.stack(each()).float() for each in work.values())
        error = (whole - small).abs().flatten(1)
        errors.append([f"{side} px", *(f"{x:.2f}" for x in (error.mean(), error.mean(1).max(), _shift(whole)))])
    columns = ["", "mean error", "of the worst crop", "for comparison: the whole's crops moved by one pixel"]
    yield Table("Crops of pictures decoded smaller, levels of 255", columns, errors)


def _paths(source: FolderSource) -> Iterator[str]:
    return (source.path(i) for i in range(len(source)))


def _enlarged(path: str, side: int, quality: int) -> bytes:
    with Image.open(path, formats=IMAGE_FORMATS) as image:
        factor = side / max(image.size)
        size = (round(image.width * factor), round(image.height * factor))
        file = io.BytesIO()
        image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
    return file.getvalue()


def _cut_all(files: list[bytes], recipe: list[View], way: Shrink) -> list[Tensor]:
    """Both crops of each picture, one after the other."""
    cut = []
    for i, data in enumerate(files):
        uniforms = [draw_crop(0, 0, [i], stream)[0] for stream in range(len(recipe))]
        picture = decode.decode_scaled(f"{i}.jpg", data, way(uniforms))
        for view, each in zip(recipe, uniforms, strict=True):
            cut.append(crop_one(picture.pixels, each, view, picture.size, picture.factor))
    return cut


def _shift(crops: Tensor) -> Tensor:
    """What one pixel's shift changes, as a measure of the pictures' sharpness."""
    return (crops[..., 1:] - crops[..., :-1]).abs().mean()
