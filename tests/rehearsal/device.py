"""An emulated CUDA device: tensors on `cuda` whose operations are computed by the CPU, in the same memory.

The CUDA libraries are those of `tests.rehearsal.build`. torch's allocator, streams, autograd and autocast work as on a
GPU. `SoftDevice` refuses an operation that mixes CPU and CUDA tensors, and records where the host would wait for the
device.
"""

import atexit
import ctypes
import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from tests.rehearsal import kernels

ROOT = Path(__file__).parents[2]
aten = torch.ops.aten
Wait = tuple[str, str, int]  # what is waited for, the line that does it, the number of the step

# Operations that only make tensors or read their metadata: they work on the stand-in's memory as they are.
_NATIVE = {
    aten.record_stream.default,
    aten._pin_memory.default,
    aten.is_pinned.default,
    aten.set_.source_Storage,
    aten.set_.source_Storage_storage_offset,
    aten.set_.source_Tensor,
    aten.set_.source_Tensor_storage_offset,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten._unsafe_view.default,
    aten.resize_.default,
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
_INDEX = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
_MIXED = _INDEX | {aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default}
# Operations for which the host waits: it needs their result, or the size of the result depends on the input's values.
_WAITING = {
    aten._local_scalar_dense.default: "item",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.unique_dim.default: "unique",
    aten._unique2.default: "unique",
    aten.equal.default: "equal",
    aten.bincount.default: "bincount",
    aten.repeat_interleave.Tensor: "repeat_interleave",
    aten._linalg_eigh.default: "eigh",
    aten._linalg_svd.default: "svd",
}
_PRODUCTS = {aten.convolution.default: "convolution", aten.addmm.default: "product", aten.mm.default: "product"}
_OTHER_NAMESPACES = ("c10d", "_c10d_functional", "symm_mem", "prim", "profiler")


def _batch_norm(x: Tensor, w: Any, b: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float) -> Any:
    return *aten.native_batch_norm(x, w, b, mean, var, training, momentum, eps), torch.empty(0, dtype=torch.uint8)


def _batch_norm_backward(
    x: Tensor, grad: Tensor, w: Any, mean: Any, var: Any, saved_mean: Any, saved_var: Any, eps: float, _: Any
) -> Any:
    needed = [True, True, True]
    return aten.native_batch_norm_backward(grad, x, w, mean, var, saved_mean, saved_var, True, eps, needed)


# Replacements for operations that exist only for CUDA.
_KERNELS: dict[Any, Callable[..., Any]] = {
    aten.cudnn_batch_norm.default: _batch_norm,
    aten.cudnn_batch_norm_backward.default: _batch_norm_backward,
    **{getattr(aten, name).default: getattr(kernels, name) for name in kernels.BATCH_NORM},
}


def _on_gpu(x: object) -> bool:
    return isinstance(x, Tensor) and x.device.type == "cuda"


def _precision(func: Any, dtype: torch.dtype) -> str:
    """Return the number type in which a GPU would compute a product."""
    if dtype == torch.float32:
        convolution = func is aten.convolution.default
        setting = torch.backends.cudnn.allow_tf32 if convolution else torch.backends.cuda.matmul.allow_tf32
        return "TF32" if setting else "float32"
    return str(dtype).removeprefix("torch.")


def on_host(x: Tensor) -> Tensor:
    """Return a CPU tensor on the memory of a CUDA tensor."""
    storage = x.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    raw = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=x.dtype).set_(raw, x.storage_offset(), x.shape, x.stride())


def place() -> str:
    """Return the line of this project that is running."""
    frames = [each for each in traceback.extract_stack() if each.filename.startswith(str(ROOT))]
    last = next(each for each in reversed(frames) if each.filename not in (__file__, kernels.__file__))
    return f"{Path(last.filename).relative_to(ROOT)}:{last.lineno} ({last.name}) {last.line}"


@contextmanager
def own_kernels(used: bool) -> Iterator[set[str]]:
    """Let moco compute with its own kernels, interpreted in Python on the same memory, or without them.

    Yields the names of the kernels that were used. The process needs TRITON_INTERPRET=1.
    """
    names: set[str] = set()
    with patch("moco.kernels.choice._compiles", lambda device: used):
        if not used:
            yield names
            return
        from triton.runtime.interpreter import GridExecutor

        def lower(self: Any, args: Any, kwargs: Any) -> Any:
            names.add(self.fn.__name__)
            return tree_map(lambda x: on_host(x) if _on_gpu(x) else x, (args, kwargs))

        with (
            patch.object(GridExecutor, "_init_args_hst", lower),
            patch.object(GridExecutor, "_restore_args_dev", lambda *_: None),
        ):
            yield names


