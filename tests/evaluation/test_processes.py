"""Two processes compute the results of one. All tests share one start of the two processes."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moco.distributed import is_rank_zero
from moco.evaluation.knn_classifier import KnnSettings, knn_accuracy, knn_classes, leave_one_out
from tests.data import images as example_images
from tests.distributed.launch import run_ranks
from tests.evaluation import (
    test_cache,
    test_finetuning,
    test_instance_retrieval,
    test_knn_classifier,
    test_linear,
    test_linear_probe,
    test_multi_label,
    test_sweep,
    test_transfer,
)


def knn() -> list[tuple[Any, ...]]:
    bank, queries = test_knn_classifier.features(131, 0), test_knn_classifier.features(173, 1)
    labels, truth = test_knn_classifier.classes(131, 2), test_knn_classifier.classes(173, 3)
    all_labels, rows, groups = torch.from_numpy(labels), torch.arange(0, 131, 2), torch.arange(131) // 2
    few = knn_accuracy(bank, labels, queries, truth, KnnSettings(3, 0.1, 2, 4))
    found = []
    for chunk in (20, 1024):  # 173 queries: nine parts, or a single one, so that the second rank has none
        settings = KnnSettings(20, query_chunk=chunk, bank_chunk=50)
        ranked = knn_classes(bank, all_labels, queries, test_knn_classifier.CLASSES, settings)
        found.append((ranked, leave_one_out(bank, labels, rows, [1, 20], [0.1, 0.5], groups, settings), few))
    return found


def linear(folder: Path) -> list[tuple[dict[str, Any], Any]]:
    """Return the results of both protocols on 23 training and 7 held-out images; every rank reads rank 0's file."""
    outcomes = []
    for make in (test_linear.swept, test_linear.official):
        output = folder / make.__name__
        config = test_linear.on_folders(make(output), folder / "train", folder / "test")
        config.batch_size = 8
        entry = test_linear.run(config)[-1]
        outcomes.append((entry["figures"], entry["chosen"]))
    return outcomes


def transfer(folder: Path) -> list[Any]:
    """Return the results of both modes on 23 training and 7 test images; a second call finds them all."""
    test_linear.encoder_file(folder / "transferred")  # now: `config` writes it on a rank that does not find it yet
    outcomes = []
    for mode in ("linear", "few_shot", "linear"):
        sets, sizes = [str(folder / "transfer")], {"ways": 2, "shots": 1, "queries": 1, "episodes": 20}
        config = test_transfer.config(folder / "transferred", sets, encoders=["pretrained", "untrained"], **sizes)
        config.mode = mode
        (found,), printed = test_transfer.run(config)
        values = {name: (each["value"], each.get("chosen")) for name, each in found.encoders.items()}
        outcomes.append((values, "2 of 2 encoders are already in" in printed or not is_rank_zero()))
    return outcomes


def cache(folder: Path) -> list[Any]:
    return [test_cache.keep(folder, "seven", 7), test_cache.keep(folder, "one", 1)]


def finetuning() -> list[Any]:
    return [test_finetuning.steps(0.0, "sgd"), test_finetuning.steps(0.5, "adamw")]


