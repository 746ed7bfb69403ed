"""SimCLR, SupCon and InfoNCE between two views: numpy loops, and gradients by finite differences.

Legend: V views, N batch, C embedding, P pixels of an image.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moco.builder import Output
from moco.losses import LearnedTemperature
from moco.methods.simclr import LossForm, SimCLR

Array = NDArray[np.float64]
N, C, P, T = 4, 3, 12, 0.4
INDEX = torch.tensor([5, 0, 3, 6])
LABELS = torch.tensor([2, 9, 9, 1, 9, 2, 2, 9])  # of samples 5, 0, 3, 6: 2, 2, 1, 2 - sample 3 is alone in its class


def linear_encoder() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(P, C, bias=False))


def images(views: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(N, 3, 2, 2, generator=generator) for _ in range(views)]


def reference(weight: Array, x: list[Array], classes: list[int], options: dict[str, Any]) -> float:
    """Return the loss of one global batch, one anchor and one candidate at a time."""
    z = [[weight @ image for image in view] for view in x]
    z = [[each / math.sqrt(float(each @ each)) for each in view] for view in z]
    views, samples = len(x), len(classes)
    anchors = [(v, n) for v in (range(views) if options.get("contrast_mode") != "one" else [0]) for n in range(samples)]
    form: LossForm = options.get("form", LossForm())
    terms: list[float] = []
    for v, n in anchors:
        if options.get("candidates") == "other_view":
            for w in range(views):
                if w != v:
                    row = [float(z[v][n] @ z[w][m]) - form.margin * (m == n) for m in range(samples)]
                    below = [each for m, each in enumerate(row) if m != n or not form.decoupled]
                    terms.append(math.log(sum(math.exp(each / T) for each in below)) - row[n] / T)
            continue
        others = [(w, m) for w in range(views) for m in range(samples) if (w, m) != (v, n)]
        own = [float(z[v][n] @ z[w][m]) / T for w, m in others if classes[m] == classes[n]]
        rest = [float(z[v][n] @ z[w][m]) / T for w, m in others if classes[m] != classes[n]]
        total = math.log(sum(math.exp(each) for each in (rest if form.decoupled else own + rest)))
        inside = math.log(sum(math.exp(each) for each in own) / len(own))
        terms.append(total - (inside if form.positives_mean == "inside" else sum(own) / len(own)))
    loss = sum(terms) / len(terms)
    base: float = options.get("base_temperature", T)  # the factor is 1 without one
    return loss * T / base


def by_differences(weight: Array, *rest: Any) -> Array:
    gradient = np.zeros_like(weight)
    for at in np.ndindex(*weight.shape):
        step = np.zeros_like(weight)
        step[at] = 1e-5
        gradient[at] = (reference(weight + step, *rest) - reference(weight - step, *rest)) / 2e-5
    return gradient


CASES: list[tuple[int, bool, dict[str, Any]]] = [
    (2, False, {}),  # SimCLR
    (3, False, {}),
    (4, False, {"contrast_mode": "one"}),
    (2, True, {}),  # SupCon
    (3, True, {"contrast_mode": "one"}),
    (2, True, {"base_temperature": 0.07}),
    (2, False, {"candidates": "other_view", "contrast_mode": "one"}),  # one direction
    (2, False, {"candidates": "other_view"}),  # both
    (3, False, {"candidates": "other_view"}),
    (2, False, {"candidates": "other_view", "form": LossForm(margin=0.2, margin_kind="cosine")}),
    (2, False, {"form": LossForm(decoupled=True)}),
    (2, True, {"form": LossForm(decoupled=True), "base_temperature": 0.07}),
    (3, False, {"form": LossForm(positives_mean="inside")}),
    (2, True, {"form": LossForm(decoupled=True, positives_mean="inside"), "contrast_mode": "one"}),
    (3, False, {"form": LossForm(decoupled=True), "candidates": "other_view"}),
]


@pytest.mark.parametrize(("views", "supervised", "options"), CASES)
def test_loss_and_gradient_equal_the_loops(views: int, supervised: bool, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    encoder = linear_encoder()
    method = SimCLR(encoder, T, LABELS if supervised else None, **options)
    output: Output = method(images(views), {}, INDEX)
    output.loss.backward()
    (weight,) = encoder.parameters()
    x = [view.flatten(1).double().numpy() for view in images(views)]
    classes = LABELS[INDEX].tolist() if supervised else list(range(N))
    arguments = weight.detach().double().numpy(), x, classes, options
    assert output.loss.item() == pytest.approx(reference(*arguments), rel=1e-5)
    assert weight.grad is not None
    np.testing.assert_allclose(weight.grad.numpy(), by_differences(*arguments), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("labels", [torch.arange(8), torch.full((8,), -1)])
@pytest.mark.parametrize("views", [2, 3])
def test_supcon_without_two_samples_of_a_class_is_simclr_to_the_bit(labels: Tensor, views: int) -> None:
    torch.manual_seed(0)
    encoder = linear_encoder()
    plain: Output = SimCLR(encoder, T)(images(views), {}, INDEX)
    supervised: Output = SimCLR(encoder, T, labels)(images(views), {}, INDEX)
    assert torch.equal(plain.loss, supervised.loss)
    for name, value in plain.measures.items():
        assert torch.equal(value, supervised.measures[name]), name


def test_unknown_labels_equal_classes_of_one_sample() -> None:
    torch.manual_seed(0)
    encoder = linear_encoder()
    unknown, separate = LABELS.clone(), LABELS.clone()
    unknown[[5, 3]] = -1
    separate[[5, 3]] = torch.tensor([100, 101])
    losses = [SimCLR(encoder, T, labels)(images(2), {}, INDEX).loss for labels in (unknown, separate)]
    assert torch.equal(*losses)


def test_an_anchor_without_positive_is_excluded_and_the_loss_is_finite() -> None:
    torch.manual_seed(0)
    encoder = linear_encoder()
    output: Output = SimCLR(encoder, T, LABELS)(images(1), {}, INDEX)
    output.loss.backward()
    (weight,) = encoder.parameters()
    assert weight.grad is not None
    assert torch.isfinite(output.loss)
    assert torch.isfinite(weight.grad).all()
    assert all(torch.isfinite(value) for value in output.measures.values())


def test_measures_of_a_constructed_batch() -> None:
    """Samples 0 and 1 have equal views; those of sample 2 are orthogonal, and the first one equals sample 0."""
    eye = torch.eye(P).view(P, 3, 2, 2)
    views = [eye[[0, 1, 0]], eye[[0, 1, 2]]]
    output: Output = SimCLR(nn.Flatten(), T)(views, {}, torch.arange(3))
    values = {name: value.item() for name, value in output.measures.items()}
    assert values["positive_similarity"] == pytest.approx(2 / 3)
    assert values["contrast_accuracy"] == pytest.approx(2 / 6)  # a tie is a failure: only sample 1 succeeds
    assert values["negatives"] == 4
    assert values["chance"] == pytest.approx(math.log(5))
    plain: Output = SimCLR(nn.Flatten(), T, candidates="other_view")(views, {}, torch.arange(3))
    values = {name: value.item() for name, value in plain.measures.items()}
    assert values["negatives"] == 2
    assert values["chance"] == pytest.approx(math.log(3))
    supervised: Output = SimCLR(nn.Flatten(), T, torch.tensor([0, 1, 0]))(views, {}, torch.arange(3))
    values = {name: value.item() for name, value in supervised.measures.items()}
    assert values["positives"] == pytest.approx((3 + 3 + 1) / 3)
    assert values["negatives"] == pytest.approx((2 + 2 + 4) / 3)


@pytest.mark.parametrize("kind", ["arc", "cosine"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_chance_with_a_margin_is_the_loss_of_orthogonal_views(kind: Any, decoupled: bool) -> None:
    eye = torch.eye(P).view(P, 3, 2, 2)
    form = LossForm(margin=0.4, margin_kind=kind, decoupled=decoupled)
    method = SimCLR(nn.Flatten(), T, candidates="other_view", form=form)
    output: Output = method([eye[[0, 1, 2]], eye[[3, 4, 5]]], {}, torch.arange(3))
    assert output.measures["chance"].item() == pytest.approx(output.loss.item(), rel=1e-6)


def test_equal_views_of_orthogonal_samples_reach_the_floor() -> None:
    eye = torch.eye(P).view(P, 3, 2, 2)[:4]
    loss = SimCLR(nn.Flatten(), T)([eye, eye], {}, torch.arange(4)).loss.item()
    assert loss == pytest.approx(math.log(1 + 6 * math.exp(-1 / T)), rel=1e-5)
    loss = SimCLR(nn.Flatten(), T, candidates="other_view")([eye, eye], {}, torch.arange(4)).loss.item()
    assert loss == pytest.approx(math.log(1 + 3 * math.exp(-1 / T)), rel=1e-5)


def test_keys_momentum_and_queue_do_nothing() -> None:
    method = SimCLR(linear_encoder(), T, LABELS)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    assert set(before) == {"encoder.1.weight"}  # labels belong to the data, not to the checkpoint
    assert method.encode_keys(images(2), None, N) == {}
    method.update_momentum_encoder(0.9)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert method.queue is None


def test_micro_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="accumulate=2 must be 1"):
        SimCLR(linear_encoder()).encode_keys(images(2), None, N // 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"candidates": "both"}, "candidates='both'"),
        ({"form": LossForm(margin=0.1)}, "margin=0.1"),
        ({"candidates": "other_view", "labels": LABELS}, "neither labels"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SimCLR(linear_encoder(), **options)


def test_a_learned_temperature_gets_a_gradient_and_is_measured() -> None:
    torch.manual_seed(0)
    learned = LearnedTemperature(0.3)
    output: Output = SimCLR(linear_encoder(), learned)(images(2), {}, INDEX)
    output.loss.backward()
    assert output.measures["temperature"].item() == pytest.approx(0.3)
    assert learned.log_scale.grad is not None
    assert learned.log_scale.grad.item() != 0
    assert not any(value.requires_grad for value in output.measures.values())
