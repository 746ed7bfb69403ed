"""Stage 2 of a view: batched augmentation of the crops, which `moco.data.crop` makes in stage 1.

Each sample has its own parameters and its own order of color operations. All parameters are drawn on the host; see
`moco.data.view`. So the host knows to which samples each operation applies and never waits for the device: it sends
index lists and parameters in two asynchronous copies.

    params = draw(view, seed, epoch, index, stream)
    crops = crop_batch(images, draw_crop(seed, epoch, index, stream), view)    # loader processes call crop_one
    query = augment(crops, params, view)

Hue, saturation and grayscale need red, green and blue: `View` refuses them for other channels. For other channels,
brightness multiplies without a limit, contrast blends each channel with its own mean, and noise is scaled by each
channel's standard deviation in the data set.

The order of operations is that of the official recipes: affine (only recipes for the digits use it), color jitter,
grayscale (before the jitter with gray_first), blur, solarize, flips, quarter turn, noise, steps of plug-ins, normalize,
channel dropout. Deviation: the official pipelines round to 8 bits after each operation, this one stays in float32.

The operations between the affine map and the noise have two forms with the same results: one by one (`moco.data.ops`),
and for RGB on a GPU together in a few launches (`moco.kernels.augment`).

Legend: N samples, n of them in a part, J of these with color jitter, C channels, S x S pixels of a view, D numbers for
the steps of plug-ins.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moco.data import ops
from moco.data.crop import crop_boxes, resized_crop, resized_crops, shrunk_box
from moco.data.pixel_format import DTYPES, to_float
from moco.data.view import STEPS, Params, View
from moco.distributed import copy_to_device
from moco.kernels import fused

_COLOR_OPS = (ops.brightness_, ops.contrast_, ops.saturation_, ops.hue_)  # in the order of Params.factors
_CPU_PART = 2**21  # tensor elements per part on a CPU, so that a part stays in the cache between operations


def crop_batch(images: Tensor, uniforms: NDArray[np.float32], view: View) -> Tensor:
    """Apply stage 1 to a batch of images (N, C, H, W) in memory, with the numbers of `draw_crop` -> (N, C, S, S)."""
    boxes = crop_boxes(uniforms, images.shape[2], images.shape[3], view.crop_scale, view.crop_ratio)
    return resized_crops(images, boxes, view.size, view.antialias)


def crop_one(
    image: Tensor, uniforms: NDArray[np.float32], view: View, full_size: tuple[int, int] | None = None, factor: int = 1
) -> Tensor:
    """Apply stage 1 to one decoded image (C, h, w), with its row of `draw_crop` -> (C, S, S).

    If the image was decoded at 1 / `factor` of its size, `full_size` is the height and width of the full image.
    """
    height, width = full_size or image.shape[1:]
    box = crop_boxes(uniforms.reshape(1, -1), height, width, view.crop_scale, view.crop_ratio)[0]
    return resized_crop(image, shrunk_box(box, factor), view.size, view.antialias)


def largest_shrink(views: Sequence[View], uniforms: Sequence[NDArray[np.float32]], height: int, width: int) -> int:
    """Return the largest factor by which an image may shrink in decoding without any crop being enlarged because of it.

    The factor is 1 if a view is resized without antialiasing: such a view needs single pixels of the full image, while
    decoding at a smaller size averages pixels. An image is decoded once for all of its views. For each view, `uniforms`
    holds the image's row of `draw_crop`.

    Returns:
        1, 2, 4 or 8. Above 1, each crop has at least S pixels per side in the smaller image.
    """
    if not all(view.antialias for view in views):
        return 1
    factor = 8
    for view, each in zip(views, uniforms, strict=True):
        box = crop_boxes(each.reshape(1, -1), height, width, view.crop_scale, view.crop_ratio)[0]
        while factor > 1 and factor * view.size > min(box[2:]):
            factor //= 2
    return factor


def augment(crops: Tensor, params: Params, view: View) -> Tensor:
    """Apply stage 2: change color, blur, flip, turn and normalize a batch of crops.

    Args:
        crops: uint8, uint16 or float32, shape (N, C, S, S), on any device.
        params: the parameters of the same samples in the same order, drawn by `draw` for the same view.
        view: the recipe.

    Returns:
        float32, shape (N, C, S, S), on the device of `crops`.

    Raises:
        ValueError: if shape or type of `crops` does not fit the view and the parameters.
    """
    expected = (len(params), view.channels, view.size, view.size)
    if crops.shape != expected or crops.dtype not in DTYPES.values():
        found, known = f"{crops.dtype} {tuple(crops.shape)}", ", ".join(DTYPES)
        raise ValueError(f"crops is {found}; this view needs {expected} of one of {known}")
    out = torch.empty(expected, dtype=torch.float32, device=crops.device)
    part = max(1, _CPU_PART // (view.channels * view.size**2)) if crops.device.type == "cpu" else len(params)
    for start in range(0, len(params), part):
        rows = slice(start, start + part)
        _augment_part(crops[rows], params.rows(rows), view, out[rows])
    return out


def _augment_part(crops: Tensor, params: Params, view: View, out: Tensor) -> None:
    """Augment one part of the batch; an operation without samples costs nothing."""
    use_kernels = view.rgb and fused(crops.device)
    plan = _send(_plan(params, view, use_kernels), crops.device)
    normalization_follows = not ("noise" in plan or view.steps)
    x = crops if use_kernels and "affine" not in plan else to_float(crops)  # (n, C, S, S)
    _change_(x, plan, "affine", lambda chosen: ops.affine(chosen, plan["theta"]))
    if use_kernels:
        x = _fused(x, params, plan, view, out, normalize=normalization_follows)
    else:
        _one_by_one_(x, params, plan, view)
    if "noise" in plan:
        if view.rgb:
            x.add_(plan["noise"]).clamp_(0, 1)
        else:
            x.add_(plan["noise"] * plan["std"])
    start = 0
    for name, options in view.steps.items():
        step = STEPS[name]
        x = step.function(x, plan["steps"][:, start : start + step.draws], **options)
        start += step.draws
    if not (use_kernels and normalization_follows):
        torch.sub(x, plan["mean"], out=out).div_(plan["std"])
    if "kept" in plan:
        out.mul_(plan["kept"])


def _fused(x: Tensor, params: Params, plan: dict[str, Tensor], view: View, out: Tensor, normalize: bool) -> Tensor:
    """Compute the operations of `_one_by_one_`, and the normalization if it is next, by kernels; return `out`."""
    from moco.kernels import augment as kernels

    kernels.augment(
        x,
        plan["table"],
        out,
        (plan["mean"], plan["std"]) if normalize else None,
        threshold=view.solarize_threshold,
        contrast=view.contrast > 0 and bool(params.jitter.any()),
        blurred=int(params.blur.sum()),
    )
    return out


def _one_by_one_(x: Tensor, params: Params, plan: dict[str, Tensor], view: View) -> None:
    """Apply color operations, blur, solarization, flips and turns in place, each to its samples."""
    if view.gray_first:
        _gray_(x, plan)
    if "jitter" in plan:
        _jitter_(x, params, plan, view)
    if not view.gray_first:
        _gray_(x, plan)
    _change_(x, plan, "blur", lambda chosen: ops.blur(chosen, plan["kernel"]))
    _change_(x, plan, "solarize", lambda chosen: ops.solarize(chosen, view.solarize_threshold))
    _change_(x, plan, "flip", lambda chosen: chosen.flip(3))
    _change_(x, plan, "vertical_flip", lambda chosen: chosen.flip(2))
    for turns in (1, 2, 3):
        _change_(x, plan, f"turn{turns}", partial(torch.rot90, k=turns, dims=(2, 3)))


def _change_(x: Tensor, plan: dict[str, Tensor], name: str, operation: Callable[[Tensor], Tensor]) -> None:
    if name in plan:
        x.index_copy_(0, plan[name], operation(x.index_select(0, plan[name])))


def _gray_(x: Tensor, plan: dict[str, Tensor]) -> None:
    _change_(x, plan, "gray", lambda chosen: ops.grayscale(chosen).expand(-1, 3, -1, -1))


def _jitter_(x: Tensor, params: Params, plan: dict[str, Tensor], view: View) -> None:
    """Apply the color operations, four for RGB and two for other channels, in each sample's own order.

    There are four rounds. In each round the samples are sorted by their next operation, so that an operation works in
    place on one contiguous block. This costs one copy per round.
    """
    strengths = (view.brightness, view.contrast, view.saturation, view.hue)
    order = params.order[params.jitter]  # (J, 4)
    block = x
    for turn in range(4):
        block = block.index_select(0, plan[f"take{turn}"])  # (J, C, S, S)
        factor = plan[f"factor{turn}"]  # (J,), or (J, C) with per_channel
        start = 0
        for operation, count in enumerate(np.bincount(order[:, turn], minlength=4).tolist()):
            stop = start + count
            if count and strengths[operation] > 0:
                chosen = block[start:stop], factor[start:stop]
                if view.rgb:
                    _COLOR_OPS[operation](*chosen)
                elif operation == 0:
                    ops.channel_brightness_(*chosen)
                else:
                    ops.channel_contrast_(*chosen, plan["mean"], plan["std"])
            start = stop
    x.index_copy_(0, plan["jitter"], block)


def _plan(params: Params, view: View, use_kernels: bool = False) -> dict[str, NDArray[Any]]:
    """Return, for each operation, the rows of its samples, int64, and their parameters, float32, by name.

    An operation without samples has no entry. With `use_kernels`, the entry "table" holds the parameters of the
    operations that kernels compute.
    """
    plan: dict[str, NDArray[Any]] = {}
    for name in ("mean", "std"):
        plan[name] = np.asarray(getattr(view, name), dtype=np.float32).reshape(1, -1, 1, 1)
    # The table comes before the arrays of varying size, so that its offset in the copy to the device never changes:
    # Triton would compile a kernel again for another alignment.
    if use_kernels:
        plan["table"] = _table(params, view)
    else:
        plan |= _plan_one_by_one(params, view)
    if params.affine.any():
        plan["affine"] = np.flatnonzero(params.affine)
        plan["theta"] = params.theta[plan["affine"]]
    if params.noise.size:
        plan["noise"] = params.noise[:, None]  # (n, 1, S, S)
    if view.steps:
        plan["steps"] = params.steps  # (n, D)
    if params.dropped.size:
        plan["kept"] = (~params.dropped)[:, :, None, None].astype(np.float32)  # (n, C, 1, 1)
    return plan


def _plan_one_by_one(params: Params, view: View) -> dict[str, NDArray[Any]]:
    """Return the entries of the operations that `_one_by_one_` computes."""
    plan: dict[str, NDArray[Any]] = {}
    names = ("gray", "blur", "solarize", "flip", "vertical_flip", "jitter")
    chosen = {name: getattr(params, name) for name in names}  # each (n,)
    chosen |= {f"turn{turns}": params.turns == turns for turns in (1, 2, 3)}
    for name, mask in chosen.items():
        rows = np.flatnonzero(mask)
        if len(rows):
            plan[name] = rows
    if "blur" in plan:
        plan["kernel"] = _half_kernels(params.sigma[plan["blur"]], view)
    if "jitter" in plan:
        rows = plan["jitter"]
        for turn in range(4):
            by_operation = np.argsort(params.order[rows, turn], kind="stable")
            # The first round selects from the batch, each later round from the block of the previous round.
            plan[f"take{turn}"] = by_operation if turn else rows[by_operation]
            rows = rows[by_operation]
            plan[f"factor{turn}"] = _factors_of(params, rows, params.order[rows, turn])
        plan["jitter"] = rows
    return plan


def _table(params: Params, view: View) -> NDArray[np.float32]:
    """Return a row of parameters per sample for `moco.kernels.augment`, which describes the columns."""
    off = np.array([view.brightness, view.contrast, view.saturation, view.hue]) == 0  # (4,)
    operations = np.where(~params.jitter[:, None] | off[params.order], 4, params.order)  # (n, 4)
    factors = np.take_along_axis(params.factors, params.order, axis=1)  # (n, 4)
    gray = (params.gray & view.gray_first, params.gray & (not view.gray_first))
    flags = (*gray, params.blur, params.solarize, params.flip, params.vertical_flip, params.turns)
    blurred = np.zeros(len(params))
    blurred[: params.blur.sum()] = np.flatnonzero(params.blur)
    columns = [operations, factors, np.stack([*flags, blurred], axis=1), _half_kernels(params.sigma, view)]
    return np.concatenate(columns, axis=1, dtype=np.float32)


def _factors_of(params: Params, rows: NDArray[np.int64], operations: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the factors of one operation per row: (J,), or (J, C) if each channel has its own factor."""
    if not params.channel_factors.size:
        return params.factors[rows, operations]
    return params.channel_factors[rows, :, np.minimum(operations, 1)]  # saturation (2) and hue (3) are not applied


