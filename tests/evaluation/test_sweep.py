"""Heads trained together equal heads trained separately; the choice uses only a part of the training split."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from moco.config import DataConfig, OptimConfig
from moco.data.keyed import VALIDATION
from moco.data.plan import Plan
from moco.data.sources import load_source
from moco.evaluation import sweep
from moco.evaluation.subject import labels_of
from moco.evaluation.subsets import split_each_class
from moco.evaluation.sweep import (
    Choice,
    LabeledFeatures,
    Recipe,
    Setting,
    choose,
    retrain,
    scaling_of,
    train_heads,
)
from moco.optim.schedules import lr_factor

CPU = torch.device("cpu")
GRID = [(0.01, 0.0), (0.1, 0.0), (0.1, 0.05), (2.0, 0.01)]


def blobs(count: int, width: int = 5, classes: int = 3, seed: int = 0) -> tuple[Tensor, NDArray[np.int64]]:
    """Return features (M, D) around class centers, far from standardized, and labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    features = rng.normal(size=(count, width)) + 1.5 * rng.normal(size=(classes, width))[labels]
    features = features * rng.uniform(0.1, 9, width) + rng.normal(size=width) * 5
    return torch.from_numpy(features).float(), labels.astype(np.int64)


def recipe(epochs: int = 6, normalize: str = "standard", seed: int = 3) -> Recipe:
    return Recipe(epochs, 8, 0.9, normalize, seed)


def output_only(features: Tensor, labels: NDArray[np.int64]) -> LabeledFeatures:
    return LabeledFeatures(features, {"output": slice(0, features.shape[1])}, labels, 3, CPU)