class Graph:
    """What a CUDA graph holds: the operations of its capture. One graph per process."""

    def __init__(self) -> None:
        self._operations: list[tuple[Any, Any, Any, list[Tensor]]] = []  # each with arguments and results
        # A real capture computes nothing. So this is memory that the capture found, with its content.
        self._found: dict[int, tuple[Tensor, Tensor]] = {}

    def before(self, touched: list[Tensor]) -> None:
        """Call before an operation: in a capture, keep the content of its arguments; after it, undo the capture."""
        if not torch.cuda.is_current_stream_capturing():
            self._undo()
            return
        for x in touched:
            whole = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
            if whole.numel() and whole.data_ptr() not in self._found:
                self._found[whole.data_ptr()] = whole, whole.clone()

    def after(self, func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> None:
        """Call after an operation: a capture notes it."""
        if torch.cuda.is_current_stream_capturing():
            self._operations.append((func, args, kwargs, results))

    def _undo(self) -> None:
        for whole, content in self._found.values():
            whole.copy_(content)
        self._found = {}

    def replay(self) -> None:
        """Compute all operations of the capture again, on the same memory."""
        self._undo()
        for func, args, kwargs, results in self._operations:
            found = [x for x in tree_flatten(func(*args, **kwargs))[0] if isinstance(x, Tensor)]
            for result, x in zip(results, found, strict=True):
                if result.data_ptr() != x.data_ptr():
                    result.copy_(x)


class SoftDevice(TorchDispatchMode):
    """Computes the operations on CUDA tensors on the CPU.

    Attributes:
        step: number of the current step, from 0; set by the caller.
        waits: how often the host would have waited, by `Wait`.
        products: (operation, number type) of all convolutions and matrix products; "TF32" for float32 in TF32.
        graph: the CUDA graph that was captured.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.step = 0
        self.waits: Counter[Wait] = Counter()
        self.products: set[tuple[str, str]] = set()
        self.graph = Graph()
        self._library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        names = ("stream", "event", "device", "copy")  # the calls of the runtime that wait
        self._callback = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: self._note(names[number]))
        self._library.standin_callback(self._callback)
        atexit.register(self._library.standin_callback, None)  # torch waits once more after the end of Python

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let torch.compile trace networks in this mode; the traced operations are then computed by it."""
        return True

    def _note(self, kind: str) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"operation not permitted when stream is capturing: {kind}")
        self.waits[(kind, place(), self.step)] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat, spec = tree_flatten((args, kwargs))
        wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        gpu = [x for x in flat if _on_gpu(x)]
        meta = [x for x in flat if isinstance(x, Tensor) and x.device.type == "meta"]
        if not gpu and (wanted is None or wanted.type != "cuda"):
            return func(*args, **kwargs)
        if func.namespace in _OTHER_NAMESPACES or func in _NATIVE or func.is_view or meta:
            return func(*args, **kwargs)
        if wanted is not None and wanted.type == "meta":
            return func(*args, **kwargs)
        self._check(func, flat, gpu, args, kwargs, wanted)
        return self._compute(func, flat, spec, wanted or gpu[0].device, kwargs)

    def _check(self, func: Any, flat: Any, gpu: Any, args: Any, kwargs: Any, wanted: torch.device | None) -> None:
        """Refuse a mix of CPU and CUDA tensors, and record a wait of the host."""
        hosts = [x for x in flat if isinstance(x, Tensor) and x.device.type == "cpu" and x.dim() > 0]
        if gpu and hosts and func not in _MIXED:
            raise RuntimeError(f"{func}: tensors on cuda and on cpu, {tuple(hosts[0].shape)}")
        if func in _PRODUCTS:
            self.products.add((_PRODUCTS[func], _precision(func, gpu[0].dtype)))
        elif func in _WAITING:
            self._note(_WAITING[func])
        elif func is aten._to_copy.default:
            source = args[0].device.type
            self._check_copy(source, wanted.type if wanted else source, args[0], kwargs.get("non_blocking", False))
        elif func is aten.copy_.default:
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            self._check_copy(args[1].device.type, args[0].device.type, args[1], non_blocking)
        elif func in _INDEX:
            for each in args[1]:
                if isinstance(each, Tensor) and each.device.type == "cpu":
                    self._note("index on the host")
                elif isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8):
                    self._note("index by a mask")

    def _check_copy(self, source: str, target: str, x: Tensor, non_blocking: bool) -> None:
        if source == target:
            return
        if not non_blocking:
            self._note(f"copy from {source} to {target}")
        elif source == "cpu" and not x.is_pinned():
            self._note("copy from pageable memory")
        elif torch.cuda.is_current_stream_capturing():
            self._note("copy")  # a graph would repeat it with the numbers of the capture

    def _compute(self, func: Any, flat: Any, spec: Any, target: torch.device, given: Any) -> Any:
        """Run the CPU's operation on the same memory, and move new results to the device."""
        known: dict[int, tuple[Tensor, Tensor]] = {}

        def lower(x: Any) -> Any:
            if _on_gpu(x):
                return known.setdefault(id(x), (x, on_host(x)))[1]
            if isinstance(x, torch.device):
                return torch.device("cpu")
            return None if isinstance(x, torch.Generator) and x.device.type == "cuda" else x

        args, kwargs = tree_unflatten([lower(x) for x in flat], spec)
        if isinstance(kwargs.get("device"), str):
            kwargs["device"] = "cpu"
        if func is aten._to_copy.default:
            kwargs.pop("pin_memory", None)
        func = _KERNELS.get(func, func)
        self.graph.before([low for _, low in known.values()])
        out = func(*args, **kwargs)
        back = {id(low): high for high, low in known.values()}
        pinned = func is aten._to_copy.default and given.get("non_blocking", False)

        def lift(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if id(x) in back:
                return back[id(x)]
            if target.type != "cuda":
                return x.pin_memory() if pinned else x
            high = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=target)
            if x.numel():
                on_host(high).copy_(x)
            return high

        lifted = tree_map(lift, out)
        self.graph.after(func, args, kwargs, [on_host(x) for x in tree_flatten(lifted)[0] if _on_gpu(x)])
        return lifted
