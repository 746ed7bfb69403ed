"""Process group, gather, global permutation. A world of one process is not a special case for callers.

The global batch is the ranks' local batches in the order of their ranks; everything that the
mathematics sees is defined on it (law 3).

Legend: W processes, n samples on each.
"""

import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


def rank() -> int:
    """This process's number, 0 ... W - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes, W."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_rank_zero() -> bool:
    """Whether this is rank 0, which alone writes and speaks."""
    return rank() == 0


class PeerLost(ValueError):
    """A process that others wait for has ended; the message is one sentence."""


# What gloo says, in errors of no class of their own, of a peer that is gone. NCCL and the store have classes.
_GONE = re.compile(r"gloo|connection (was )?(closed|reset|refused)|broken pipe", re.IGNORECASE)


@contextmanager
def process_group(device: torch.device, timeout_minutes: float = 10.0) -> Iterator[None]:
    """Joins the process group that torchrun announced in the environment; without one, does nothing.

    Raises:
        PeerLost: in place of the backend's error where another process has gone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(minutes=timeout_minutes),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not _GONE.search(str(error)):
            raise
        raise PeerLost(
            f"another process of this run has ended or does not answer ({str(error).splitlines()[0]:.200}): its own "
            "words say why"
        ) from error
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """All ranks' rows in the order of the ranks, without gradient: (n, ...) -> (W n, ...)."""
    if world_size() == 1:
        return x
    out = x.new_empty(world_size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous())
    return out


class _GatherRows(torch.autograd.Function):
    """All ranks' rows; the gradient of a rank's rows is the sum of what all ranks' losses ask of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        return gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)  # a reduce-scatter, which gloo has not; the gradient of embeddings is small
        return grad[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather_with_gradient(x: Tensor) -> Tensor:
    """All ranks' rows in the order of the ranks, differentiable: (n, ...) -> (W n, ...).

    Backward sums over ranks the gradients of this rank's rows, nothing is divided by W. Let each rank's loss be the
    mean over its own n queries (against the gathered rows), so that the global batch's loss L is the mean of the
    ranks' losses. Each rank then holds W times its share of dL/dparameters, through its queries and its rows, and
    the average over ranks that DDP takes makes that dL/dparameters, as one process has it: nothing to multiply by W.

    Backward is a collective: every rank must run it, in the same order as the others.
    """
    if world_size() == 1:
        return x
    out: Tensor = _GatherRows.apply(x)
    return out


@torch.no_grad()
def permute(x: Tensor, order: NDArray[np.int64]) -> Tensor:
    """This rank's share of the permuted global batch, `global[order]`, without gathering it.

    Each rank sends every row once, straight to the rank that needs it, so at most n rows leave a
    rank, where an all-gather sends each row to all W - 1 others.

    Args:
        x: this rank's rows, shape (n, ...).
        order: a permutation of 0 ... W n - 1, the same on every rank.

    Returns:
        Rows rank n ... (rank + 1) n - 1 of global[order], shape (n, ...).
    """
    ranks, me, n = world_size(), rank(), len(x)
    if ranks == 1:
        return x[torch.from_numpy(order).to(x.device)]
    wanted = order.reshape(ranks, n)  # row r: what rank r is to hold, as global positions
    owner = wanted // n
    outgoing = [wanted[r][owner[r] == me] - me * n for r in range(ranks)]  # in the order in which r wants them
    received = x.new_empty(x.shape)
    dist.all_to_all_single(
        received,
        x[torch.from_numpy(np.concatenate(outgoing)).to(x.device)].contiguous(),
        output_split_sizes=[int((owner[me] == r).sum()) for r in range(ranks)],
        input_split_sizes=[len(rows) for rows in outgoing],
    )
    # Rows arrive sorted by the rank they come from; put each where it was wanted.
    arrival = torch.from_numpy(np.argsort(np.argsort(owner[me], kind="stable"))).to(x.device)
    return received[arrival]


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks, whose gradient is again the sum over ranks (every rank's loss sees the sum)."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        out = x.clone()
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> Tensor:
        grad = grads[0].clone()
        dist.all_reduce(grad)
        return grad


def sum_over_ranks(x: Tensor) -> Tensor:
    """Differentiable sum over ranks."""
    if world_size() == 1:
        return x
    out: Tensor = _SumOverRanks.apply(x)
    return out


@torch.no_grad()
def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean over ranks, without gradient."""
    if world_size() == 1:
        return x
    out = x.clone()
    dist.all_reduce(out)
    return out / world_size()


