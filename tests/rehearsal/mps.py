"""An emulated MPS device, the GPU of a Mac: tensors on `mps` whose operations are computed by the CPU.

`MpsDevice` refuses what MPS refuses or has computed wrongly. The process must have the library of `build` preloaded.
"""

import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo  # before the patches, which it does not expect
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

SOURCE = Path(__file__).parent / "stand_in" / "mps.cpp"
aten = torch.ops.aten
_attention = aten._scaled_dot_product_attention_math
_COPIES = {aten._to_copy.default, aten.copy_.default}
# Operations that need contiguous tensors: https://github.com/pytorch/pytorch/issues/175189 and 192212.
_LAYOUT = re.compile("convolution|batch_norm")


def missing() -> str:
    """Return why the device cannot be emulated here; "" if it can."""
    if sys.platform != "linux" or torch.backends.mps.is_available():
        return "the emulated MPS device is for Linux"
    return "" if shutil.which("g++") else "g++ not found"


def build(folder: Path) -> Path:
    """Build the library in a folder and return its file."""
    torch_folder, library = Path(torch.__file__).parent, folder / "libmps.so"
    linked = [f"-L{torch_folder / 'lib'}", f"-Wl,-rpath,{torch_folder / 'lib'}", "-lc10"]
    options = ["-std=c++20", "-shared", "-fPIC", f"-I{torch_folder / 'include'}"]
    subprocess.run(["g++", *options, str(SOURCE), "-o", str(library), *linked], check=True)
    return library


class MpsTensor(Tensor):
    """A tensor on `mps`; `low` is the tensor on the CPU that holds its numbers."""

    low: Tensor

    @staticmethod
    def __new__(cls, low: Tensor) -> "MpsTensor":
        make: Any = Tensor._make_wrapper_subclass
        made: MpsTensor = make(cls, low.shape, low.stride(), low.storage_offset(), dtype=low.dtype, device="mps")
        made.low = low
        return made

    def tolist(self) -> Any:
        """Return the numbers; torch's method refuses subclasses."""
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Let torch.save write it like a tensor on MPS that is read with map_location="cpu"."""
        return self.low.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute an operation outside of `MpsDevice`, as in a destructor."""
        return _compute(func, args, kwargs or {})


class MpsDevice(TorchDispatchMode):
    """Emulates MPS in this block.

    Raises an error for float64 on the device, tensors on two devices, operations without a kernel for MPS, copies that
    do not wait for memory that may be freed, and layouts for which MPS has returned wrong results.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._patches = ExitStack()

    def __enter__(self) -> Any:
        # With several threads, autograd would look for a thread of the device.
        self._patches.enter_context(torch.autograd.set_multithreading_enabled(False))
        self._patches.enter_context(patch("torch.backends.mps.is_available", lambda: True))
        # `Module.to` then makes new parameters, because a parameter's numbers cannot become those of an `MpsTensor`.
        self._patches.enter_context(patch("torch._has_compatible_shallow_copy_type", lambda *_: False))
        # These two make their tensor without asking the mode.
        tensor = torch.tensor
        make = patch("torch.tensor", lambda *args, device=None, **more: tensor(*args, **more).to(device))
        self._patches.enter_context(make)
        new = patch.object(Tensor, "new_tensor", lambda x, data: tensor(data, dtype=x.dtype).to(x.device))
        self._patches.enter_context(new)
        # This one asks for the attention kernels of MPS.
        attention = "torch.nn.functional.scaled_dot_product_attention"
        self._patches.enter_context(patch(attention, lambda *args, **more: _attention(*args, **more)[0]))
        for name in ("synchronize", "empty_cache"):
            self._patches.enter_context(patch(f"torch.mps.{name}", lambda: None))
        self._patches.enter_context(patch("torch.mps.driver_allocated_memory", lambda: 2**20))
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(isinstance(x, MpsTensor) for x in found) or torch.device(kwargs.get("device") or "cpu").type == "mps":
            _check(func, found, args, kwargs)
        return _compute(func, args, kwargs)


def _check(func: Any, found: list[Tensor], args: Any, kwargs: Any) -> None:
    if not _has_kernel(func):
        raise NotImplementedError(f"The operator '{func}' is not currently implemented for the MPS device.")
    gradients = int(func is aten.convolution_backward.default)  # the gradient of the output comes first
    if func in _COPIES:
        blocking = not (kwargs.get("non_blocking", False) or (func is aten.copy_.default and args[2:] == (True,)))
        assert blocking, "non_blocking=True: the memory of the host may be freed before the copy ends"
        if torch.float64 in [x.dtype for x in found] or kwargs.get("dtype") == torch.float64:
            raise _no_float64()
    elif any(x.dim() for x in found if not isinstance(x, MpsTensor)):
        raise RuntimeError(f"Expected all tensors to be on the same device, mps and cpu: {func}")
    elif _LAYOUT.search(str(func)) and not all(x.is_contiguous() for x in found[gradients:]):
        raise RuntimeError(f"MPS has returned wrong results for {func} of tensors that are not contiguous")


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    """Run the CPU's operation, and move new results to the device."""
    known: dict[int, MpsTensor] = {}

    def lower(x: Any) -> Any:
        if isinstance(x, MpsTensor):
            known[id(x.low)] = x
            return x.low
        return torch.device("cpu") if isinstance(x, torch.device) and x.type == "mps" else x

    named = kwargs.get("device")
    args, kwargs = tree_map(lower, (args, kwargs))
    target = torch.device(named).type if named is not None else "mps" if known else "cpu"
    if func is aten.copy_.default and id(args[0]) not in known:
        target = "cpu"

    def lift(x: Any) -> Any:
        if not isinstance(x, Tensor) or target != "mps":
            return x
        if x.dtype == torch.float64:
            raise _no_float64()
        return known[id(x)] if id(x) in known else MpsTensor(x)

    return tree_map(lift, func(*args, **kwargs))


def _no_float64() -> TypeError:
    return TypeError(
        "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. Please use float32 "
        "instead."
    )


@cache
def _kernels() -> dict[str, bool]:
    """Return for each of torch's operations whether it has a kernel for MPS, or is composed of others."""
    import torchgen  # type: ignore[import-untyped]

    file = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    found: dict[str, bool] = {}
    delegated: dict[str, str] = {}
    for block in file.read_text().split("\n- func: ")[1:]:
        name = block[: block.index("(")]
        lines = [line for line in block.splitlines()[1:] if not line.lstrip().startswith("#")]
        delegates = [line.split(": ")[1] for line in lines if line.startswith("  structured_delegate: ")]
        if delegates:
            delegated[name] = delegates[0]
        keys = [line.split(": ")[0] for line in lines if line.startswith("    ")]  # of the dispatch table
        found[name] = not keys or any("MPS" in key or "Composite" in key for key in keys)
    return found | {name: found[target] for name, target in delegated.items()}


def _has_kernel(func: Any) -> bool:
    name = func._schema.name.removeprefix("aten::") + (
        f".{func._schema.overload_name}" * bool(func._schema.overload_name)
    )
    return _kernels().get(name, True)


def environment(library: Path) -> dict[str, str]:
    """Return the environment of a process that can emulate the device."""
    return {**os.environ, "LD_PRELOAD": str(library), "CUDA_VISIBLE_DEVICES": ""}
