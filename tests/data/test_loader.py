"""Law 2 end to end: the views do not depend on workers, processes, path, or the point of resume."""

import multiprocessing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moco.config import DataConfig
from moco.data.decode import ImageError
from moco.data.folder import FolderSource
from moco.data.keyed import ORDER, permutation
from moco.data.loader import Batch, batches, crops
from moco.data.plan import Plan
from moco.data.sources import ArraySource, Source, load_source
from moco.data.view import View

CPU = torch.device("cpu")
COLOR = View(
    24,
    (0.2, 1.0),
    jitter_p=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    gray_p=0.2,
    blur_p=0.5,
    flip_p=0.5,
)
VIEWS = (COLOR, View(24, (0.2, 1.0), solarize_p=0.2, flip_p=0.5, noise=(0.0, 0.1)))
LENGTH, BATCH, EPOCHS, SEED = 22, 8, 3, 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 images of one size in a lossless format."""
    root = tmp_path_factory.mktemp("images")
    chance = np.random.default_rng(0)
    for i in range(LENGTH):
        pixels = chance.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 30)).save(root / f"{i:02d}.png")
    return root


def plan(rank: int = 0, processes: int = 1) -> Plan:
    return Plan(LENGTH, BATCH, EPOCHS, SEED, rank, processes)


def all_batches(source: Source, which: Plan, workers: int = 0, start: int = 0) -> list[Batch]:
    return list(batches(source, which, VIEWS, CPU, workers, start))


def equal(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.index, y.index) and all(torch.equal(v, w) for v, w in zip(x.views, y.views, strict=True))
        for x, y in zip(a, b, strict=True)
    )


@pytest.fixture(scope="module")
def streamed(folder: Path) -> Source:
    return load_source(DataConfig("folder", str(folder))).train


@pytest.fixture(scope="module")
def reference(streamed: Source) -> list[Batch]:
    return all_batches(streamed, plan())


@pytest.mark.parametrize("workers", [1, 4])
def test_views_do_not_depend_on_the_number_of_workers(streamed: Source, reference: list[Batch], workers: int) -> None:
    assert equal(all_batches(streamed, plan(), workers), reference)


def test_resident_views_are_bit_equal(folder: Path, reference: list[Batch]) -> None:
    resident = load_source(DataConfig("folder", str(folder), resident=True)).train
    assert resident.images is not None
    assert equal(all_batches(resident, plan()), reference)


@pytest.mark.parametrize("processes", [2, 4])
def test_shares_of_ranks_form_the_global_batch(streamed: Source, reference: list[Batch], processes: int) -> None:
    shares = [all_batches(streamed, plan(rank, processes)) for rank in range(processes)]
    together = [
        Batch(
            torch.cat([each.index for each in step]),
            [torch.cat(v) for v in zip(*(each.views for each in step), strict=True)],
        )
        for step in zip(*shares, strict=True)
    ]
    assert equal(together, reference)


@pytest.mark.parametrize("start", [1, 2, 5])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resume_continues_with_the_same_views(
    streamed: Source, reference: list[Batch], start: int, workers: int
) -> None:
    assert equal(all_batches(streamed, plan(), workers, start), reference[start:])


def test_another_seed_epoch_or_view_gives_other_views(streamed: Source, reference: list[Batch]) -> None:
    other = next(batches(streamed, Plan(LENGTH, BATCH, EPOCHS, SEED + 1), VIEWS, CPU, 0))
    assert not torch.equal(other.views[0], reference[0].views[0])
    # The same image in two epochs, and the same recipe as first and as second view.
    same = next(batches(streamed, plan(), (COLOR, COLOR), CPU, 0))
    assert not torch.equal(same.views[0], same.views[1])
    first = {int(i): view for batch in reference[:2] for i, view in zip(batch.index, batch.views[0], strict=True)}
    again = {int(i): view for batch in reference[2:4] for i, view in zip(batch.index, batch.views[0], strict=True)}
    shared = first.keys() & again.keys()
    assert shared
    assert all(not torch.equal(first[i], again[i]) for i in shared)


def test_each_epoch_has_its_own_permutation_in_full_batches() -> None:
    which = plan()
    assert (which.steps_per_epoch, which.total_steps) == (2, 6)
    steps = list(which.samples(0))
    assert [epoch for epoch, _ in steps] == [0, 0, 1, 1, 2, 2]
    for epoch in range(EPOCHS):
        seen = np.concatenate([index for of, index in steps if of == epoch])
        assert np.array_equal(seen, permutation(SEED, epoch, LENGTH, ORDER)[:16])
        assert len(set(seen.tolist())) == 16


def test_shuffles_are_permutations_that_differ_per_step_and_view() -> None:
    shuffles = [tuple(each) for step in range(4) for each in plan().shuffles(step, 2)]
    assert all(sorted(each) == list(range(BATCH)) for each in shuffles)
    assert len(set(shuffles)) == len(shuffles)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_in_one_sentence(folder: Path, tmp_path: Path, workers: int) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "03.png").write_bytes(b"not an image")
    source = load_source(DataConfig("folder", str(tmp_path))).train
    with pytest.raises(ImageError, match=r"03\.png") as caught:
        all_batches(source, Plan(LENGTH, 22, 1, SEED), workers)
    assert "\n" not in str(caught.value)


class ShowsThreads(FolderSource):
    """Images whose brightness is the number of threads of the process that loads them."""

    def __init__(self) -> None:
        super().__init__("", np.array([b"missing"] * LENGTH))

    def image(self, i: int) -> torch.Tensor:
        return torch.full((3, 24, 24), torch.get_num_threads(), dtype=torch.uint8)

    def name(self, i: int) -> str:
        return str(i)


def test_a_worker_has_one_thread() -> None:
    # Two threads in each of two workers on two cores are eight times slower.
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for workers, threads in ((0, 3), (1, 1)):
            _, _, _, cut, _ = next(crops(ShowsThreads(), plan(), VIEWS, CPU, workers))
            assert all((each == threads).all() for each in cut)
    finally:
        torch.set_num_threads(before)


def test_closing_ends_the_workers(streamed: Source) -> None:
    stream = batches(streamed, plan(), VIEWS, CPU, 2)
    next(stream)
    assert len(multiprocessing.active_children()) == 2
    stream.close()
    assert multiprocessing.active_children() == []


def test_a_batch_is_on_the_device_with_its_indices() -> None:
    source = ArraySource(torch.zeros(LENGTH, 3, 24, 24, dtype=torch.uint8), [""] * LENGTH)
    (batch,) = islice(batches(source, plan(), VIEWS, CPU, 0), 1)
    assert batch.index.shape == (BATCH,)
    assert [view.shape for view in batch.views] == [(BATCH, 3, 24, 24)] * 2
    assert batch.views[0].dtype == torch.float32
