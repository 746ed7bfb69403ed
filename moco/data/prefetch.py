"""Prefetching on a GPU: the next batch is made while the step computes.

Making a batch needs copies to the device and a few kernels (hundreds if those of `moco.kernels` cannot run). They run
on a stream of their own, beside the kernels of the step instead of before them.
"""

import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def one_ahead(items: Iterable[T]) -> Generator[T, None, None]:
    """Yield the same items in the same order, fetching the next one before an item is yielded.

    An error is raised after the items before it were yielded.
    """
    held: list[T] = []
    try:
        for item in items:
            if held:
                yield held.pop()
            held.append(item)
    except Exception:
        yield from held
        raise
    yield from held


def prefetched(
    made: Iterable[T], device: torch.device, tensors: Callable[[T], Sequence[Tensor]]
) -> Generator[T, None, None]:
    """Yield the same items, each made on the device's side stream while the previous one is in use.

    Args:
        made: makes an item on request, on the current stream.
        device: a CUDA device.
        tensors: returns an item's tensors, all on the device.
    """
    side = _side_stream(device)

    def queued() -> Iterator[tuple[T, torch.cuda.Event]]:
        source = iter(made)
        while True:
            with torch.cuda.stream(side):  # the block ends before the yield, because the step has its own stream
                try:
                    item = next(source)
                except StopIteration:
                    return
                done = side.record_event()
            yield item, done

    side.wait_stream(torch.cuda.current_stream(device))  # the items may depend on what the caller has queued
    for item, done in one_ahead(queued()):
        step = torch.cuda.current_stream(device)
        step.wait_event(done)
        for tensor in tensors(item):
            tensor.record_stream(step)  # otherwise its memory could be reused by the next batch while still in use
        yield item


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the side stream of a device, always the same one.

    Batches share cached tables (the crop's weights); on another stream a table could be read before it is written.
    """
    return torch.cuda.Stream(device)
