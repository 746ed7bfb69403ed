"""The forward and backward passes of a step as a CUDA graph: the host launches one graph instead of many kernels.

A graph repeats the kernels of one captured step, with the same addresses in memory and the same Python numbers. So each
step first copies its inputs to fixed memory: with one process, the batch and the shuffles; with several, the batch and
the keys. Nothing else in the passes may change between steps, see `MethodConfig.changing`. What follows the passes
(optimizer, momentum update, queue) is no part of the graph.

With several processes, the keys are encoded outside of the graph, because the number of images that two ranks exchange
for the shuffle changes from step to step. The gradients are averaged after the graph, instead of by DDP during the
backward pass.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moco.builder import Output
from moco.config import ConfigError
from moco.data.loader import Batch
from moco.distributed import Order, average_gradients, copy_to_device, world_size

Keys = dict[int, Any]  # the keys of the local batch by the number of their view; tensors (n, C) for MoCo

# Steps before the capture: memory is allocated in them, and cuDNN, cuBLAS and Triton choose their kernels.
EAGER_STEPS = 3


class StepGraph:
    """Computes the forward and backward passes of a step: in the first steps as usual, in later steps by a graph.

    Args:
        parameters: of the method; after a step, their `grad` is the gradient.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [each for each in parameters if each.requires_grad]
        self._eager_steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []  # fixed memory of the batch, and of the shuffles or the keys
        # In the graph's memory, overwritten in each step: the gradient of each parameter, and the outputs.
        self._gradients: list[Tensor | None] = []
        self._outputs: list[Output] = []

    def __call__(
        self,
        encode_keys: Callable[[Batch, Sequence[Order] | None], Keys],
        differentiate: Callable[[Batch, Keys], list[Output]],
        batch: Batch,
        shuffles: Sequence[Order] | None,
        eager: bool = False,
    ) -> list[Output]:
        """Return the outputs of `differentiate(batch, encode_keys(batch, shuffles))`, which the next call overwrites.

        Args:
            encode_keys: returns the keys of the batch.
            differentiate: returns the outputs, and sets the `grad` of the parameters, which is None before.
            eager: compute this step without the graph.

        Raises:
            ConfigError: if the passes cannot be captured, for example because the host reads a result.
        """
        if eager or self._eager_steps < EAGER_STEPS:
            self._eager_steps += 1
            outputs = _on_own_stream(lambda: differentiate(batch, encode_keys(batch, shuffles)))
        elif world_size() == 1:
            orders = [copy_to_device(torch.as_tensor(each), batch.index.device) for each in shuffles or []]
            outputs = self._repeat(
                lambda batch, given: differentiate(batch, encode_keys(batch, given or None)), batch, orders
            )
        else:
            keys = encode_keys(batch, shuffles)
            views = list(keys)
            outputs = self._repeat(
                lambda batch, given: differentiate(batch, dict(zip(views, given, strict=True))),
                batch,
                list(keys.values()),
            )
        average_gradients(self._parameters)
        return outputs

    def _repeat(
        self, passes: Callable[[Batch, list[Tensor]], list[Output]], batch: Batch, given: list[Tensor]
    ) -> list[Output]:
        """Return the outputs of `passes(batch, given)`, by the graph, which the first call captures."""
        places = [] if batch.places is None else [batch.places]
        inputs = [batch.index, *places, *batch.views, *given]
        if self._graph is None:
            self._inputs = [each.clone() for each in inputs]
            index, *rest = self._inputs
            views = rest[len(places) : len(places) + len(batch.views)]
            fixed = Batch(index, views, rest[0] if places else None)
            self._graph = self._capture(lambda: passes(fixed, rest[len(places) + len(views) :]))
        for memory, new in zip(self._inputs, inputs, strict=True):
            memory.copy_(new)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._outputs

    def _capture(self, passes: Callable[[], list[Output]]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # "thread_local": other threads, which load images, may allocate pinned memory meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._outputs = passes()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = f"the passes of this step cannot be captured ({str(error).splitlines()[0]})"
            raise ConfigError(f"cuda_graph=true: {reason}; set cuda_graph=false") from error
        self._gradients = [parameter.grad for parameter in self._parameters]
        return graph


def _on_own_stream(passes: Callable[[], list[Output]]) -> list[Output]:
    """Compute the passes on another stream than the current one, which torch requires before a capture."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        outputs = passes()
    current.wait_stream(stream)
    return outputs
