"""Images with several labels each: average precision, kNN shares, linear probes; from a label file to results."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from torch import nn

from moco.config import ConfigError, OptimConfig
from moco.config.finetune import FinetuneConfig
from moco.config.knn import KnnConfig
from moco.config.linear import check_linear
from moco.data.plan import Plan
from moco.evaluation.average_precision import average_precision
from moco.evaluation.finetune import evaluate_finetune
from moco.evaluation.knn import evaluate_knn
from moco.evaluation.knn_classifier import KnnSettings, knn_shares, leave_one_out
from moco.evaluation.linear import evaluate_linear
from moco.evaluation.linear_probe import loss_of
from moco.evaluation.subsets import split_each_class
from moco.evaluation.sweep import LabeledFeatures, Recipe, Setting, choose, retrain, scaling_of, train_heads
from moco.optim.schedules import lr_factor
from tests.evaluation.test_knn_classifier import features
from tests.evaluation.test_linear import encoder_file, official, swept, write_images

CPU = torch.device("cpu")


def several(rows: int, seed: int, classes: int = 4) -> NDArray[np.bool_]:
    return np.random.default_rng(seed).random((rows, classes)) < 0.3


# ---- average precision ----


def by_definition(scores: list[float], truth: list[bool]) -> float:
    """Sum P(n) (R(n) - R(n - 1)) over the distinct scores, from the highest."""
    value, recall = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = [right for score, right in zip(scores, truth, strict=True) if score >= threshold]
        precision, now = sum(chosen) / len(chosen), sum(chosen) / sum(truth)
        value += precision * (now - recall)
        recall = now
    return 100 * value


def test_average_precision_equals_its_definition_and_scikit_learn() -> None:
    truth = several(50, 0)
    scores = torch.from_numpy(np.random.default_rng(1).normal(size=(50, 4))).mul(4).round() / 4  # with ties
    found = average_precision(scores, truth, truth)
    assert found.per_class == pytest.approx([by_definition(scores[:, i].tolist(), list(truth[:, i])) for i in range(4)])
    assert found.mean == pytest.approx(100 * average_precision_score(truth, scores.numpy(), average="macro"))
    assert found.random == pytest.approx(100 * truth.mean())


def test_a_class_without_positives_in_one_part_is_left_out() -> None:
    truth, training = several(30, 0), several(20, 1)
    truth[:, 1], training[:, 2] = False, False
    found = average_precision(torch.from_numpy(truth).float(), truth, training)
    assert found.per_class == [100.0, None, None, 100.0]
    assert found.mean == 100.0
    assert found.to_json()["per_class_ap"] == found.per_class
    # Equal scores have the precision of a random order: the share of images with the class.
    constant = average_precision(torch.zeros(30, 4), truth, training)
    assert constant.mean == pytest.approx(constant.random)


# ---- kNN ----


def share_by_definition(similarity: NDArray[np.float64], labels: NDArray[np.bool_], k: int, t: float) -> Any:
    nearest = np.argsort(-similarity)[:k]
    weights = np.exp(similarity[nearest] / t)
    return [weights[labels[nearest, i]].sum() / weights.sum() for i in range(labels.shape[1])]


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (7, 0.05), (60, 1.0), (100, 0.2)])
def test_shares_equal_a_loop(k: int, temperature: float) -> None:
    bank, queries, labels = features(60, 0), features(21, 1), several(60, 2)
    cosine = F.cosine_similarity(queries[:, None].double(), bank.double(), dim=2).numpy()
    expected = [share_by_definition(row, labels, k, temperature) for row in cosine]
    for chunk in (4, 1024):
        settings = KnnSettings(k, temperature, query_chunk=chunk, bank_chunk=17)
        found = knn_shares(bank, torch.from_numpy(labels), queries, settings)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_leave_one_out_equals_a_loop() -> None:
    bank, labels, rows, ks, temperatures = features(60, 0), several(60, 2), np.arange(0, 60, 2), [1, 9], [0.1, 0.5]
    groups = torch.arange(60) // 2  # each image has one copy
    cosine = F.cosine_similarity(bank[:, None].double(), bank.double(), dim=2).numpy()
    cosine[groups[:, None] == groups] = -np.inf
    found = leave_one_out(bank, labels, torch.from_numpy(rows), ks, temperatures, groups)
    for i, k in enumerate(ks):
        for j, t in enumerate(temperatures):
            scores = np.array([share_by_definition(cosine[row], labels, k, t) for row in rows])
            expected = 100 * average_precision_score(labels[rows], scores.round(6), average="macro")
            assert found[i, j] == pytest.approx(expected, abs=0.5)  # rounding decides about ties


# ---- linear probes ----


def test_heads_equal_torch_with_binary_cross_entropy() -> None:
    x, labels, recipe = features(37, 0) * 3, several(37, 1), Recipe(5, 8, 0.9, "none", 3)
    data = LabeledFeatures(x, {"output": slice(0, 7)}, labels, 4, CPU)
    grid, rows = [(0.01, 0.0), (0.1, 0.05)], np.arange(37)
    heads = train_heads(data, "output", rows, scaling_of(data, "output", rows, "none"), grid, recipe)
    plan = Plan(37, 8, 5, 3)
    for number, (lr, decay) in enumerate(grid):
        head = nn.Linear(7, 4)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        groups = [{"params": [head.weight], "weight_decay": decay}, {"params": [head.bias], "weight_decay": 0.0}]
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
        for step, (_, picked) in enumerate(plan.samples(0)):
            for group in optimizer.param_groups:
                group["lr"] = lr * lr_factor(step, plan.steps_per_epoch, 5, OptimConfig(schedule="cosine"))
            optimizer.zero_grad()
            loss_of(head(x[picked]), torch.from_numpy(labels[picked])).backward()
            optimizer.step()
        torch.testing.assert_close(heads.weight[number], head.weight.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(heads.bias[number], head.bias.detach(), rtol=1e-4, atol=1e-5)


def test_the_loss_is_a_sum_of_binary_cross_entropies() -> None:
    assert loss_of(torch.zeros(5, 4), torch.from_numpy(several(5, 0))).item() == pytest.approx(4 * np.log(2))


def test_each_class_is_a_logistic_regression() -> None:
    x, labels = features(60, 0), several(60, 1)
    data = LabeledFeatures(x, {"output": slice(0, 7)}, labels, 4, CPU)
    weight, bias = retrain(data, Setting("output", 0.5, 0.02), Recipe(400, 60, 0.9, "none", 0))
    for i in range(4):
        fitted = LogisticRegression(C=1 / (0.02 * 60), tol=1e-8).fit(x.numpy(), labels[:, i])
        np.testing.assert_allclose(weight[i], fitted.coef_[0], atol=2e-3)
        np.testing.assert_allclose(bias[i], fitted.intercept_[0], atol=2e-3)


def test_the_choice_is_the_best_map_on_the_validation_part() -> None:
    x, labels, recipe = features(80, 0), several(80, 1), Recipe(5, 16, 0.9, "standard", 3)
    data = LabeledFeatures(x, {"output": slice(0, 7)}, labels, 4, CPU)
    choice = choose(data, [1e-3, 0.1, 1e39], [0.0], 0.25, recipe)
    train, held = split_each_class(labels, 0.25, 3, 4, None)
    assert (len(train), len(held), choice.count) == (60, 20, 20)
    assert [value for setting, value in choice.tried if setting.lr > 1] == [0.0]  # its weights are infinite
    assert choice.accuracy == max(value for _, value in choice.tried) > 0


# ---- commands ----


def labeled_files(folder: Path) -> None:
    """Write images and their labels; two images have none, and one label is on a training image only."""
    write_images(folder / "images", {"dark": 8, "middle": 9, "light": 7})
    rows = ["path,label,split"]
    kinds = {"dark": ["dim"], "middle": ["dim", "bright"], "light": ["bright"]}
    for i, path in enumerate(sorted((folder / "images").rglob("*.png"))):
        labels = kinds[path.parent.name] + ["odd"] * (i % 2)
        labels = [] if i in (3, 4) else labels + ["rare"] * (i == 1)
        rows.append(f"{path.relative_to(folder / 'images')},{'|'.join(labels)},{'test' if i % 3 == 0 else 'train'}")
    (folder / "labels.csv").write_text("\n".join(rows))


def with_labels(config: Any, folder: Path, **values: Any) -> Any:
    config.device, data = "cpu", config.data
    data.name, data.root, data.workers = "folder", str(folder / "images"), 0
    data.label_file, data.label_separator = str(folder / "labels.csv"), "|"
    for name, value in values.items():
        setattr(config, name, value)
    return config


def results(folder: Path) -> list[tuple[Any, Any]]:
    """Return figures, and choice or setting, of kNN and of both linear protocols; every rank reads rank 0's file."""
    for make in (swept, official):
        config = with_labels(make(folder / make.__name__), folder, batch_size=8)
        check_linear(config, 1)
        evaluate_linear(config)
    knn = KnnConfig(checkpoint=str(encoder_file(folder / "knn")), output=str(folder / "knn"))
    evaluate_knn(with_labels(knn, folder, k=[1, 5], temperature=[0.1, 1.0], compare=["untrained", "pixels"]))
    found = []
    for name in ("swept", "official", "knn"):
        entries = json.loads((folder / name / "results.json").read_text())
        found += [(each["figures"], each.get("chosen", each.get("choice"))) for each in entries]
    return found