class MaxOverRanks:
    """The highest of the numbers that ranks bring, for what any one of them may ask of all at any step.

    With several ranks the answer is one call late, and the same on all: each call starts a reduction and gives what
    the call before found, whose answer has had a step's time to arrive. The number does not ride on the measures that
    a step averages anyway, to keep the step free of what is not in the paper. One process has its answer at once.

    Args:
        device: where the process group reduces.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._found = torch.zeros((), dtype=torch.int64)
        self._arrived: torch.cuda.Event | None = None

    def __call__(self, mine: int) -> int:
        if world_size() == 1:
            return mine
        if self._arrived is not None:
            self._arrived.synchronize()
        before, asked = int(self._found), torch.full((), mine, dtype=torch.int64, device=self._device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        self._found = asked.to("cpu", non_blocking=True)  # from a GPU into pinned memory: the host goes on
        if self._device.type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        return before


@torch.no_grad()
def broadcast_module(module: nn.Module) -> None:
    """Rank 0's parameters and buffers become everyone's: once, before the first step."""
    if world_size() > 1:
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.data, src=0)


@torch.no_grad()
def average_running_statistics(module: nn.Module) -> None:
    """Averages BN's running statistics over ranks, before they are used or saved.

    They follow a linear recurrence, so their average is what one process would hold (the mean of
    the group statistics), whenever it is taken.
    """
    if world_size() > 1:
        for name, buffer in module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(mean_over_ranks(buffer))


def on_rank_zero(function: Callable[[], T]) -> T:
    """Calls the function on rank 0 alone; every rank gets its result, or raises its exception.

    Without this a rank 0 that finds a bad directory leaves the others waiting for it.
    """
    if world_size() == 1:
        return function()
    outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
    if is_rank_zero():
        try:
            outcome = [(function(), None)]
        except Exception as error:  # handed on to every rank
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return cast(T, result)


def all_gather_object(function: Callable[[], T]) -> list[T]:
    """Calls the function on every rank and gives all their results, in the order of the ranks.

    If one raises, all raise that exception (of several the lowest rank's). Without this a rank that meets a picture it
    cannot read leaves the others in a collective that never ends, or ends in an error that says nothing of the picture.
    What they return travels pickled, so let it be small.
    """
    if world_size() == 1:
        return [function()]
    mine: tuple[T | None, Exception | None]
    try:
        mine = (function(), None)
    except Exception as error:  # handed on to every rank
        mine = (None, error)
    outcomes: list[Any] = [None] * world_size()
    dist.all_gather_object(outcomes, mine)
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return [result for result, _ in outcomes]


def max_over_ranks(mine: int) -> int:
    """The highest of the ranks' numbers, at once: for where all wait for each other anyway; see `MaxOverRanks`."""
    return max(all_gather_object(lambda: mine))


def all_or_none(function: Callable[[], T]) -> T:
    """What the function returns on this rank, of any size; if it raises on one rank, it raises on all."""
    kept: list[T] = []
    all_gather_object(lambda: kept.append(function()))
    return kept[0]


def synchronized(items: Iterable[T]) -> Iterator[T]:
    """The items of this rank, as many as every other rank has; if getting one raises on one rank, it raises on all."""
    left = iter(items)
    while item := all_or_none(lambda: list(islice(left, 1))):
        yield item[0]


def data_parallel(method: nn.Module, device: torch.device) -> nn.Module:
    """DDP around the method, or the method itself in a world of one.

    Buffers stay out of DDP: it would send the queue, 33 MB, before every forward, and rank 0's copy would win.
    """
    if world_size() == 1:
        return method
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch >= 2.15, before
    options: dict[str, Any] = {name: False}
    return DistributedDataParallel(method, device_ids=[device] if device.type == "cuda" else None, **options)
