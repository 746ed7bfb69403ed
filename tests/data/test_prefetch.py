"""Prefetched batches: their order, their errors, and the synchronization of streams."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from moco.data.loader import Batch, batches
from moco.data.plan import Plan
from moco.data.prefetch import one_ahead, prefetched
from moco.data.sources import ArraySource
from moco.data.view import View


def counted(count: int, made: list[int], error: Exception | None = None) -> Iterator[int]:
    for i in range(count):
        made.append(i)
        yield i
    if error is not None:
        raise error


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_one_ahead_keeps_the_order_and_fetches_the_next_item_first(count: int) -> None:
    made: list[int] = []
    for i, item in enumerate(one_ahead(counted(count, made))):
        assert item == i
        assert made == list(range(min(i + 2, count)))
    assert made == list(range(count))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_an_error_is_raised_after_the_previous_items(count: int) -> None:
    given = []
    with pytest.raises(ValueError, match="the disk is gone"):  # noqa: PT012 # the loop raises it
        for item in one_ahead(counted(count, [], ValueError("the disk is gone"))):
            given.append(item)  # noqa: PERF402 # keeps the items before the error
    assert given == list(range(count))


def test_closing_closes_the_source() -> None:
    closed = []

    def source() -> Iterator[int]:
        try:
            yield from range(5)
        finally:
            closed.append(True)

    stream = one_ahead(source())
    assert next(stream) == 0
    stream.close()
    del stream
    assert closed == [True]


class FakeCuda:
    """A replacement of torch.cuda whose streams log their calls."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current = "step"

    def stand_in(self, name: str) -> Any:
        log = self.log

        class Stream:
            def __str__(self) -> str:
                return name

            def wait_stream(self, other: object) -> None:
                log.append(f"{name} waits for {other}")

            def wait_event(self, event: str) -> None:
                log.append(f"{name} waits for {event}")

            def record_event(self) -> str:
                return f"what follows {log[-1]}"

        return Stream()

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        before, self.current = self.current, str(stream)
        yield
        self.current = before


class FakeTensor:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def record_stream(self, stream: object) -> None:
        self.log.append(f"{self.name} belongs to {stream}")


def test_the_step_waits_only_for_its_batch_and_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    side = cuda.stand_in("side")
    monkeypatch.setattr("moco.data.prefetch._side_stream", lambda _: side)
    monkeypatch.setattr(torch.cuda, "stream", cuda.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: cuda.stand_in(cuda.current))

    def made() -> Iterator[str]:
        for i in range(3):
            cuda.log.append(f"batch {i} on {cuda.current}")
            yield f"batch {i}"

    stream = prefetched(made(), torch.device("cuda"), lambda name: [FakeTensor(name, cuda.log)])  # type: ignore[list-item]
    for i, item in enumerate(stream):
        assert item == f"batch {i}"
        assert cuda.current == "step"
        cuda.log.append(f"step {i}")
    handed = [
        [f"step waits for what follows batch {i} on side", f"batch {i} belongs to step", f"step {i}"] for i in range(3)
    ]
    assert cuda.log == [
        *("side waits for step", "batch 0 on side", "batch 1 on side"),
        *(*handed[0], "batch 2 on side"),
        *handed[1],
        *handed[2],
    ]


@pytest.mark.gpu
def test_batches_on_a_gpu_equal_those_on_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pixels = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    source = ArraySource(pixels, [""] * 64)
    views = [View(32, (0.2, 1.0), jitter_p=0.8, brightness=0.4, hue=0.1, gray_p=0.2, blur_p=0.5, flip_p=0.5)] * 2

    def all_of(device: str) -> list[Batch]:
        return list(batches(source, Plan(64, 16, 3, 0), views, torch.device(device), workers=0))

    for ours, theirs in zip(all_of("cuda"), all_of("cpu"), strict=True):
        assert torch.equal(ours.index.cpu(), theirs.index)
        for a, b in zip(ours.views, theirs.views, strict=True):
            assert (a.cpu() - b).abs().max() < 1e-5
