"""Process group and collectives. All functions also work in a single process.

The global batch is the local batches of all ranks, in the order of the ranks. Everything that affects the results is
defined on it (law 3 of CONTRIBUTING.md).

Legend: W processes, n samples per process.
"""

import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.nn.functional import all_reduce
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
Order = NDArray[np.int64] | Tensor  # a permutation, (samples,); a tensor on the device only with one process

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.14: new name

warnings.filterwarnings("ignore", "torch.distributed.nn.functional.all_reduce is deprecated", FutureWarning)


def rank() -> int:
    """Return the number of this process, 0 ... W - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes, W."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_rank_zero() -> bool:
    """Return whether this is rank 0, the only rank that prints and writes results."""
    return rank() == 0


class PeerLost(ValueError):
    """Another process of the run has exited or does not respond; the message is one sentence."""


# gloo's messages about a process that has exited; gloo has no class for this error, NCCL and the store have one.
_PEER_LOST = re.compile(r"gloo|connection (was )?(closed|reset|refused)|broken pipe", re.IGNORECASE)


@contextmanager
def process_group(device: torch.device, timeout_minutes: float = 10.0) -> Iterator[None]:
    """Join the process group that torchrun configured in the environment, if any: NCCL on a GPU, gloo on a CPU.

    Raises:
        PeerLost: instead of the backend's error, if another process exits or does not respond for `timeout_minutes`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    on_gpu, timeout = device.type == "cuda", timedelta(minutes=timeout_minutes)
    try:
        store, own_rank, size = next(rendezvous("env://", timeout=timeout))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
            # After a restart, torchrun's store still holds the addresses of the killed processes, so each attempt has a
            # prefix of its own. Several nodes may count restarts differently: for them, scripts/train_multi_node.sh
            # makes the processes use a new store.
            store = PrefixStore(f"moco/attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            timeout=timeout,
            store=store,
            rank=own_rank,
            world_size=size,
            device_id=device if on_gpu else None,
        )
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not _PEER_LOST.search(str(error)):
            raise
        problem = f"another process of this run exited or is not responding ({_shortened(str(error).splitlines()[0])})"
        fix = "see its error message; without one, it was killed; run the same command again"
        raise PeerLost(f"{problem}: {fix}") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to the device. The copy from pinned memory is queued: the host does not wait for it."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)  # not queued: on MPS, the host's memory could be freed before the copy


def _shortened(text: str) -> str:
    """Return at most 200 characters of a text, and an ellipsis if it is longer."""
    return text if len(text) <= 200 else f"{text[:200].rpartition(' ')[0]} ..."


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """Return the rows of all ranks, in the order of the ranks, without gradient: (n, ...) -> (W n, ...)."""
    if world_size() == 1:
        return x
    out = x.new_empty(world_size() * len(x), *x.shape[1:])
    _all_gather(out, x.contiguous())
    return out


def gather_with_gradient(x: Tensor) -> Tensor:
    """Return the rows of all ranks, in the order of the ranks, differentiable: (n, ...) -> (W n, ...).

    Backward sums the gradients of this rank's rows over ranks, and does not divide by W. If each rank's loss is the
    mean over its own n queries, the loss L of the global batch is the mean of the ranks' losses. Each rank then holds W
    times its share of dL/dparameters, and the average over ranks that DDP takes is dL/dparameters, as in one process.
    So the loss must not be multiplied by W.

    Backward is a collective: every rank must run it, in the same order.
    """
    if world_size() == 1:
        return x
    # The rows of other ranks are zeros here. torch 2.15's differentiable `all_gather` would need contiguous gradients.
    return sum_over_ranks(torch.cat([x if each == rank() else torch.zeros_like(x) for each in range(world_size())]))


