"""Sharding: FSDP2 of torch divides weights, gradients and optimizer state among the processes.

With DDP every process holds all of them. Here each of W processes holds 1 / W of each tensor, divided along its first
dimension (a DTensor). This includes the momentum encoder. The weights of a block are gathered for its forward and its
backward pass, and freed after each. The optimizer and the momentum update work on the shards. The queue, BN's running
statistics and other buffers are not divided. Batches, shuffles and losses are those of DDP, so the mathematics is the
same.

Checkpoints hold whole tensors, gathered on rank 0, in the format of a run without sharding: a run can resume with
another number of processes, and with or without sharding.

The modules of torch for sharding take a second to import, so the functions below import them when they are called.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moco.config import require
from moco.distributed import is_rank_zero, world_size

State = dict[str, Any]


def shard(method: nn.Module, device: torch.device) -> None:
    """Divide all networks of a method among the processes; with one process, do nothing.

    The weights must be equal on all ranks. An optimizer must be built afterwards: the parameters are new tensors. Each
    part of an encoder (backbone, head) is gathered on its own, because evaluation calls the backbone alone.

    Raises:
        ConfigError: if a trained parameter does not belong to a network, so that it cannot be divided.
    """
    if world_size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    for network in method.children():
        for part in list(network.children()) if hasattr(network, "backbone") else [network]:
            # FSDP warns if a backbone returns a view, because FSDP would not notice a change of that view in place. No
            # head changes its input in place.
            known = rf"FSDP2-wrapped module \(FSDP{re.escape(type(part).__name__)}\) returned a view"
            warnings.filterwarnings("ignore", known, UserWarning)
            for each in [*_blocks(part), part]:
                if next(each.parameters(), None) is not None:
                    fully_shard(each, mesh=mesh, reshard_after_forward=True)
    left = [name for name, p in method.named_parameters() if p.requires_grad and not hasattr(p, "full_tensor")]
    require(not left, f"shard=true cannot divide the parameter {', '.join(left)}: set shard=false")


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the elements of the outermost lists of layers, such as the blocks of a ViT or a ResNet."""
    for child in network.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            yield from (each for each in child.children() if not isinstance(each, nn.ModuleList | nn.ModuleDict))
        else:
            yield from _blocks(child)


def whole(x: Tensor) -> Tensor:
    """Return a tensor without sharding. Collective if it is sharded."""
    gather = getattr(x, "full_tensor", None)  # of DTensor
    return x if gather is None else gather()


@contextmanager
def whole_weights(network: nn.Module) -> Iterator[None]:
    """Gather the weights of a network, and divide them again at the end. Collective if they are sharded.

    In this context a forward pass does not communicate: ranks may run it at different times, or stop with an error.
    """
    parts = _sharded(network)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def full_weights(network: nn.Module) -> State:
    """Return the state dict of a network. For a sharded network, this is collective, and ranks other than 0 get {}."""
    if not is_sharded(network):
        return network.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def full_state(method: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[State, State]:
    """Return the state dicts of a method and its optimizer.

    For a sharded method, this is collective, and ranks other than 0 get {} and {}.
    """
    if not is_sharded(method):
        return method.state_dict(), optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(method, optimizer, options=options)
    numbers = {name: number for number, name in enumerate(_names(method, optimizer))}
    return full_weights(method), _renamed(state, numbers)


def load_optimizer_state(method: nn.Module | None, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state dict of whole tensors. If the method is sharded, only rank 0 needs the tensors; collective."""
    if method is None or not is_sharded(method):
        optimizer.load_state_dict(dict(state))
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    named: Any = _renamed(state, dict(enumerate(_names(method, optimizer)))) if is_rank_zero() else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(method, optimizer, named, options=options)
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        # Restore the tuples, which torch has turned into lists.
        group |= {name: value for name, value in saved.items() if name != "params"}


def is_sharded(network: nn.Module) -> bool:
    """Return whether the weights of a network are divided."""
    return bool(_sharded(network))


def _sharded(network: nn.Module) -> list[Any]:
    """Return the modules of a network to which FSDP was applied."""
    return [module for module in network.modules() if hasattr(module, "set_reshard_after_forward")]


def _names(method: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the names of the optimizer's parameters, in the order of their numbers in its state dict."""
    names = {parameter: name for name, parameter in method.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _renamed(state: Mapping[str, Any], names: Mapping[Any, Any]) -> State:
    """Rename the parameters of an optimizer's state dict by `names`, a mapping from the present names to new names.

    An optimizer numbers its parameters; torch's sharding uses the names of the parameters instead.
    """
    if not state:
        return {}
    groups = [{**group, "params": [names[each] for each in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[each]: values for each, values in state["state"].items()}, "param_groups": groups}