def _half_kernels(sigma: NDArray[np.float32], view: View) -> NDArray[np.float32]:
    """Return Gaussian weights at distances 0 ... r for b sigmas, normalized over -r ... r, shape (b, r + 1).

    r is 3 times the view's highest sigma, rounded up (0.3 % of the weight is beyond), but at most the image side - 1,
    because the border is reflected.
    """
    radius = min(int(np.ceil(3 * view.blur_sigma[1])), view.size - 1)
    kernel = np.exp(-0.5 * (np.arange(radius + 1) / sigma[:, None].astype(np.float64)) ** 2)  # (b, r + 1)
    kernel /= 2 * kernel.sum(axis=1, keepdims=True) - kernel[:, :1]
    return kernel.astype(np.float32)


def _send(plan: dict[str, NDArray[Any]], device: torch.device) -> dict[str, Tensor]:
    """Copy the plan to the device: one copy for all integers and one for all floats."""
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in plan.items()}
    sent: dict[str, Tensor] = {}
    for dtype in (np.int64, np.float32):
        arrays = {name: array for name, array in plan.items() if array.dtype == dtype}
        packed = torch.from_numpy(np.concatenate([array.ravel() for array in arrays.values()] or [np.empty(0, dtype)]))
        parts = torch.split(copy_to_device(packed, device), [array.size for array in arrays.values()])
        sent |= {name: part.view(array.shape) for (name, array), part in zip(arrays.items(), parts, strict=True)}
    return sent
