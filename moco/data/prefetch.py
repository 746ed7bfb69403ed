"""On a GPU: the next batch is made while the step computes.

Making one takes a copy to the device and some hundred small kernels. They are queued on a stream of their own, and run
beside the step's, in what those leave of the device, instead of before them.
"""

import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def one_ahead(items: Iterable[T]) -> Generator[T, None, None]:
    """The same items in the same order; before one is handed over, the next has been taken.

    An error keeps its place behind the items that came before it.
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


def made_ahead(
    made: Iterable[T], device: torch.device, tensors: Callable[[T], Sequence[Tensor]]
) -> Generator[T, None, None]:
    """The same items, each made on the device's side stream while the one before it is in use.

    Args:
        made: makes an item when asked for it, on whatever stream is the current one.
        device: a CUDA device.
        tensors: those of an item, all on the device.
    """
    side = _side_stream(device)

    def queued() -> Iterator[tuple[T, torch.cuda.Event]]:
        source = iter(made)
        while True:
            with torch.cuda.stream(side):  # closed again before the item leaves: the step has its own stream
                try:
                    item = next(source)
                except StopIteration:
                    return
                done = side.record_event()
            yield item, done

    side.wait_stream(torch.cuda.current_stream(device))  # what the caller has queued may be what items are made of
    for item, done in one_ahead(queued()):
        step = torch.cuda.current_stream(device)
        step.wait_event(done)
        for tensor in tensors(item):
            tensor.record_stream(step)  # else its memory could go to the side stream's next batch while still in use
        yield item


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all callers: what they keep between batches (the crop's tables of weights) is used on it only."""
    return torch.cuda.Stream(device)