def test_the_commands_report_mean_and_per_class_average_precision(tmp_path: Path) -> None:
    labeled_files(tmp_path)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        found = results(tmp_path)
    text = " ".join(output.getvalue().split())
    assert len(found) == 5
    for figures, _ in found:
        assert figures["count"] == 8
        assert [value is None for value in figures["per_class_ap"]] == [False, False, False, True]  # rare
        assert figures["mAP"] == pytest.approx(np.mean(figures["per_class_ap"][:3]))
        assert figures["mAP"] > 40
    assert "validation_mAP" in found[0][1][0]
    assert np.shape(found[2][1]["leave_one_out"]) == (2, 2)
    lines = "not in the mAP, because a split has no image of them: rare", "a random order has", "1 image has none"
    for part in ("mAP %", "leave-one-out mAP", *lines):
        assert part in text
    assert not list(tmp_path.rglob("confusion*.png"))


def test_seeds_give_the_mean_and_its_interval(tmp_path: Path) -> None:
    labeled_files(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluate_linear(with_labels(swept(tmp_path, seeds=2), tmp_path, batch_size=8))
    (entry,) = json.loads((tmp_path / "results.json").read_text())
    each = [one["mAP"] for one in entry["each_seed"]]
    assert entry["figures"]["mAP"] == pytest.approx(np.mean(each))
    assert entry["figures"]["mAP_half_width95"] == pytest.approx(12.7062 * np.std(each, ddof=1) / np.sqrt(2), rel=1e-4)


def test_hold_out_takes_a_part_of_all_images(tmp_path: Path) -> None:
    labeled_files(tmp_path)
    config = with_labels(swept(tmp_path), tmp_path, batch_size=8)
    lines = (tmp_path / "labels.csv").read_text().splitlines()
    (tmp_path / "labels.csv").write_text("\n".join(line.rpartition(",")[0] for line in lines))
    config.data.hold_out = 0.25
    with contextlib.redirect_stdout(io.StringIO()):
        evaluate_linear(config)
    (entry,) = json.loads((tmp_path / "results.json").read_text())
    assert (entry["data"]["training"], entry["data"]["held_out"]) == (18, 6)


def test_what_needs_one_class_per_image_says_so(tmp_path: Path) -> None:
    labeled_files(tmp_path)
    file = str(encoder_file(tmp_path))
    config = with_labels(FinetuneConfig(checkpoint=file, output=str(tmp_path)), tmp_path, labels_per_class=1)
    with pytest.raises(ConfigError, match=r"several labels each, and this command needs one class .*: use moco\.knn"):
        evaluate_finetune(config)
    knn = with_labels(KnnConfig(checkpoint=file, output=str(tmp_path)), tmp_path, labels_per_class=1)
    with pytest.raises(ConfigError, match=r"labels_per_class=1 needs one class per image"):
        evaluate_knn(knn)
    (tmp_path / "labels.csv").write_text(
        "\n".join(
            line.replace("dim", "a").replace("bright", "a").replace("odd", "a") if line.endswith("test") else line
            for line in (tmp_path / "labels.csv").read_text().splitlines()
        )
    )
    with pytest.raises(ConfigError, match="no label has an image in both"):
        evaluate_knn(with_labels(KnnConfig(checkpoint=file, output=str(tmp_path)), tmp_path))
