"""The recipe of a view, and its random parameters: on the host, NumPy only.

Each parameter is a function of (seed, epoch, sample index, stream, draw number); see `moco.data.keyed`.

Legend: N samples, C channels, S x S pixels of a view, D numbers for the steps of plug-ins, P = S * S / 2 rounded up.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moco.data import keyed
from moco.data.crop import CROP_DRAWS
from moco.data.keyed import keyed_uniform
from moco.plugins import Registry, check_options

# Draw numbers. Never change them: a new operation uses free numbers, so that existing recipes give the same views.
# The first CROP_DRAWS numbers are the crop's.
_JITTER, _FACTORS, _ORDER = 24, slice(25, 29), slice(29, 33)
_GRAY, _BLUR, _SIGMA, _SOLARIZE, _FLIP = 33, 34, 35, 36, 37
_AFFINE, _ANGLE, _SHIFT, _ZOOM, _SHEAR, _NOISE = 38, 39, slice(40, 42), 42, 43, 44
_VERTICAL_FLIP, _QUARTER_TURN, _TURNS = 45, 46, 47
_DRAWS = 48
_PIXELS = 64  # the first draw number of the pixel noise; no other operation has higher numbers
# In the stream CHANNELS, the draws of channel c start at _PER_CHANNEL * c: one for the dropout of the channel, then the
# factors of brightness and contrast.
_PER_CHANNEL = 4
# The operations that are defined by red, green and blue.
_NEED_RGB = ("saturation", "hue", "gray_p")

# Bounds of the fields of a view. A probability (NAME_p) is at most 1.
_HIGHEST = {"brightness": math.inf, "contrast": math.inf, "saturation": math.inf, "hue": 0.5}
_HIGHEST |= {"solarize_threshold": 1, "degrees": 180, "translate": 1, "shear": 89}
_RANGES: dict[str, tuple[float, float]] = {"crop_scale": (1e-6, 1), "noise": (0.0, 1.0)}
_RANGES |= dict.fromkeys(("crop_ratio", "blur_sigma", "zoom"), (1e-6, math.inf))


class Step(NamedTuple):
    """An augmentation step of a plug-in: a function of a batch, and how many random numbers it needs per sample.

    The function takes two tensors on the same device: images (N, C, S, S), float32, and uniform numbers in [0, 1),
    (N, draws). Its options are keyword arguments. It returns the changed images, of the same shape. All of its
    randomness must come from the given numbers. The values of RGB images lie in 0 ... 1 if data.dtype is uint8 or
    uint16; in all other cases, values can lie outside.
    """

    function: Callable[..., Any]
    draws: int = 0


STEPS: Registry[Step] = Registry("augment.steps", {})


@dataclasses.dataclass(frozen=True)
class View:
    """The recipe of one view of an image.

    The defaults resize the complete image, or the center of an image whose width / height is outside of `crop_ratio`.
    The images have as many channels as `mean` has numbers. Three channels are red, green and blue.
    """

    size: int
    """Side of the view in pixels."""
    crop_scale: tuple[float, float] = (1.0, 1.0)
    """Lowest and highest area of the crop, as a fraction of the image's area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Lowest and highest width / height of the crop."""
    antialias: bool = True
    """Resize the crop with antialiasing; false: by plain interpolation, as torchvision's antialias=False. Then
    downscaled images are aliased, and large JPEGs are decoded in full size."""
    jitter_p: float = 0.0
    """Probability of the color jitter: brightness, contrast, saturation and hue, in random order."""
    brightness: float = 0.0
    """Strength of the brightness jitter: pixels are multiplied by a factor that is uniform in 1 - brightness (at least
    0) ... 1 + brightness."""
    contrast: float = 0.0
    """Strength of the contrast jitter: a factor, drawn as for brightness, multiplies the difference between each pixel
    and the view's mean gray. For other channels than RGB, the difference is to the view's mean of the pixel's
    channel."""
    saturation: float = 0.0
    """Strength of the saturation jitter: a factor, drawn as for brightness, multiplies the difference between each
    pixel and its own gray value."""
    hue: float = 0.0
    """Strength of the hue jitter: the hue is rotated by an angle that is uniform in -hue ... hue, as a fraction of the
    circle."""
    per_channel: bool = False
    """For other channels than RGB: draw the factors of brightness and contrast separately for each channel."""
    gray_p: float = 0.0
    """Probability that a view is converted to grayscale."""
    gray_first: bool = False
    """Convert to grayscale before the color jitter, as in MoCo v1; false: after it."""
    blur_p: float = 0.0
    """Probability of the Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Lowest and highest standard deviation of the blur in pixels. The kernel's radius is 3 times the higher one."""
    solarize_p: float = 0.0
    """Probability of solarization: values of at least solarize_threshold are inverted."""
    solarize_threshold: float = 0.5
    """The threshold of solarization, for images in 0 ... 1."""
    flip_p: float = 0.0
    """Probability of the horizontal flip."""
    vertical_flip_p: float = 0.0
    """Probability of the vertical flip."""
    quarter_turn_p: float = 0.0
    """Probability of a rotation by a random one of 90, 180 and 270 degrees; 0.75: all orientations equally likely."""
    affine_p: float = 0.0
    """Probability of the affine map: rotation, shift, zoom and shear, together."""
    degrees: float = 0.0
    """For the affine map: the rotation is uniform in -degrees ... degrees."""
    translate: float = 0.0
    """For the affine map: the shift along each axis, as a fraction of the side, is uniform in -translate ... translate
    and rounded to pixels."""
    zoom: tuple[float, float] = (1.0, 1.0)
    """For the affine map: lowest and highest factor of magnification."""
    shear: float = 0.0
    """For the affine map: the horizontal shear is uniform in -shear ... shear degrees."""
    noise: tuple[float, float] = (0.0, 0.0)
    """Lowest and highest standard deviation of Gaussian noise, for images in 0 ... 1. The noise of a pixel is the same
    for all channels; for other channels than RGB, this noise is multiplied by the std of each channel."""
    steps: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Augmentation steps of plug-ins, with their options. They are applied in the given order, after all other steps
    except normalization and channel dropout. Set an option by +augment.steps.NAME.OPTION=VALUE; to use a step with its
    default options, set +augment.steps.NAME={}."""
    channel_dropout_p: float = 0.0
    """Probability, for each channel, of replacing all its pixels by its value in `mean`. At least one channel of a view
    is kept."""
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    """Mean of each channel, subtracted after all other steps from the pixels, which are in 0 ... 1 unless
    data.dtype=float32."""
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    """Standard deviation of each channel, by which pixels are divided after the mean is subtracted."""

    def __post_init__(self) -> None:
        """Raise a ValueError that names the field, its value and the accepted range, if a value is invalid."""
        if self.size < 1:
            raise ValueError(f"size={self.size} must be at least 1 pixel")
        for name in ("antialias", "gray_first", "per_channel"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)} must be true or false")
        for name in (*_HIGHEST, *(each.name for each in dataclasses.fields(self) if each.name.endswith("_p"))):
            value, high = getattr(self, name), _HIGHEST.get(name, 1)
            if not (0 <= value <= high and math.isfinite(value)):
                raise ValueError(f"{name}={value} must lie in 0 ... {high}")
        for name, options in self.steps.items():
            check_options(f"augment.steps.{name}", STEPS.find(name).function, options, arguments=2)
        for name, (low, high) in _RANGES.items():
            values = getattr(self, name)
            if len(values) != 2 or not (low <= values[0] <= values[1] <= high and math.isfinite(values[1])):
                raise ValueError(f"{name}={values} must be (lowest, highest) within {low} ... {high}")
        self._check_channels()

    def _check_channels(self) -> None:
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(f"mean={self.mean} must hold one number for each channel, as many as std={self.std}")
        if not all(map(math.isfinite, self.mean)):
            raise ValueError(f"mean={self.mean} must be finite numbers")
        if not all(0 < value < math.inf for value in self.std):
            raise ValueError(f"std={self.std} must be finite numbers above 0")
        if self.rgb and self.per_channel:
            raise ValueError(
                "per_channel=True is only for images that are not RGB: set it to false, and use hue and saturation"
            )
        needing = [] if self.rgb else [name for name in _NEED_RGB if getattr(self, name) > 0]
        if needing:
            values = " and ".join(f"{name}={getattr(self, name)}" for name in needing)
            raise ValueError(
                f"{values} need{'s' * (len(needing) == 1)} red, green and blue, but the images have {self.channels} "
                f"channel{'s' * (self.channels > 1)}: set {'them' if len(needing) > 1 else 'it'} to 0, as "
                "augment=multispectral and augment=grayscale do"
            )
        if self.channels == 1 and self.channel_dropout_p > 0:
            needs = "needs several channels: set it to 0, as augment=grayscale does"
            raise ValueError(f"channel_dropout_p={self.channel_dropout_p} {needs}")

    @property
    def channels(self) -> int:
        """The number of channels of the images."""
        return len(self.mean)

    @property
    def brightness_shift(self) -> float:
        """The most that `brightness` moves the mean of any channel, in standard deviations of the data set."""
        return max(self.brightness * abs(mean) / std for mean, std in zip(self.mean, self.std, strict=True))

    @property
    def rgb(self) -> bool:
        """Whether the channels are red, green and blue."""
        return self.channels == 3


@dataclasses.dataclass(frozen=True)
class Params:
    """The random parameters of a batch, on the host. A row depends on its sample and the view, not on the batch."""

    jitter: NDArray[np.bool_]  # (N,)
    factors: NDArray[np.float32]  # (N, 4): brightness, contrast, saturation, hue
    order: NDArray[np.int64]  # (N, 4): the order of the four operations
    gray: NDArray[np.bool_]  # (N,)
    blur: NDArray[np.bool_]  # (N,)
    sigma: NDArray[np.float32]  # (N,), pixels
    solarize: NDArray[np.bool_]  # (N,)
    flip: NDArray[np.bool_]  # (N,)
    vertical_flip: NDArray[np.bool_]  # (N,)
    turns: NDArray[np.int64]  # (N,), quarter turns counterclockwise, 0 ... 3
    affine: NDArray[np.bool_]  # (N,)
    theta: NDArray[np.float32]  # (N, 6), see ops.affine
    noise: NDArray[np.float32]  # (N, S, S); (N, 0, 0) if the view has none
    steps: NDArray[np.float32]  # (N, D), uniform numbers of all steps of plug-ins together
    channel_factors: NDArray[np.float32]  # (N, C, 2): brightness, contrast; (N, 0, 2) without view.per_channel
    dropped: NDArray[np.bool_]  # (N, C), the channels to replace by their mean; (N, 0) if the view drops none

    def __len__(self) -> int:
        return len(self.jitter)

    def rows(self, rows: slice | NDArray[np.int64]) -> "Params":
        """Return the parameters of some of the samples."""
        return Params(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


def draw_crop(seed: int, epoch: int, index: ArrayLike, stream: int) -> NDArray[np.float32]:
    """Return the uniform numbers of the crop, shape (N, CROP_DRAWS), for `crop_boxes`."""
    return keyed_uniform(seed, epoch, index, stream, CROP_DRAWS)


def draw(view: View, seed: int, epoch: int, index: ArrayLike, stream: int) -> Params:
    """Draw the random parameters of view number `stream`, except the crop's, for the samples `index`, shape (N,).

    The parameters have the same distribution as those of torchvision's transforms.
    """
    noisy = view.noise[1] > 0
    u = keyed_uniform(seed, epoch, index, stream, _PIXELS + view.size**2 + 1 if noisy else _DRAWS).astype(np.float64)
    step_draws = sum(STEPS[name].draws for name in view.steps)
    strengths = np.array([view.brightness, view.contrast, view.saturation, view.hue])
    center = np.array([1.0, 1.0, 1.0, 0.0])
    low = np.where(center > 0, np.maximum(center - strengths, 0), -strengths)  # a factor is never negative
    u_channels = _channel_uniforms(view, seed, epoch, index, stream)  # (N, C, 4)
    return Params(
        jitter=u[:, _JITTER] < (view.jitter_p if strengths.any() else 0),
        factors=_between(u[:, _FACTORS], low, center + strengths).astype(np.float32),
        order=np.argsort(u[:, _ORDER], axis=1, kind="stable"),
        gray=u[:, _GRAY] < view.gray_p,
        blur=u[:, _BLUR] < view.blur_p,
        sigma=_between(u[:, _SIGMA], *view.blur_sigma).astype(np.float32),
        solarize=u[:, _SOLARIZE] < view.solarize_p,
        flip=u[:, _FLIP] < view.flip_p,
        vertical_flip=u[:, _VERTICAL_FLIP] < view.vertical_flip_p,
        turns=np.where(u[:, _QUARTER_TURN] < view.quarter_turn_p, 1 + (3 * u[:, _TURNS]).astype(np.int64), 0),
        affine=u[:, _AFFINE] < view.affine_p,
        theta=_affine_theta(u, view),
        noise=_pixel_noise(u, view) if noisy else np.zeros((len(u), 0, 0), dtype=np.float32),
        steps=keyed_uniform(seed, epoch, index, keyed.STEPS + stream, step_draws),
        channel_factors=_between(
            u_channels[:, : view.channels if view.per_channel else 0, 1:3], low[:2], (center + strengths)[:2]
        ).astype(np.float32),
        dropped=_dropped(u_channels[..., 0], view.channel_dropout_p),
    )


def _channel_uniforms(view: View, seed: int, epoch: int, index: ArrayLike, stream: int) -> NDArray[np.float64]:
    """Return the uniform numbers of each channel, (N, C, 4); (N, 0, 4) if the view uses none."""
    channels = view.channels if view.per_channel or view.channel_dropout_p > 0 else 0
    u = keyed_uniform(seed, epoch, index, keyed.CHANNELS + stream, _PER_CHANNEL * channels)
    return u.reshape(len(u), channels, _PER_CHANNEL).astype(np.float64)


def _dropped(u: NDArray[np.float64], probability: float) -> NDArray[np.bool_]:
    """Return the channels to drop, (N, C): those with u < `probability`, except the channel with the highest u."""
    if probability == 0:
        return np.zeros((len(u), 0), dtype=np.bool_)
    dropped: NDArray[np.bool_] = (u < probability) & (u < u.max(axis=1, keepdims=True))
    return dropped


def _between(u: NDArray[np.float64], low: ArrayLike, high: ArrayLike) -> NDArray[np.float64]:
    """Scale uniform numbers from 0 ... 1 to low ... high."""
    return np.asarray(low) + u * np.subtract(high, low)


def _affine_theta(u: NDArray[np.float64], view: View) -> NDArray[np.float32]:
    """Return the map of torchvision's `_get_inverse_affine_matrix` around the image center, for `ops.affine`.

    Returns:
        Shape (N, 6): a, b, c, d, e, f of  x' = a x + b y + c,  y' = d x + e y + f;  x and y are in pixels, x' and y'
        in half image sides.
    """
    angle = np.radians(_between(u[:, _ANGLE], -view.degrees, view.degrees))
    shift = np.rint(_between(u[:, _SHIFT], -view.translate, view.translate) * view.size)  # (N, 2): x, y in pixels
    zoom = _between(u[:, _ZOOM], *view.zoom)
    tangent = np.tan(np.radians(_between(u[:, _SHEAR], -view.shear, view.shear)))
    # Forward: zoom * [[cos, -cos tan - sin], [sin, cos - sin tan]] of determinant zoom**2, then the shift.
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = (cos - sin * tangent) / zoom, (cos * tangent + sin) / zoom
    d, e = -sin / zoom, cos / zoom
    c, f = -(a * shift[:, 0] + b * shift[:, 1]), -(d * shift[:, 0] + e * shift[:, 1])
    return (np.stack([a, b, c, d, e, f], axis=1) / (view.size / 2)).astype(np.float32)


def _pixel_noise(u: NDArray[np.float64], view: View) -> NDArray[np.float32]:
    """Return Gaussian noise from pairs of uniform numbers (Box and Muller, 1958), shape (N, S, S)."""
    std = _between(u[:, _NOISE], *view.noise)  # (N,)
    pixels = view.size**2
    pairs = u[:, _PIXELS : _PIXELS + 2 * -(-pixels // 2)].reshape(len(u), -1, 2)  # (N, P, 2)
    radius = np.sqrt(-2 * np.log(1 - pairs[..., 0]))  # 1 - u lies in (0, 1]
    turn = 2 * np.pi * pairs[..., 1]
    normal = np.stack([radius * np.cos(turn), radius * np.sin(turn)], axis=-1)  # (N, P, 2)
    noise: NDArray[np.float64] = std[:, None] * normal.reshape(len(u), -1)[:, :pixels]  # (N, S * S)
    return noise.reshape(-1, view.size, view.size).astype(np.float32)