def everything(folder: Path) -> dict[str, Any]:
    return {
        "knn": knn(),
        "linear": linear(folder),
        "transfer": transfer(folder),
        "cache": cache(folder / "cache"),
        "finetuning": finetuning(),
        "linear_probe": test_linear_probe.trained(),
        "sweep": test_sweep.pick(),
        "multi_label": test_multi_label.results(folder / "multi_label"),
        "retrieval": test_instance_retrieval.measure(folder / "images", 4),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of one process, then those of the two ranks."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    for folder in folders:
        test_multi_label.labeled_files(folder / "multi_label")
        test_linear.write_images(folder / "train", {"dark": 8, "middle": 8, "light": 7})
        test_linear.write_images(folder / "test", {"dark": 3, "middle": 2, "light": 2}, 1)
        for part in ("train", "test"):
            shutil.copytree(folder / part, folder / "transfer" / part)
        example_images.folder(folder / "images", 10)
    return [everything(folders[0]), *run_ranks(2, everything, folders[1])]


def test_knn_is_equal_bit_for_bit(found: list[dict[str, Any]]) -> None:
    one, *ranks = (each["knn"] for each in found)
    for each in ranks:
        for (votes, accuracies, few), expected in zip(each, one, strict=True):
            assert torch.equal(votes, expected[0])
            assert np.array_equal(accuracies, expected[1])
            assert few == expected[2]


def test_both_linear_protocols_have_equal_results(found: list[dict[str, Any]]) -> None:
    one, *ranks = (each["linear"] for each in found)
    assert [figures["count"] for figures, _ in one] == [7, 7]
    assert ranks == [one, one]


def test_transfer_has_equal_results(found: list[dict[str, Any]]) -> None:
    one, *ranks = (each["transfer"] for each in found)
    assert [again for _, again in one] == [False, False, True]
    for each in ranks:
        assert [values for values, _ in each] == [values for values, _ in one]
    assert [again for _, again in ranks[0]] == [False, False, True]


def test_ranks_write_one_cache_file_together(found: list[dict[str, Any]]) -> None:
    """Neither 7 nor 1 divides by two; of one row the second process has none."""
    _, first, second = (each["cache"] for each in found)
    for count, (mine, seen), (theirs, others_seen) in zip((7, 1), first, second, strict=True):
        assert torch.equal(mine, test_cache.FEATURES[:count])
        assert torch.equal(theirs, test_cache.FEATURES[:count])
        assert sorted(seen + others_seen) == list(range(count))


def test_fine_tuning_makes_the_same_steps(found: list[dict[str, Any]]) -> None:
    """Also with MixUp and CutMix, whose pairs cross ranks, and with 23 held-out images."""
    truth = np.arange(23) % 3
    one, *ranks = (each["finetuning"] for each in found)
    for each in ranks:
        for (weights, losses, scores), (other_weights, other_losses, other_scores) in zip(one, each, strict=True):
            assert len(losses) == 9
            assert other_losses == pytest.approx(losses, abs=1e-5)
            for key, value in weights.items():
                torch.testing.assert_close(other_weights[key], value, atol=1e-5, rtol=1e-5)
            assert np.array_equal(other_scores.argmax(1).numpy() == truth, scores.argmax(1).numpy() == truth)
            torch.testing.assert_close(other_scores, scores, atol=1e-4, rtol=1e-4)


def test_the_official_probe_trains_the_same_head_and_reports_the_same_metrics(found: list[dict[str, Any]]) -> None:
    (weight, bias, epoch_log), *ranks = (each["linear_probe"] for each in found)
    for other_weight, other_bias, other_log in ranks:
        torch.testing.assert_close(other_weight, weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other_bias, bias, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(other_log), torch.tensor(epoch_log), rtol=1e-4, atol=1e-5)


def test_a_sweep_chooses_and_scores_as_one_process(found: list[dict[str, Any]]) -> None:
    one, *ranks = (each["sweep"] for each in found)
    assert ranks == [one, one]


def test_retrieval_is_equal(found: list[dict[str, Any]]) -> None:
    one, *ranks = (each["retrieval"] for each in found)
    assert ranks == [one, one]


def test_several_labels_have_equal_results(found: list[dict[str, Any]]) -> None:
    one, *ranks = (each["multi_label"] for each in found)
    assert [figures["count"] for figures, _ in one] == [8] * 5
    for each in ranks:
        for (figures, chosen), (others, other_choice) in zip(one, each, strict=True):
            assert others["per_class_ap"] == pytest.approx(figures["per_class_ap"])
            assert others["mAP"] == pytest.approx(figures["mAP"])
            assert str(other_choice) == str(chosen)
