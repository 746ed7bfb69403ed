"""Fine-tuning that resumes: a state saved every few steps, from which the same command continues.

All that a step needs is in the state, or a function of the seed and the step. So on a CPU a resumed training ends with
the same weights as an uninterrupted one, bit for bit.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from moco.config import ConfigError, OptimConfig
from moco.data.keyed import step_seed
from moco.distributed import in_lockstep, on_rank_zero, rank
from moco.files import atomic_write
from moco.optim.schedules import lr_factor
from moco.runs.weights_file import read_weights
from moco.runtime.console import log
from moco.runtime.errors import NonFiniteLoss

T = TypeVar("T")
OnStep = Callable[[int, float], None]  # the number of finished steps, and the loss


@dataclass(frozen=True)
class Schedule:
    """The learning rate (lr) of each step."""

    lr: float  # the peak; each parameter group multiplies it by its "lr_scale"
    steps: int
    kind: str  # step: multiplied by 0.1 at each milestone; cosine: to 0
    warmup: float  # fraction of the steps in which the lr rises
    milestones: Sequence[float] = (0.7, 0.9)  # fractions of the steps

    def at(self, step: int) -> float:
        milestones = list(self.milestones)
        optim = OptimConfig(schedule=self.kind, milestones=milestones, warmup_epochs=self.warmup)
        return self.lr * lr_factor(step, self.steps, 1, optim)  # all steps are one epoch


def run_steps(
    batches: Iterable[T],
    step_of: Callable[[T, int, float], float],
    optimizer: Optimizer,
    schedule: Schedule,
    seed: int,
    start: int = 0,
    on_step: OnStep = lambda step, loss: None,
) -> None:
    """Run the steps from `start` on, one per batch.

    Args:
        batches: of this rank; the same number on every rank.
        step_of: trains on a batch, given also the step and its lr; returns the loss.
        optimizer: its weight decay is named in errors.
        schedule: the learning rates.
        seed: seeds torch's generator, for example for dropout, together with step and rank.
        start: finished steps.
        on_step: called after each step.

    Raises:
        NonFiniteLoss: if a loss or gradient is not finite.
    """
    for step, batch in enumerate(in_lockstep(batches), start=start):
        torch.manual_seed(step_seed(seed, (step << 16) + 1 + rank()))
        lr = schedule.at(step)
        try:
            loss = step_of(batch, step, lr)
        except NonFiniteLoss as error:
            decay = max(group["weight_decay"] for group in optimizer.param_groups)
            fix = f"lower lr={schedule.lr:g} or weight_decay={decay:g}, or increase warmup"
            raise NonFiniteLoss(f"step {step + 1} of {schedule.steps} has {error} at lr {lr:.3g}: {fix}") from error
        on_step(step + 1, loss)


def train_resumably(
    state: Path,
    network: nn.Module,
    optimizer: Optimizer,
    train: Callable[[int, OnStep], None],
    on_step: Callable[[str], None],
    *,
    title: str,
    steps: int,
    save_every: int,
) -> None:
    """Continue a training from its saved state, if there is one, and save its state every so many steps.

    Args:
        state: the file of the state; its name must tell trainings with different settings apart.
        network, optimizer: on this rank; the state fits all ranks, which hold the same weights.
        train: runs the steps from the given one on, and calls the given function after each step.
        on_step: receives a line for each step, also for those that were finished before.
        title: names the training in messages.
        steps: of the whole training.
        save_every: steps between two saved states; 0: the state is saved at the end only.
    """
    start = resume(state, network, optimizer)
    if start:
        finished = "already trained" if start == steps else f"resumed at step {start:,}"
        log(f"{title}: {finished} ({state})")
    for _ in range(start):
        on_step(title)

    def after(step: int, loss: float) -> None:
        on_step(f"{title}: loss {loss:.3f}")
        if step == steps or (save_every and step % save_every == 0):
            on_rank_zero(lambda: save_state(state, network, optimizer, step))

    train(start, after)


def save_state(path: Path, network: nn.Module, optimizer: Optimizer, step: int) -> None:
    """Write the state after a number of steps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"step": step, "network": network.state_dict(), "optimizer": optimizer.state_dict()}
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        torch.save(state, file)  # with a path, torch's writer reports a full disk without the system's error


def resume(path: Path, network: nn.Module, optimizer: Optimizer) -> int:
    """Load the state of an interrupted training, if the file exists, and return its number of finished steps.

    Raises:
        ConfigError: for a damaged file.
    """
    if not on_rank_zero(path.is_file):
        return 0
    state = read_weights(path)
    try:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        step = int(state["step"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{path} is damaged: remove it to start this training again") from error
    return step
