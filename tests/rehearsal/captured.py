"""Check the graph of a step with networks that torch.compile compiled: python -m tests.rehearsal.captured FILE RECIPE

FILE becomes a `Captured`, in JSON. The process must have the environment of `tests.rehearsal.build` with `null`: the
compiler, the allocator and the capture are real, and the GPU is not.
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypedDict
from unittest.mock import patch

import torch
from torch import Tensor
from torch._dynamo.output_graph import OutputGraph
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from triton.runtime import JITFunction

from moco.training import build
from moco.training.graph import StepGraph
from tests.rehearsal.count import Case, count

# The compiler's work, which may not happen in a capture or later.
WORK = {
    "compilation": (OutputGraph, "call_user_compiler"),
    "loading": (CachingAutotuner, "precompile"),
    "measuring": (CachingAutotuner, "benchmark_all_configs"),
}


class Captured(TypedDict):
    """What happened in the capture and after it."""

    kernels: dict[str, int]  # Triton kernels in the graph: torch's and moco's
    late: list[str]  # what was compiled, loaded or measured in the capture or later
    unknown: list[str]  # kernels in the graph with an address of memory that later steps may use otherwise


class _Watch:
    """Notes the addresses that Triton's kernels use in a capture, and what the compiler does from then on."""

    def __init__(self) -> None:
        self.capture_began = False
        self.late: list[str] = []
        self.pointers: list[tuple[str, int]] = []
        self.kernels = {"torch": 0, "moco": 0}
        self.owned: list[Tensor] = []  # tensors that live as long as the run

    def launch(self, owner: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def noted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            if torch.cuda.is_current_stream_capturing():
                self.kernels[owner] += 1
                tensors = [x for x in [*args, *kwargs.values()] if isinstance(x, Tensor)]
                self.pointers += [(kernel.fn.__name__, x.data_ptr()) for x in tensors]
            return run(kernel, *args, **kwargs)

        return noted

    def work(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.late += [kind] * self.capture_began
            return function(*args, **kwargs)

        return noted

    def capture(self, graph: StepGraph, passes: Any, capture: Any = StepGraph._capture) -> Any:
        self.capture_began = True
        self.owned += graph._inputs
        return capture(graph, passes)

    def make_method(self, *args: Any, make: Any = build.make_method) -> Any:
        method = make(*args)
        self.owned += [*method.parameters(), *method.buffers()]
        return method

    def unknown(self) -> list[str]:
        """Return the kernels with an address outside of the graph's own memory and of the tensors that stay."""
        segments: Iterable[Any] = torch.cuda.memory_snapshot()
        known = [(each["address"], each["total_size"]) for each in segments if tuple(each["segment_pool_id"]) != (0, 0)]
        known += [(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) for x in self.owned]
        return sorted({name for name, at in self.pointers if not any(0 <= at - start < n for start, n in known)})


def check(recipe: str) -> Captured:
    """Take the steps of a recipe, with `compile=true cuda_graph=true`."""
    watch = _Watch()
    patches: list[Any] = [
        patch.object(CachingAutotuner, "run", watch.launch("torch", CachingAutotuner.run)),
        patch.object(JITFunction, "run", watch.launch("moco", JITFunction.run)),
        patch.object(StepGraph, "_capture", lambda graph, passes: watch.capture(graph, passes)),
        patch.object(build, "make_method", watch.make_method),
    ]
    patches += [
        patch.object(owner, name, watch.work(kind, getattr(owner, name))) for kind, (owner, name) in WORK.items()
    ]
    for each in patches:
        each.start()
    count(Case(recipe=f"{recipe} compile=true cuda_graph=true", processes=1))
    return Captured(kernels=watch.kernels, late=watch.late, unknown=watch.unknown())


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(check(sys.argv[2])))
