"""The steps of a training on labels: their learning rates, their random seeds, and the record of each finished step."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch.optim import Optimizer

from moco.config import OptimConfig
from moco.data.keyed import step_seed
from moco.distributed import in_lockstep, rank
from moco.optim.schedules import lr_factor
from moco.runtime.errors import NonFiniteLoss

T = TypeVar("T")


class Step(NamedTuple):
    """A finished step."""

    done: int  # finished steps, with this one
    loss: float
    gradient_norm: float
    lr: float
    began: float  # when its batch was requested, by time.perf_counter
    arrived: float  # when its batch arrived


OnStep = Callable[[Step], None]


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
    step_of: Callable[[T, int, float], tuple[float, float]],
    optimizer: Optimizer,
    schedule: Schedule,
    seed: int,
    start: int = 0,
    on_step: OnStep = lambda step: None,
) -> None:
    """Run the steps from `start` on, one per batch.

    Args:
        batches: of this rank; the same number on every rank.
        step_of: trains on a batch; its arguments are the batch, the number of the step and the lr of the step. Returns
            the loss and the norm of the gradient.
        optimizer: errors name its weight decay and, if above 1, the factor of the head's learning rate.
        schedule: the learning rates.
        seed: see `seed_step`.
        start: finished steps.
        on_step: receives each finished step.

    Raises:
        NonFiniteLoss: if a loss or gradient is not finite.
    """
    began = time.perf_counter()
    for step, batch in enumerate(in_lockstep(batches), start=start):
        arrived = time.perf_counter()
        seed_step(seed, step)
        lr = schedule.at(step)
        try:
            loss, norm = step_of(batch, step, lr)
        except NonFiniteLoss as error:
            decay = max(group["weight_decay"] for group in optimizer.param_groups)
            scale = max(group["lr_scale"] for group in optimizer.param_groups)  # above 1 only in the head
            head = f", head_lr_factor={scale:g}" if scale > 1 else ""
            fix = f"lower lr={schedule.lr:g}{head} or weight_decay={decay:g}, or increase warmup"
            raise NonFiniteLoss(f"step {step + 1} of {schedule.steps} has {error} at lr {lr:.3g}: {fix}") from error
        on_step(Step(step + 1, loss, norm, lr, began, arrived))
        began = time.perf_counter()


def seed_step(seed: int, step: int) -> None:
    """Seed torch's generator for a step of this rank; dropout, for example, draws from it."""
    torch.manual_seed(step_seed(seed, (step << 16) + 1 + rank()))