@torch.no_grad()
def permute(x: Tensor, order: Order) -> Tensor:
    """Return this rank's share of the permuted global batch, `global[order]`, without gathering it.

    Each row is sent once, directly to the rank that needs it: at most n rows leave a rank. An all-gather would send
    each row to all W - 1 other ranks.

    Args:
        x: this rank's rows, shape (n, ...).
        order: a permutation of 0 ... W n - 1, the same on every rank.

    Returns:
        Rows rank * n ... (rank + 1) * n - 1 of global[order], shape (n, ...).
    """
    ranks, me, n = world_size(), rank(), len(x)
    if isinstance(order, Tensor):
        return x[order]
    if ranks == 1:
        return x[copy_to_device(torch.from_numpy(order), x.device)]
    positions = order.reshape(ranks, n)  # row r: the global positions that rank r receives
    owner = positions // n
    outgoing = [positions[r][owner[r] == me] - me * n for r in range(ranks)]  # in the order that rank r needs
    received = x.new_empty(x.shape)
    dist.all_to_all_single(
        received,
        x[copy_to_device(torch.from_numpy(np.concatenate(outgoing)), x.device)].contiguous(),
        output_split_sizes=[int((owner[me] == r).sum()) for r in range(ranks)],
        input_split_sizes=[len(rows) for rows in outgoing],
    )
    # Rows arrive sorted by the rank that sent them: put each at its position.
    arrival = torch.from_numpy(np.argsort(np.argsort(owner[me], kind="stable")))
    return received[copy_to_device(arrival, x.device)]


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the sum over ranks. Its gradient is summed over ranks too: the loss of every rank depends on the sum."""
    return x if world_size() == 1 else cast(Tensor, all_reduce(x))


@torch.no_grad()
def mean_over_ranks(x: Tensor) -> Tensor:
    """Return the mean over ranks, without gradient."""
    if world_size() == 1:
        return x
    out = x.clone()
    dist.all_reduce(out)
    return out / world_size()


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace each gradient by its mean over ranks, as DDP does, with one collective. Does nothing with one process."""
    if world_size() == 1:
        return
    gradients = [each.grad for each in parameters if each.grad is not None]
    # Flat views in the order of the memory, which is dense. `flatten` would copy a gradient that is channels-last.
    flat = [each.as_strided((each.numel(),), (1,)) for each in gradients]
    means = mean_over_ranks(torch.cat(flat))
    torch._foreach_copy_(flat, means.split([each.numel() for each in flat]))


class HostCopy:
    """A copy of a tensor on the host. From a GPU the copy is queued: only `tolist` waits until it has arrived."""

    def __init__(self, tensor: Tensor) -> None:
        self._values, self._arrived = tensor.detach(), cast(torch.cuda.Event | None, None)
        if tensor.device.type == "cuda":
            # Copying into pinned memory does not make the host wait.
            pinned = torch.empty_like(self._values, device="cpu", pin_memory=True)
            self._values = pinned.copy_(self._values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def tolist(self) -> Any:
        """Return the values as `Tensor.tolist` does: a number, or a list of numbers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


class DelayedMaxOverRanks:
    """Maximum over ranks without waiting, for requests that any rank can make at any step, such as a stop signal.

    With several ranks the result is one call late: each call starts a reduction and returns the result of the previous
    call, which has had a step's time to arrive. The result is the same on all ranks. One process gets its own number
    immediately. The training step does not contain this reduction, so that the step is only the algorithm of the paper.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._result = HostCopy(torch.zeros((), dtype=torch.int64))

    def __call__(self, number: int) -> int:
        if world_size() == 1:
            return number
        previous, maximum = int(self._result.tolist()), torch.full((), number, dtype=torch.int64, device=self._device)
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
        self._result = HostCopy(maximum)
        return previous


@torch.no_grad()
def broadcast_module(module: nn.Module) -> None:
    """Copy rank 0's parameters and buffers to all ranks; called once, before the first step."""
    if world_size() > 1:
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.data, src=0)


