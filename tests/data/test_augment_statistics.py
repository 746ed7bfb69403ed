"""The distribution of the augmentations, compared with torchvision's own per-image transforms.

Each check is shown to have teeth: with a planted wrong probability or range, it fails.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
from numpy.typing import ArrayLike
from scipy import stats
from torch import Tensor
from torchvision.transforms.v2.functional._geometry import _get_inverse_affine_matrix

from moco.data.augment import augment
from moco.data.view import Params, View, draw

DRAWS = 2_000
LEVEL = 1e-3  # probability of a false alarm per check; the seeds are fixed, so results are reproducible


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: threads do not speed up such small images, and wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(**fields: Any) -> Params:
    return draw(View(**{"size": 8, **fields}), 0, 0, np.arange(DRAWS), 0)


def same_distribution(ours: ArrayLike, theirs: ArrayLike) -> bool:
    """Two-sample Kolmogorov-Smirnov."""
    return bool(stats.ks_2samp(np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)).pvalue > LEVEL)


@pytest.mark.parametrize("name", ["jitter", "gray", "blur", "solarize", "flip", "vertical_flip", "affine"])
def test_probabilities(name: str) -> None:
    for p in (0.2, 0.5, 0.8):
        chosen = getattr(drawn(brightness=0.4, **{f"{name}_p": p}), name)
        assert stats.binomtest(int(chosen.sum()), DRAWS, p).pvalue > LEVEL
        assert stats.binomtest(int(chosen.sum()), DRAWS, p - 0.1).pvalue < LEVEL
    assert not getattr(drawn(brightness=0.4, **{f"{name}_p": 0.0}), name).any()
    assert getattr(drawn(brightness=0.4, **{f"{name}_p": 1.0}), name).all()


def test_quarter_turns_are_equally_likely() -> None:
    for p in (0.3, 0.75, 1.0):
        counts = np.bincount(drawn(quarter_turn_p=p).turns, minlength=4)
        assert len(counts) == 4
        expected = DRAWS * np.array([1 - p, p / 3, p / 3, p / 3])
        assert stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue > LEVEL
        shifted = DRAWS * np.array([1 - p, p / 2, p / 4, p / 4])
        assert stats.chisquare(counts[expected > 0], shifted[expected > 0]).pvalue < LEVEL
    assert not drawn(quarter_turn_p=0.0).turns.any()


def test_decisions_are_independent() -> None:
    names = ("jitter", "gray", "blur", "solarize", "flip", "vertical_flip", "affine")
    params = drawn(brightness=0.4, quarter_turn_p=0.5, **{f"{name}_p": 0.5 for name in names})
    table = np.stack([*(getattr(params, name) for name in names), params.turns > 0, params.turns == 1])
    table = table.astype(float)
    table[-1] = np.where(table[-2] > 0, table[-1] - 1 / 3, 0)  # the number of turns, given that there is a turn
    correlation = np.corrcoef(table) - np.eye(len(table))
    assert np.abs(correlation).max() * np.sqrt(DRAWS) < 3.5


def test_jitter_parameters() -> None:
    torch.manual_seed(0)
    transform = T.ColorJitter(0.4, 0.5, 1.5, 0.1)
    theirs = [transform.make_params([]) for _ in range(DRAWS)]
    fields = dict(jitter_p=1, brightness=0.4, contrast=0.5, saturation=1.5, hue=0.1)
    names = ("brightness", "contrast", "saturation", "hue")
    for column, name in enumerate(names):
        expected = [params[f"{name}_factor"] for params in theirs]
        assert same_distribution(drawn(**fields).factors[:, column], expected)
        assert not same_distribution(drawn(**{**fields, name: fields[name] * 1.25}).factors[:, column], expected)
    orders = np.array([params["fn_idx"].tolist() for params in theirs])
    for sample in (orders, drawn(**fields).order):
        _, counts = np.unique(sample, axis=0, return_counts=True)
        assert len(counts) == 24
        assert stats.chisquare(counts).pvalue > LEVEL


def test_blur_sigma() -> None:
    torch.manual_seed(0)
    transform = T.GaussianBlur(13, (0.1, 2.0))
    theirs = [transform.make_params([])["sigma"][0] for _ in range(DRAWS)]
    assert same_distribution(drawn(blur_p=1, blur_sigma=(0.1, 2.0)).sigma, theirs)
    assert not same_distribution(drawn(blur_p=1, blur_sigma=(0.1, 1.8)).sigma, theirs)


def test_affine_parameters() -> None:
    torch.manual_seed(0)
    transform = T.RandomAffine(20, translate=(0.2, 0.2), scale=(0.8, 1.2), shear=10)
    image = torch.zeros(3, 32, 32)
    theirs = []
    for _ in range(DRAWS):
        p = transform.make_params([image])
        theirs.append(_get_inverse_affine_matrix([0, 0], p["angle"], p["translate"], p["scale"], p["shear"]))
    fields = dict(size=32, affine_p=1, degrees=20, translate=0.2, zoom=(0.8, 1.2), shear=10)

    def entries_alike(**changed: Any) -> list[bool]:
        ours = drawn(**{**fields, **changed}).theta * 16
        return [same_distribution(ours[:, entry], np.array(theirs)[:, entry]) for entry in range(6)]

    assert all(entries_alike())
    for changed in (dict(degrees=30), dict(translate=0.3), dict(zoom=(0.7, 1.3)), dict(shear=20)):
        assert not all(entries_alike(**changed))


def measures(views: Tensor) -> dict[str, Tensor]:
    """Compute measures that distinguish the operations, for images (N, 3, S, S) of one source image."""
    chroma = views.amax(1) - views.amin(1)  # (N, S, S)
    opposite = views[:, 0] * 2 - views[:, 1] - views[:, 2]  # red minus the others: depends on the hue
    return {
        "mean": views.mean((1, 2, 3)),
        "contrast": views.mean(1).std((1, 2)),
        "chroma": chroma.mean((1, 2)),
        "hue": opposite.mean((1, 2)),
        "detail": views.diff(dim=3).abs().mean((1, 2, 3)),
        "side": views[..., :4].mean((1, 2, 3)) - views[..., 4:].mean((1, 2, 3)),
    }


FIELDS = dict(
    jitter_p=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    gray_p=0.2,
    blur_p=0.5,
    solarize_p=0.2,
    flip_p=0.5,
)


@pytest.fixture(scope="module")
def source() -> Tensor:
    """A colored image with shading from left to right and some detail."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, 8, 8, generator=generator) * 80 + torch.linspace(0, 90, 8)
    return (image + torch.tensor([80.0, 20.0, 0.0])[:, None, None]).to(torch.uint8)


