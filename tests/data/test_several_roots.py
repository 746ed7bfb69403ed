"""Several folders with weights: how often an epoch draws their images, one order on any number of processes."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moco.config import ConfigError, DataConfig
from moco.data.keyed import ORDER, permutation
from moco.data.loader import batches
from moco.data.plan import Plan
from moco.data.sources import load_source, refuse_output_inside
from moco.data.view import View
from moco.distributed import gather, rank, world_size
from tests.data.images import gradient
from tests.distributed.launch import run_ranks

CPU, VIEWS = torch.device("cpu"), (View(8, (0.3, 1.0), flip_p=0.5), View(8, (0.3, 1.0), jitter_p=1.0, brightness=0.4))


def write(folder: Path, count: int, *classes: str) -> str:
    for i in range(count):
        path = folder / (classes[i % len(classes)] if classes else "") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        gradient(i, 12, 12).save(path)
    return str(folder)


def data(first: str, *others: str, **fields: Any) -> DataConfig:
    return DataConfig("folder", first, more_roots=list(others), **fields)


def epochs(plan: Plan) -> list[list[int]]:
    """Return the samples of each epoch in their order."""
    found: list[list[int]] = [[] for _ in range(plan.epochs)]
    for epoch, samples in plan.samples(0):
        found[epoch] += samples.tolist()
    return found


# ---- the order of an epoch ----


@pytest.mark.parametrize("draws", [((6, 6), (4, 12)), ((6, 9), (4, 2)), ((6, 1), (4, 4)), ((10, 25),)])
def test_an_epoch_draws_as_often_as_stated(draws: tuple[tuple[int, int], ...]) -> None:
    plan = Plan(10, 1, 40, seed=3, draws=draws)
    totals = Counter[int]()
    for samples in epochs(plan):
        assert (
            len(samples)
            == len(set(samples))
            == plan.samples_per_epoch
            == plan.steps_per_epoch
            == sum(n for _, n in draws)
        )
        images = Counter(sample % 10 for sample in samples)
        totals.update(images)
        first = 0
        for count, drawn in draws:
            each = [images[i] for i in range(first, first + count)]
            assert sum(each) == drawn
            assert set(each) <= {drawn // count, -(-drawn // count)}
            first += count
    first = 0
    for count, drawn in draws:  # over the epochs each image of a folder is drawn equally often
        for i in range(first, first + count):
            assert totals[i] == pytest.approx(40 * drawn / count, rel=0.5, abs=6)
        first += count


def test_weights_of_one_are_the_order_without_weights() -> None:
    assert epochs(Plan(10, 1, 3, 5, draws=((6, 6), (4, 4)))) == epochs(Plan(10, 1, 3, 5))
    assert epochs(Plan(10, 1, 1, 5))[0] == permutation(5, 0, 10, ORDER).tolist()


def test_half_of_the_images_are_others_in_each_epoch() -> None:
    chosen = [
        {sample for sample in samples if sample >= 6} for samples in epochs(Plan(16, 1, 5, 0, draws=((6, 6), (10, 5))))
    ]
    assert [len(each) for each in chosen] == [5] * 5
    assert len({frozenset(each) for each in chosen}) > 1


def test_a_start_in_the_middle_continues_the_order() -> None:
    plan = Plan(10, 4, 3, 2, draws=((6, 9), (4, 12)))
    complete = list(plan.samples(0))
    for start in (1, 5, 7, 14):
        for (epoch, samples), (other, others) in zip(complete[start:], plan.samples(start), strict=True):
            assert epoch == other
            assert samples.tolist() == others.tolist()


# ---- images and views ----


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("roots")
    return write(folder / "a" / "images", 5, "cat", "dog"), write(folder / "b" / "images", 4, "dog", "owl")


def test_images_of_all_folders_have_names_files_and_labels(roots: tuple[str, str]) -> None:
    source = load_source(data(*roots, labels="folder", weights=[1.0, 2.6])).train
    names = [f"0/{'cat' if i in (0, 2, 4) else 'dog'}/{i}.png" for i in (0, 2, 4, 1, 3)]
    names += [f"1/{'dog' if i in (0, 2) else 'owl'}/{i}.png" for i in (0, 2, 1, 3)]
    assert [source.name(i) for i in range(len(source))] == names
    assert source.path(5) == f"{roots[1]}/dog/0.png"
    assert source.classes == ("cat", "dog", "owl")
    assert source.labels is not None
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert source.draws == ((5, 5), (4, 10))
    assert source.subset(np.arange(3)).draws == ()
    assert torch.equal(source.image(5), load_source(DataConfig("folder", roots[1])).train.image(0))
    resident = load_source(data(*roots, weights=[1.0, 2.6], resident=True)).train
    assert resident.images is not None
    assert resident.draws == source.draws


def drawn(config: DataConfig, workers: int = 0, start: int = 0) -> list[list[Tensor]]:
    """Return index and views of each global batch."""
    source = load_source(config).train
    plan = Plan(len(source), 4, 2, 7, rank(), world_size(), source.draws)
    stream = batches(source, plan, VIEWS, CPU, workers, start)
    return [[gather(each) for each in (batch.index, *batch.views)] for batch in stream]


def same(first: list[list[Tensor]], second: list[list[Tensor]]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


def test_each_draw_of_an_image_has_other_views(roots: tuple[str, str]) -> None:
    made = drawn(data(*roots, weights=[1.0, 3.0]))
    epoch = made[: len(made) // 2]
    index, views = torch.cat([each[0] for each in epoch]), torch.cat([each[1] for each in epoch])
    assert int(index.max()) < 9  # the images, for labels and queue
    for image in range(5, 9):
        repeated = views[index == image]
        assert len(repeated) >= 2
        assert len(repeated.flatten(1).unique(dim=0)) == len(repeated)


def test_memory_workers_and_start_change_nothing(roots: tuple[str, str]) -> None:
    weighted = data(*roots, weights=[0.6, 3.0])
    expected = drawn(weighted)
    assert same(drawn(weighted, workers=2), expected)
    assert same(drawn(data(*roots, weights=[0.6, 3.0], resident=True)), expected)
    assert same(drawn(weighted, start=3), expected[3:])


def test_two_processes_draw_the_batches_of_one(roots: tuple[str, str]) -> None:
    weighted = data(*roots, weights=[0.6, 3.0])
    expected = drawn(weighted)
    for found in run_ranks(2, drawn, weighted):
        assert same(found, expected)


# ---- mistakes ----


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        (
            {"weights": [1.0]},
            r"data\.weights=\[1\.0\] must hold one number for data\.root and .* data\.more_roots=\[.*\]: set 2 numbers",
        ),
        ({"weights": [1.0, 2.0], "more_roots": []}, r"data\.more_roots=\[\]: set data\.more_roots"),
        ({"weights": [1.0, 0.0]}, r"data\.weights"),
        ({"name": "cifar10"}, r"data\.more_roots=.* works with data\.name=folder or video only"),
        ({"label_file": "x.csv"}, r"data\.label_file='x\.csv' works with one folder: remove data\.more_roots"),
    ],
)
def test_fields_that_do_not_fit_are_refused(roots: tuple[str, str], fields: dict[str, Any], error: str) -> None:
    config = data(*roots)
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(ConfigError, match=error):
        load_source(config)


def test_folders_within_each_other_and_missing_ones_are_refused(roots: tuple[str, str], tmp_path: Path) -> None:
    for first, second in (roots[:1] * 2, (roots[0], f"{roots[0]}/cat"), (f"{roots[1]}/owl", roots[1])):
        with pytest.raises(ValueError, match=r"data\.more_roots=.* and .* overlap .*: name separate folders"):
            load_source(data(first, second))
    with pytest.raises(FileNotFoundError, match=r"data\.more_roots=.*nowhere .*does not exist: check the path"):
        load_source(data(roots[0], str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"data\.eval_root=.* and data\.more_roots=.* overlap"):
        load_source(data(*roots, labels="folder", eval_root=roots[1]))
    with pytest.raises(ConfigError, match=r"run=.* lies in data\.more_roots="):
        refuse_output_inside(data(*roots), "run", f"{roots[1]}/run")


def test_one_sample_can_remain_of_a_small_folder(tmp_path: Path) -> None:
    source = load_source(data(write(tmp_path / "a", 3), write(tmp_path / "b", 2), weights=[1.0, 0.01])).train
    assert source.draws == ((3, 3), (2, 1))
    assert len(list(islice(Plan(5, 4, 1, 0, draws=source.draws).samples(0), 9))) == 1
