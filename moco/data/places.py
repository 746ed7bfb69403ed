"""The place of each view in its image: an affine map, computed from the numbers that determine the view.

Crop, affine map, flips and quarter turn of a view are functions of (seed, epoch, sample index, stream) and of the size
of the image. So the cells of two views that show the same part of an image can be computed, without comparing features.
Augmentation steps of plug-ins are ignored: if a step moves pixels, the place is that before the step.

Coordinates are x (to the right) and y (down), as fractions of a side: 0 ... 1 within a view, and within an image.

Legend: N samples, G x G cells of a view, P = G^2.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moco.data.crop import crop_boxes
from moco.data.view import Params, View

Maps = NDArray[np.float64]  # (N, 3, 3), affine maps of (x, y, 1)

_FLIP = np.array([[-1.0, 0, 1], [0, 1, 0], [0, 0, 1]])  # (x, y) -> (1 - x, y)
_VERTICAL_FLIP = np.array([[1.0, 0, 0], [0, -1, 1], [0, 0, 1]])
_TURN = np.array([[0.0, -1, 1], [1, 0, 0], [0, 0, 1]])  # (x, y) -> (1 - y, x): undoes a quarter turn counterclockwise


def places_of(view: View, uniforms: NDArray[np.float32], params: Params, sizes: NDArray[np.int64]) -> Maps:
    """Return the maps from coordinates in one view to coordinates in its image.

    Args:
        view: the recipe.
        uniforms: the random numbers of the crops, (N, CROP_DRAWS), from `draw_crop`.
        params: the parameters of the same samples, from `draw`.
        sizes: heights and widths of the images in pixels, (N, 2).
    """
    height, width = sizes.T
    top, left, box_h, box_w = crop_boxes(uniforms, height, width, view.crop_scale, view.crop_ratio).T
    crop = np.zeros((len(sizes), 3, 3))
    crop[:, 0, 0], crop[:, 0, 2] = box_w / width, left / width
    crop[:, 1, 1], crop[:, 1, 2] = box_h / height, top / height
    crop[:, 2, 2] = 1
    # The last change of the view is the first one to undo.
    flip, vertical_flip = _where(params.flip, _FLIP), _where(params.vertical_flip, _VERTICAL_FLIP)
    turn = np.stack([np.linalg.matrix_power(_TURN, turns) for turns in range(4)])[params.turns]
    maps: Maps = crop @ _affine(params, view.size) @ flip @ vertical_flip @ turn
    return maps


def _where(chosen: NDArray[np.bool_], matrix: NDArray[np.float64]) -> Maps:
    return np.where(chosen[:, None, None], matrix, np.eye(3))


def _affine(params: Params, size: int) -> Maps:
    """Return the maps of `ops.affine`, which go from centered pixels to units of half a side, as maps of fractions."""
    theta = params.theta.astype(np.float64).reshape(-1, 2, 3) / 2  # in sides, from the center
    theta[:, :, :2] *= size
    maps = np.tile(np.eye(3), (len(theta), 1, 1))
    maps[:, :2, :2] = theta[:, :, :2]
    maps[:, :2, 2] = theta[:, :, 2] + 0.5 - 0.5 * theta[:, :, :2].sum(axis=2)
    return np.where(params.affine[:, None, None], maps, np.eye(3))


def matching_cells(query: Tensor, key: Tensor, side: int) -> Tensor:
    """Return, for each cell of the query's view, the cell of the key's view that shows the same place, int64 (N, P).

    The place is the point of the image at the center of the query's cell. The result is -1 if that point lies outside
    of the key's view. Cells are counted row by row.

    Args:
        query, key: the places of two views of the same images, float64 (N, 3, 3).
        side: G.
    """
    middle = (torch.arange(side, dtype=query.dtype, device=query.device) + 0.5) / side  # (G,)
    x, y = middle.repeat(side), middle.repeat_interleave(side)  # (P,) each
    x, y = _mapped(query, x, y)  # (N, P) each, in the image
    x, y = _mapped(_inverse(key), x, y)  # in the key's view
    inside = (x >= 0) & (x < 1) & (y >= 0) & (y < 1)
    cell = (y * side).floor() * side + (x * side).floor()
    return torch.where(inside, cell, -1.0).long()


def _mapped(maps: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Apply maps (N, 3, 3) to x and y, (P,) or (N, P).

    This uses no matrix product, because the rounding of its sums would depend on the size of the batch.
    """
    a, b, c, d, e, f = maps[:, :2].flatten(1)[:, :, None].unbind(1)  # (N, 1) each
    return a * x + b * y + c, d * x + e * y + f


def _inverse(maps: Tensor) -> Tensor:
    """Return the inverse maps, (N, 3, 3)."""
    a, b, c, d, e, f = maps[:, :2].flatten(1).unbind(1)  # (N,) each
    determinant = a * e - b * d
    rows = [e, -b, b * f - c * e, -d, a, c * d - a * f]
    inverse = maps.clone()
    inverse[:, :2] = (torch.stack(rows, dim=1) / determinant[:, None]).view(-1, 2, 3)
    return inverse