@pytest.fixture(scope="module")
def torchvision_measures(source: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)
    transform = T.Compose(
        [
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            T.RandomGrayscale(p=0.2),
            T.RandomApply([T.GaussianBlur(13, (0.1, 2.0))], p=0.5),
            T.RandomSolarize(0.5, p=0.2),
            T.RandomHorizontalFlip(),
        ]
    )
    image = source.float() / 255
    return measures(torch.stack([transform(image) for _ in range(DRAWS)]))


def measures_alike(source: Tensor, theirs: dict[str, Tensor], **changed: Any) -> set[str]:
    view = View(**{"size": 8, **FIELDS, **changed})
    params = draw(view, 1, 0, np.arange(DRAWS), 0)
    ours = measures(augment(source.expand(DRAWS, -1, -1, -1).contiguous(), params, view))
    return {name for name in theirs if same_distribution(ours[name], theirs[name])}


def test_images_have_the_same_distribution(source: Tensor, torchvision_measures: dict[str, Tensor]) -> None:
    assert measures_alike(source, torchvision_measures) == set(torchvision_measures)


@pytest.mark.parametrize(
    ("changed", "seen"),
    [
        (dict(jitter_p=0.6), "chroma"),
        (dict(brightness=0.6), "mean"),
        (dict(contrast=0.8), "contrast"),
        (dict(saturation=1.0), "chroma"),
        (dict(hue=0.2), "hue"),
        (dict(gray_p=0.3), "chroma"),
        (dict(blur_p=0.4), "detail"),
        (dict(blur_sigma=(0.1, 1.0)), "detail"),
        (dict(solarize_p=0.3), "mean"),
        (dict(flip_p=0.4), "side"),
    ],
    ids=str,
)
def test_a_planted_fault_is_detected(
    source: Tensor, torchvision_measures: dict[str, Tensor], changed: dict[str, Any], seen: str
) -> None:
    assert seen not in measures_alike(source, torchvision_measures, **changed)
