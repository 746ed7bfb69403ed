"""Heads trained at once are the heads trained alone; the choice sees a part of the training split and nothing else."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from moco.config import DataConfig, OptimConfig
from moco.data.plan import Plan
from moco.data.sources import load_source
from moco.evaluation import sweep
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
from tests.distributed.launch import run_ranks

CPU = torch.device("cpu")
GRID = [(0.01, 0.0), (0.1, 0.0), (0.1, 0.05), (2.0, 0.01)]


def blobs(count: int, width: int = 5, classes: int = 3, seed: int = 0) -> tuple[Tensor, NDArray[np.int64]]:
    """Features (M, D) around class centers, far from standardized, and labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    features = rng.normal(size=(count, width)) + 1.5 * rng.normal(size=(classes, width))[labels]
    features = features * rng.uniform(0.1, 9, width) + rng.normal(size=width) * 5
    return torch.from_numpy(features).float(), labels.astype(np.int64)


def recipe(epochs: int = 6, normalize: str = "standard", seed: int = 3) -> Recipe:
    return Recipe(epochs, 8, 0.9, normalize, seed)


def alone(
    x: Tensor, labels: NDArray[np.int64], classes: int, lr: float, decay: float, told: Recipe
) -> tuple[Tensor, Tensor]:
    """One head by torch's own layers, autograd and SGD."""
    head = nn.Linear(x.shape[1], classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    groups = [{"params": [head.weight], "weight_decay": decay}, {"params": [head.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=told.momentum)
    plan = Plan(len(x), told.batch_size, told.epochs, told.seed)
    for step, (_, rows) in enumerate(plan.samples(0)):
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_factor(step, plan.steps_per_epoch, plan.epochs, OptimConfig(schedule="cosine"))
        optimizer.zero_grad()
        F.cross_entropy(head(x[rows]), torch.from_numpy(labels[rows])).backward()
        optimizer.step()
    return head.weight.detach(), head.bias.detach()


@pytest.mark.parametrize("normalize", ["standard", "l2", "none"])
def test_heads_trained_at_once_are_each_the_head_trained_alone(normalize: str) -> None:
    features, labels = blobs(41)
    both = torch.cat([torch.full((41, 2), 7.0), features / 10], dim=1)  # a layer stands in columns of its own
    rows, columns, told = np.arange(41), slice(2, 7), recipe(normalize=normalize)
    scaling = scaling_of(both, columns, rows, normalize, CPU)
    heads = train_heads(both, columns, labels, rows, scaling, 3, GRID, told, CPU)
    x = features / 10
    expected_x = {"standard": (x - x.mean(0)) / x.std(0, unbiased=False), "l2": F.normalize(x), "none": x}[normalize]
    torch.testing.assert_close(scaling(x), expected_x, rtol=1e-5, atol=1e-5)
    for number, (lr, decay) in enumerate(GRID):
        weight, bias = alone(scaling(x), labels, 3, lr, decay, told)
        torch.testing.assert_close(heads.weight[number], weight, rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(heads.bias[number], bias, rtol=1e-4, atol=2e-6)


def test_a_head_that_diverges_leaves_the_others_alone_and_is_not_chosen() -> None:
    features, labels = blobs(60)
    rows, told = np.arange(60), recipe(normalize="none")
    scaling = scaling_of(features, slice(0, 5), rows, "none", CPU)
    wild = [(0.01, 0.0), (1e30, 1e30)]
    heads = train_heads(features, slice(0, 5), labels, rows, scaling, 3, wild, told, CPU)
    calm = train_heads(features, slice(0, 5), labels, rows, scaling, 3, wild[:1], told, CPU)
    assert not heads.weight[1].isfinite().all()
    torch.testing.assert_close(heads.weight[0], calm.weight[0])
    choice = choose(features, {"output": slice(0, 5)}, labels, 3, [0.01, 1e30], [0.0, 1e30], 0.2, told, CPU)
    assert choice.setting.lr == 0.01
    assert [score for setting, score in choice.tried if setting == Setting("output", 1e30, 1e30)] == [0.0]


def test_a_dimension_that_does_not_vary_is_harmless() -> None:
    features, _ = blobs(30)
    features[:, 2] = 4.0
    scaling = scaling_of(features, slice(0, 5), np.arange(30), "standard", CPU)
    assert scaling.spread[2] == 1
    assert torch.equal(scaling(features)[:, 2], torch.zeros(30))


def test_scaling_is_of_the_given_rows_alone() -> None:
    features, _ = blobs(30)
    rows = np.arange(0, 30, 2)
    scaling = scaling_of(features, slice(0, 5), rows, "standard", CPU)
    torch.testing.assert_close(scaling.shift, features[::2].mean(0))
    torch.testing.assert_close(scaling.spread, features[::2].std(0, unbiased=False))


# ---- the validation part ----


def test_the_validation_part_is_the_same_share_of_each_class_and_a_function_of_the_seed() -> None:
    labels = np.repeat([0, 1, 2, 3], [40, 10, 2, 3]).astype(np.int64)
    train, held = validation_rows(labels, 0.2, 5)
    assert np.array_equal(np.sort(np.concatenate([train, held])), np.arange(55))
    assert np.bincount(labels[held]).tolist() == [8, 2, 1, 1]
    assert np.array_equal(validation_rows(labels, 0.2, 5)[1], held)
    assert not np.array_equal(validation_rows(labels, 0.2, 6)[1], held)
    assert np.bincount(labels[validation_rows(labels, 0.99, 5)[0]]).tolist() == [1, 1, 1, 1]  # never all


def test_a_class_with_one_sample_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="class number 1 has one training picture only"):
        validation_rows(np.array([0, 0, 1], np.int64), 0.5, 0)


# ---- the choice ----


def pick(seed: int = 3) -> Choice:
    good, labels = blobs(90)
    noise = torch.from_numpy(np.random.default_rng(1).normal(size=(90, 4))).float()
    columns = {"noise": slice(0, 4), "output": slice(4, 9)}
    return choose(
        torch.cat([noise, good], 1), columns, labels, 3, [1e-6, 0.1], [0.0, 0.01], 0.3, recipe(9, seed=seed), CPU
    )


def test_the_layer_that_tells_is_chosen_and_all_that_was_tried_is_told() -> None:
    choice = pick()
    assert choice.setting.layer == "output"
    assert choice.setting.lr == 0.1
    assert len(choice.tried) == 2 * 2 * 2
    assert choice.accuracy == max(score for _, score in choice.tried) > 80
    assert choice.count == 27


def test_each_score_is_that_of_the_head_trained_alone() -> None:
    features, labels = blobs(50)
    told, where = recipe(), {"output": slice(0, 5)}
    choice = choose(features, where, labels, 3, [0.01, 1.0], [0.0, 0.1], 0.3, told, CPU)
    train, held = validation_rows(labels, 0.3, told.seed)
    scaling = scaling_of(features, slice(0, 5), train, "standard", CPU)
    for setting, score in choice.tried:
        weight, bias = alone(scaling(features)[train], labels[train], 3, setting.lr, setting.weight_decay, told)
        right = ((scaling(features)[held] @ weight.T + bias).argmax(1).numpy() == labels[held]).mean()
        assert score == pytest.approx(100 * right)


def test_ties_take_the_first_layer_the_lowest_rate_and_the_strongest_decay() -> None:
    labels = np.arange(60) % 3
    easy = torch.cat([F.one_hot(torch.from_numpy(labels), 3).float()] * 2, dim=1)
    choice = choose(easy, {"b": slice(0, 3), "a": slice(3, 6)}, labels, 3, [1.0, 0.1], [0.0, 1e-3], 0.3, recipe(), CPU)
    assert choice.accuracy == 100
    assert choice.setting == Setting("b", 0.1, 1e-3)


def test_the_winner_is_trained_again_on_everything_and_takes_plain_features() -> None:
    features, labels = blobs(40)
    told = recipe()
    columns = {"other": slice(0, 2), "output": slice(2, 7)}
    both = torch.cat([torch.ones(40, 2), features], dim=1)
    weight, bias = retrain(both, columns, labels, 3, Setting("output", 0.1, 0.01), told, CPU)
    scaling = scaling_of(features, slice(0, 5), np.arange(40), "standard", CPU)
    plain_weight, plain_bias = alone(scaling(features), labels, 3, 0.1, 0.01, told)
    expected = scaling(features) @ plain_weight.T + plain_bias
    torch.testing.assert_close(features @ weight.T + bias, expected, rtol=1e-3, atol=1e-4)


def test_two_processes_choose_and_score_as_one() -> None:
    alone_choice = pick()
    for choice in run_ranks(2, pick):
        assert choice == alone_choice


# ---- against scikit-learn ----


def test_the_solver_reaches_scikit_learns_accuracy_at_the_same_regularization() -> None:
    """Raw pixels of the digits; sklearn's C is 1 / (weight decay x samples)."""
    from sklearn.linear_model import LogisticRegression

    sources = load_source(DataConfig("digits"))
    assert sources.bank is not None
    assert sources.held_out is not None
    assert sources.bank.labels is not None
    assert sources.held_out.labels is not None
    train, test = (each.images[:, :1].flatten(1).float() / 255 for each in (sources.bank, sources.held_out))  # type: ignore[index]
    labels, truth = sources.bank.labels, sources.held_out.labels
    rows, where = np.arange(len(labels)), slice(0, train.shape[1])
    decay = 1e-2
    scaling = scaling_of(train, where, rows, "standard", CPU)
    reference = LogisticRegression(C=1 / (decay * len(labels)), max_iter=2000, tol=1e-6)
    reference.fit(scaling(train).numpy(), labels)
    told = Recipe(200, 256, 0.9, "standard", 0)
    weight, bias = retrain(train, {"pixels": where}, labels, 10, Setting("pixels", 0.05, decay), told, CPU)
    ours = 100 * ((test @ weight.T + bias).argmax(1).numpy() == truth).mean()
    theirs = 100 * reference.score(scaling(test).numpy(), truth)
    assert theirs > 90
    assert abs(ours - theirs) <= 0.5

    def objective(scores: Tensor, weights: Tensor) -> float:
        return float(F.cross_entropy(scores, torch.from_numpy(labels)) + decay / 2 * weights.square().sum())

    known = torch.from_numpy(reference.coef_).float()
    best = objective(scaling(train) @ known.T + torch.from_numpy(reference.intercept_).float(), known)
    assert objective(train @ weight.T + bias, weight * scaling.spread) == pytest.approx(best, rel=0.02)


def test_rows_are_read_in_parts_without_changing_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pick()
    monkeypatch.setattr(sweep, "_CHUNK", 7)
    assert pick() == whole