def reference_head(
    x: Tensor, labels: NDArray[np.int64], lr: float, decay: float, settings: Recipe
) -> tuple[Tensor, Tensor]:
    """Train one head with torch's own layers, autograd and SGD."""
    head = nn.Linear(x.shape[1], 3)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    groups = [{"params": [head.weight], "weight_decay": decay}, {"params": [head.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=settings.momentum)
    plan = Plan(len(x), settings.batch_size, settings.epochs, settings.seed)
    for step, (_, rows) in enumerate(plan.samples(0)):
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_factor(step, plan.steps_per_epoch, plan.epochs, OptimConfig(schedule="cosine"))
        optimizer.zero_grad()
        F.cross_entropy(head(x[rows]), torch.from_numpy(labels[rows])).backward()
        optimizer.step()
    return head.weight.detach(), head.bias.detach()


@pytest.mark.parametrize("normalize", ["standard", "l2", "none"])
def test_heads_trained_together_equal_heads_trained_separately(normalize: str) -> None:
    features, labels = blobs(41)
    x = features / 10
    both = torch.cat([torch.full((41, 2), 7.0), x], dim=1)
    data = LabeledFeatures(both, {"other": slice(0, 2), "output": slice(2, 7)}, labels, 3, CPU)
    rows, settings = np.arange(41), recipe(normalize=normalize)
    scaling = scaling_of(data, "output", rows, normalize)
    heads = train_heads(data, "output", rows, scaling, GRID, settings)
    expected_x = {"standard": (x - x.mean(0)) / x.std(0, unbiased=False), "l2": F.normalize(x), "none": x}[normalize]
    torch.testing.assert_close(scaling(x), expected_x, rtol=1e-5, atol=1e-5)
    for number, (lr, decay) in enumerate(GRID):
        weight, bias = reference_head(scaling(x), labels, lr, decay, settings)
        torch.testing.assert_close(heads.weight[number], weight, rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(heads.bias[number], bias, rtol=1e-4, atol=2e-6)


def test_a_diverging_head_does_not_affect_the_others_and_is_not_chosen() -> None:
    data, rows, settings = output_only(*blobs(60)), np.arange(60), recipe(normalize="none")
    scaling = scaling_of(data, "output", rows, "none")
    grid = [(0.01, 0.0), (1e30, 1e30)]
    heads = train_heads(data, "output", rows, scaling, grid, settings)
    stable = train_heads(data, "output", rows, scaling, grid[:1], settings)
    assert not heads.weight[1].isfinite().all()
    torch.testing.assert_close(heads.weight[0], stable.weight[0])
    choice = choose(data, [0.01, 1e30], [0.0, 1e30], 0.2, settings)
    assert choice.setting.lr == 0.01
    assert [score for setting, score in choice.tried if setting == Setting("output", 1e30, 1e30)] == [0.0]


def test_a_constant_dimension_is_only_shifted() -> None:
    features, labels = blobs(30)
    features[:, 2] = 4.0
    scaling = scaling_of(output_only(features, labels), "output", np.arange(30), "standard")
    assert scaling.spread[2] == 1
    assert torch.equal(scaling(features)[:, 2], torch.zeros(30))


def test_scaling_uses_only_the_given_rows() -> None:
    features, labels = blobs(30)
    scaling = scaling_of(output_only(features, labels), "output", np.arange(0, 30, 2), "standard")
    torch.testing.assert_close(scaling.shift, features[::2].mean(0))
    torch.testing.assert_close(scaling.spread, features[::2].std(0, unbiased=False))


# ---- the choice ----


def pick(seed: int = 3) -> Choice:
    good, labels = blobs(90)
    noise = torch.from_numpy(np.random.default_rng(1).normal(size=(90, 4))).float()
    columns = {"noise": slice(0, 4), "output": slice(4, 9)}
    data = LabeledFeatures(torch.cat([noise, good], 1), columns, labels, 3, CPU)
    return choose(data, [1e-6, 0.1], [0.0, 0.01], 0.3, recipe(9, seed=seed))


def test_the_informative_layer_is_chosen_and_every_setting_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = pick()
    assert choice.setting.layer == "output"
    assert choice.setting.lr == 0.1
    assert len(choice.tried) == 2 * 2 * 2
    assert choice.accuracy == max(score for _, score in choice.tried) > 80
    assert choice.count == 27
    monkeypatch.setattr(sweep, "_CHUNK", 7)  # the number of rows at once changes no result
    assert pick() == choice


def test_each_score_is_that_of_a_head_trained_separately() -> None:
    features, labels = blobs(50)
    data, settings = output_only(features, labels), recipe()
    choice = choose(data, [0.01, 1.0], [0.0, 0.1], 0.3, settings)
    train, held = split_each_class(labels, 0.3, settings.seed, VALIDATION)
    scaling = scaling_of(data, "output", train, "standard")
    for setting, score in choice.tried:
        weight, bias = reference_head(
            scaling(features)[train], labels[train], setting.lr, setting.weight_decay, settings
        )
        correct = ((scaling(features)[held] @ weight.T + bias).argmax(1).numpy() == labels[held]).mean()
        assert score == pytest.approx(100 * correct)


def test_ties_take_the_first_layer_the_lowest_rate_and_the_strongest_decay() -> None:
    labels = np.arange(60) % 3
    easy = torch.cat([F.one_hot(torch.from_numpy(labels), 3).float()] * 2, dim=1)
    data = LabeledFeatures(easy, {"b": slice(0, 3), "a": slice(3, 6)}, labels, 3, CPU)
    choice = choose(data, [1.0, 0.1], [0.0, 1e-3], 0.3, recipe())
    assert choice.accuracy == 100
    assert choice.setting == Setting("b", 0.1, 1e-3)


def test_the_retrained_head_uses_all_rows_and_takes_unscaled_features() -> None:
    features, labels = blobs(40)
    columns = {"other": slice(0, 2), "output": slice(2, 7)}
    data = LabeledFeatures(torch.cat([torch.ones(40, 2), features], dim=1), columns, labels, 3, CPU)
    weight, bias = retrain(data, Setting("output", 0.1, 0.01), recipe())
    scaling = scaling_of(data, "output", np.arange(40), "standard")
    reference_weight, reference_bias = reference_head(scaling(features), labels, 0.1, 0.01, recipe())
    expected = scaling(features) @ reference_weight.T + reference_bias
    torch.testing.assert_close(features @ weight.T + bias, expected, rtol=1e-3, atol=1e-4)


# ---- against scikit-learn ----


def test_the_solver_reaches_the_accuracy_of_scikit_learn_at_the_same_regularization() -> None:
    """On raw pixels of the digits; scikit-learn's C is 1 / (weight decay x samples)."""
    from sklearn.linear_model import LogisticRegression

    sources = load_source(DataConfig("digits"))
    assert sources.bank is not None
    assert sources.held_out is not None
    train, test = (each.images[:, :1].flatten(1).float() / 255 for each in (sources.bank, sources.held_out))  # type: ignore[index]
    labels, truth = labels_of(sources.bank), labels_of(sources.held_out)
    data = LabeledFeatures(train, {"pixels": slice(0, train.shape[1])}, labels, 10, CPU)
    decay = 1e-2
    scaling = scaling_of(data, "pixels", np.arange(len(labels)), "standard")
    reference = LogisticRegression(C=1 / (decay * len(labels)), max_iter=2000, tol=1e-6)
    reference.fit(scaling(train).numpy(), labels)
    weight, bias = retrain(data, Setting("pixels", 0.05, decay), Recipe(200, 256, 0.9, "standard", 0))
    ours = 100 * ((test @ weight.T + bias).argmax(1).numpy() == truth).mean()
    theirs = 100 * reference.score(scaling(test).numpy(), truth)
    assert theirs > 90
    assert abs(ours - theirs) <= 0.5

    def objective(scores: Tensor, weights: Tensor) -> float:
        return float(F.cross_entropy(scores, torch.from_numpy(labels)) + decay / 2 * weights.square().sum())

    known = torch.from_numpy(reference.coef_).float()
    best = objective(scaling(train) @ known.T + torch.from_numpy(reference.intercept_).float(), known)
    assert objective(train @ weight.T + bias, weight * scaling.spread) == pytest.approx(best, rel=0.02)
