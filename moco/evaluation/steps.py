"""The steps of a training on labels: their learning rates, their random seeds, and the record of each finished step."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from moco.config import OptimConfig
from moco.data.keyed import step_seed
from moco.distributed import HostCopy, in_lockstep, rank
from moco.optim.schedules import lr_factor
from moco.runtime.errors import NonFiniteLoss

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Step:
    """A step that the host has finished; a GPU may still compute it."""

    done: int  # finished steps, with this one
    total: int  # steps of the training
    lr: float
    began: float  # when the host began to wait for its batch, by time.perf_counter
    arrived: float  # when its batch arrived
    values: HostCopy  # loss and norm of the gradient, (2,)
    fix: str  # what to change if they are not finite

    @property
    def loss(self) -> float:
        """The loss; waits for the device."""
        return float(self.values.tolist()[0])

    @property
    def gradient_norm(self) -> float:
        """The norm of the gradient; waits for the device."""
        return float(self.values.tolist()[1])

    def check(self) -> None:
        """Wait for the device, and raise NonFiniteLoss if the loss or the gradient is not finite.

        The values are equal on all ranks, so all ranks raise. The step has then already changed the weights.
        """
        if not (math.isfinite(self.loss) and math.isfinite(self.gradient_norm)):
            what = f"loss {self.loss:.4g}, gradient norm {self.gradient_norm:.4g} at lr {self.lr:.3g}"
            raise NonFiniteLoss(f"step {self.done} of {self.total} has {what}: {self.fix}")


OnStep = Callable[[Step], None]
# Receives a function that returns a line of text about a step; None for a step that an earlier command has finished.
LogStep = Callable[[Callable[[], str] | None], None]


@dataclass(frozen=True)
class Schedule:
    """The learning rate (lr) of each step."""

    lr: float  # the peak; each parameter group multiplies it by its "lr_scale"
    steps: int
    kind: str  # step: multiplied by 0.1 at each milestone; cosine: decays to 0
    warmup: float  # fraction of the steps in which the lr rises
    milestones: Sequence[float] = (0.7, 0.9)  # fractions of the steps
    epochs: int = 1  # number of epochs into which the steps are divided

    def at(self, step: int) -> float:
        milestones = [each * self.epochs for each in self.milestones]
        optim = OptimConfig(schedule=self.kind, milestones=milestones, warmup_epochs=self.warmup * self.epochs)
        return self.lr * lr_factor(step, self.steps // self.epochs, self.epochs, optim)


def run_steps(
    batches: Iterable[T],
    step_of: Callable[[T, int, float], Tensor],
    optimizer: Optimizer,
    schedule: Schedule,
    seed: int,
    start: int = 0,
    on_step: OnStep = lambda step: None,
) -> None:
    """Run the steps from `start` on, one per batch.

    The host reads the values of a step after it has queued the next step, so that it does not wait for a GPU.

    Args:
        batches: of this rank; the same number on every rank.
        step_of: performs an optimizer step; its arguments are the batch, the number of the step and its lr. Returns the
            loss and the norm of the gradient, (2,).
        optimizer: for the device, and for errors, which name its weight decay and, if above 1, the factor of the head's
            learning rate.
        schedule: the learning rates.
        seed: see `seed_step`.
        start: finished steps.
        on_step: receives each finished step. Before it saves the weights, it must call `Step.check`.

    Raises:
        NonFiniteLoss: if a loss or gradient is not finite.
    """
    decay = max(group["weight_decay"] for group in optimizer.param_groups)
    scale = max(group["lr_scale"] for group in optimizer.param_groups)  # above 1 only in the head
    head = f", head_lr_factor={scale:g}" if scale > 1 else ""
    fix = f"lower lr={schedule.lr:g}{head} or weight_decay={decay:g}, or increase warmup"
    device = optimizer.param_groups[0]["params"][0].device
    previous: Step | None = None
    began = time.perf_counter()
    for step, batch in enumerate(in_lockstep(batches, device), start=start):
        arrived = time.perf_counter()
        seed_step(seed, step)
        lr = schedule.at(step)
        values = HostCopy(step_of(batch, step, lr))
        if previous is not None:
            previous.check()
        previous = Step(step + 1, schedule.steps, lr, began, arrived, values, fix)
        on_step(previous)
        began = time.perf_counter()
    if previous is not None:
        previous.check()


def seed_step(seed: int, step: int) -> None:
    """Seed torch's generator for a step of this rank; dropout, for example, draws from it."""
    # `step_seed(seed, step << 16)` is the seed that all ranks share, see `moco.evaluation.finetuning.train`.
    torch.manual_seed(step_seed(seed, (step << 16) + 1 + rank()))
