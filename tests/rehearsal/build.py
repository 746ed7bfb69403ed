"""Build the stand-in for CUDA: one library that replaces its runtime, driver, NCCL, cuDNN and cuBLAS.

Preloaded in front of torch's libraries, it lets a CUDA build of torch run without a GPU, a driver or a CUDA toolkit.
Its sources are in stand_in/. Everything else that torch asks for is a function that returns 0.
"""

import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import torch

HERE = Path(__file__).parent / "stand_in"
SOURCES = [HERE / f"{name}.c" for name in ("runtime", "driver", "nccl", "libraries")]
_OURS = re.compile(r"^[\w ]+[ *]+(\w+)\(", re.MULTILINE)  # the functions of our sources


def _header() -> Path | None:
    """Return the cuda.h that comes with torch's packages."""
    packages = Path(torch.__file__).parents[1]
    found = [*packages.glob("nvidia/cu*/include/cuda.h"), *packages.glob("nvidia/cuda_runtime/include/cuda.h")]
    return found[0] if found else None


def missing() -> str:
    """Return why the stand-in cannot be built or used here; "" if it can."""
    if torch.cuda.is_available():
        return "there is a GPU: the rehearsal is for machines without one"
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is not a CUDA build"
    tools = [name for name in ("gcc", "nm") if shutil.which(name) is None]
    if tools:
        return f"{' and '.join(tools)} not found"
    return "" if _header() else "torch's packages hold no cuda.h"


def build(folder: Path) -> Path:
    """Build the library in a folder and return its file."""
    header = _header()
    assert header is not None, missing()
    assert find_spec("torch") is not None
    needed = _needed(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so")
    needed |= set(re.findall(r"\b(cu[A-Z]\w+) *\(", header.read_text(errors="replace")))
    known = {name for source in SOURCES for name in _OURS.findall(source.read_text())}
    generated = folder / "libraries.c"
    rest = [_function(name) for name in sorted(needed - known)]
    generated.write_text("\n".join([SOURCES[-1].read_text(), *rest]))
    library = folder / "libcuda.so.1"  # the name under which Triton loads the driver
    options = ["-O2", "-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{library.name}"]
    include = [f"-I{HERE}", f"-I{header.parent}"]
    files = [*map(str, SOURCES[:-1]), str(generated)]
    subprocess.run(["gcc", *options, *include, "-o", str(library), *files], check=True)
    (folder / "libcuda.so").symlink_to(library)
    return library


def _needed(library: Path) -> set[str]:
    """Return the names of other libraries' functions that torch calls."""
    names = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True)
    return set(re.findall(r" U ((?:cudnn|cublas|curand|nccl)\w+)", names.stdout))


def _function(name: str) -> str:
    """Return a C function that does nothing; it counts convolutions (1), batch normalization (2) and products (3)."""
    if re.match(r"(cudnn|cublas)\w*Create", name):
        return f"int {name}(void **handle) {{ return mk(handle); }}"
    kinds = {r"cudnnConvolution(F|B)": 1, r"cudnnBatchNorm": 2, r".*([gG]emm|LtMatmul$)": 3}
    kind = next((number for pattern, number in kinds.items() if re.match(pattern, name)), 0)
    return f"int {name}(void) {{ c[{kind}]++; return 0; }}"


def environment(library: Path, devices: int = 1, null: bool = False) -> dict[str, str]:
    """Return the environment of a process that finds the stand-in's devices.

    With `null`, copies of more than 4096 bytes and large collectives do nothing, so large networks are fast and their
    results wrong. Triton compiles kernels then; otherwise it interprets them.

    The CPU's libraries use the same instructions on every machine, so results are rounded alike on all of them.
    """
    new = {"LD_PRELOAD": str(library), "TRITON_LIBCUDA_PATH": str(library.parent), "STANDIN_GPUS": str(devices)}
    new |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2])])}
    new |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBILITY"}
    new["TRITON_INTERPRET"] = "0" if null else "1"
    return {**os.environ, **new, **({"STANDIN_NULL": "1"} if null else {})}
