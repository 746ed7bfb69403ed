"""The place of a view, compared with views of images whose pixels hold their own coordinates."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from moco.data.arrays import ArraySource
from moco.data.base import Source
from moco.data.loader import Batch, batches
from moco.data.pixel_format import PixelFormat
from moco.data.places import matching_cells
from moco.data.plan import Plan
from moco.data.view import View

CPU, N, SIDE = torch.device("cpu"), 24, 40  # SIDE: of a view in pixels
CHANGES: dict[str, dict[str, Any]] = {
    "crop": {},
    "flip": {"flip_p": 0.5},
    "vertical flip": {"vertical_flip_p": 0.5},
    "turns": {"quarter_turn_p": 0.75},
    "affine": {"affine_p": 0.7, "degrees": 20.0, "translate": 0.1, "zoom": (0.8, 1.3), "shear": 15.0},
}
CHANGES["all"] = {name: value for change in CHANGES.values() for name, value in change.items()}


class Ramps(Source):
    """Images of several sizes; each pixel holds its x and y as fractions of a side, and 1."""

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        self.sizes = sizes

    labels: None = None
    classes: tuple[str, ...] = ()

    @property
    def pixel_format(self) -> PixelFormat:
        return PixelFormat(3, "float32")

    def __len__(self) -> int:
        return len(self.sizes)

    def image(self, i: int) -> Tensor:
        height, width = self.sizes[i]
        y, x = torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in (height, width)), indexing="ij")
        return torch.stack([x, y, torch.ones_like(x)])

    def name(self, i: int) -> str:
        return str(i)

    def subset(self, rows: NDArray[np.int64]) -> "Ramps":
        return Ramps([self.sizes[i] for i in rows])

    def content_digest(self) -> str:
        return hashlib.sha256(str(self.sizes).encode()).hexdigest()


def recipe(change: str) -> View:
    return View(SIDE, (0.3, 1.0), **CHANGES[change])


def batch_of(source: Source, view: View, workers: int = 0, **options: Any) -> Batch:
    return next(batches(source, Plan(len(source), len(source), 1, seed=3), (view, view), CPU, workers, **options))


def mapped(place: Tensor, x: float, y: float) -> tuple[float, float]:
    """Apply one map (3, 3) to one point."""
    one, other, _ = (place @ torch.tensor([x, y, 1.0], dtype=torch.float64)).tolist()
    return one, other


@pytest.mark.parametrize(("change", "workers"), [*((change, 0) for change in CHANGES), ("all", 2)])
def test_a_view_shows_the_coordinates_that_its_place_gives(change: str, workers: int) -> None:
    sizes = [(60 + 7 * i, 150 - 4 * i) for i in range(N)]
    batch = batch_of(Ramps(sizes), recipe(change), workers, places=True)
    assert batch.places is not None
    assert batch.places.shape == (2, N, 3, 3)
    compared = 0
    for view, places in zip(batch.views, batch.places, strict=True):
        for image, place in zip(view.double(), places, strict=True):
            for row, column in ((8, 8), (8, 31), (20, 13), (31, 20)):  # at the border of a crop, pixels are missing
                if abs(image[2, row, column] - 1) > 1e-6:  # from outside of the crop
                    continue
                compared += 1
                x, y = mapped(place, (column + 0.5) / SIDE, (row + 0.5) / SIDE)
                assert image[0, row, column].item() == pytest.approx(x, abs=2e-3)
                assert image[1, row, column].item() == pytest.approx(y, abs=2e-3)
    assert compared > 2 * N * 3


def test_images_in_memory_have_the_same_places() -> None:
    source = Ramps([(50, 70)] * N)
    resident = ArraySource((torch.stack([source.image(i) for i in range(N)]) * 255).byte(), [str(i) for i in range(N)])
    one, other = (batch_of(each, recipe("all"), places=True).places for each in (source, resident))
    assert one is not None
    assert other is not None
    assert torch.equal(one, other)
    assert batch_of(source, recipe("all")).places is None


def test_matching_cells_equal_the_loops() -> None:
    places = batch_of(Ramps([(50, 70 + i) for i in range(N)]), recipe("all"), places=True).places
    assert places is not None
    side, outside = 5, 0
    found = matching_cells(places[0], places[1], side)
    for i in range(N):
        back = torch.linalg.inv(places[1, i])
        for cell in range(side**2):
            row, column = divmod(cell, side)
            x, y = mapped(back, *mapped(places[0, i], (column + 0.5) / side, (row + 0.5) / side))
            expected = int(y * side) * side + int(x * side) if 0 <= x < 1 and 0 <= y < 1 else -1
            outside += expected < 0
            assert found[i, cell] == expected
    assert 0.05 < outside / found.numel() < 0.9


def test_equal_views_match_each_cell_with_itself_and_mirrored_ones_with_its_mirror_image() -> None:
    same = torch.eye(3, dtype=torch.float64)[None]
    cells = torch.arange(49)[None]
    assert torch.equal(matching_cells(same, same, 7), cells)
    flip = same.clone()
    flip[0, 0] = torch.tensor([-1.0, 0, 1])
    assert torch.equal(matching_cells(same, flip, 7), cells.view(1, 7, 7).flip(2).view(1, 49))
    left, right = same.clone(), same.clone()
    left[0, 0, 0], right[0, 0] = 0.5, torch.tensor([0.5, 0, 0.5])
    assert (matching_cells(left, right, 7) == -1).all()
    rows, columns = torch.arange(8).repeat_interleave(8), torch.arange(8).repeat(8)
    assert torch.equal(matching_cells(left, same, 8)[0], rows * 8 + columns // 2)