@contextmanager
def averaged_running_statistics(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Replace BN's running statistics by their average over ranks, to use or save them, and restore them at the end.

    Running statistics are linear in those of the batches. So their average over ranks equals at any step the statistics
    of a single process, which averages over all BN groups. Each rank then continues with its own statistics: when and
    how often the average is taken does not change the training, not even by rounding.

    Yields:
        For a checkpoint, {"statistics": those of each rank, one after the other, (W, total)}; {} with one process or
        without BN.
    """
    buffers = _running_statistics(module)
    if world_size() == 1 or not buffers:
        yield {}
        return
    own = torch.cat([buffer.flatten() for buffer in buffers])  # (total,)
    of_ranks = gather(own[None])  # (W, total)
    _fill(buffers, of_ranks.mean(dim=0))
    try:
        yield {"statistics": of_ranks}
    finally:
        _fill(buffers, own)


def restore_running_statistics(module: nn.Module, of_ranks: Tensor | None) -> None:
    """Restore this rank's statistics from those in a checkpoint, one row per rank: (ranks of the saved run, total).

    Does nothing if the checkpoint has none (None), or if its number of ranks is not W.
    """
    buffers = _running_statistics(module)
    if of_ranks is not None and of_ranks.shape == (world_size(), sum(each.numel() for each in buffers)):
        _fill(buffers, of_ranks[rank()])


def _running_statistics(module: nn.Module) -> list[Tensor]:
    return [buffer for name, buffer in module.named_buffers() if name.endswith(("running_mean", "running_var"))]


@torch.no_grad()
def _fill(buffers: Sequence[Tensor], values: Tensor) -> None:
    """Copy values (total,) into the buffers, one after the other."""
    for buffer, part in zip(buffers, values.split([each.numel() for each in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))


def _outcome(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Call the function and return its result or its exception, which the caller raises on every rank."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def on_rank_zero(function: Callable[[], T]) -> T:
    """Call the function on rank 0 only; every rank returns its result or raises its exception.

    Without this, an error on rank 0 would leave the other ranks waiting.
    """
    if world_size() == 1:
        return function()
    outcome = [_outcome(function) if is_rank_zero() else (None, None)]
    dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return cast(T, result)


def all_gather_object(function: Callable[[], T]) -> list[T]:
    """Call the function on every rank and return all results, in the order of the ranks.

    If any rank raises, all raise the exception of the lowest such rank. Without this, a rank that meets an unreadable
    image would leave the others waiting in a collective. Results are pickled: they should be small.
    """
    if world_size() == 1:
        return [function()]
    outcomes: list[Any] = [None] * world_size()
    dist.all_gather_object(outcomes, _outcome(function))
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return [result for result, _ in outcomes]


def max_over_ranks(number: int) -> int:
    """Return the maximum over ranks. Waits for all ranks; `DelayedMaxOverRanks` does not."""
    return max(all_gather_object(lambda: number))


def on_all_ranks(function: Callable[[], T]) -> T:
    """Call the function on every rank and return this rank's result, of any size; if one rank raises, all raise."""
    results: list[T] = []
    all_gather_object(lambda: results.append(function()))
    return results[0]


def in_lockstep(items: Iterable[T], device: torch.device) -> Iterator[T]:
    """Iterate over items, the same number on every rank. If getting an item raises on one rank, it raises on all.

    With several ranks each item is requested one item early. So before the ranks use an item, they know without waiting
    whether all of them have got it.
    """
    if world_size() == 1:
        yield from items
        return
    remaining, failed = iter(items), DelayedMaxOverRanks(device)

    def request() -> tuple[list[T] | None, Exception | None]:
        return _outcome(lambda: list(islice(remaining, 1)))

    def raise_failure() -> None:
        if failure is not None:
            raise failure

    item, failure = request()
    failed(failure is not None)
    while True:
        following = request() if item else ([], None)
        if failed(following[1] is not None):  # the answer is about `item`
            all_gather_object(raise_failure)
        if not item:
            return
        yield item[0]
        item, failure = following


def wrap_ddp(method: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a method in DDP; with one process return the method itself.

    DDP must not synchronize buffers: it would broadcast the queue (33 MB) from rank 0 before every forward. Gradients
    are views of DDP's buckets, which saves a copy of each.
    """
    if world_size() == 1:
        return method
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch 2.15: new name
    options: dict[str, Any] = {name: False, "gradient_as_bucket_view": True}
    return DistributedDataParallel(method, device_ids=[device] if device.type == "cuda" else None, **options)
