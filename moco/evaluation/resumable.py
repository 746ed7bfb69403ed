"""Trainings that can resume: their state is saved every `save_every` steps and after a signal.

The same command, run again, resumes from the newest saved state.

Everything that a step needs is either in the state or computed from the seed and the number of the step. So on a CPU a
resumed training ends with the same weights as an uninterrupted one, bit for bit.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from moco.config import ConfigError, ResumableConfig
from moco.distributed import DelayedMaxOverRanks, on_all_ranks, on_rank_zero
from moco.evaluation.steps import LogStep, OnStep, Step
from moco.files import atomic_write
from moco.runs.metrics import METRICS, MetricsLogger
from moco.runs.weights_file import read_weights
from moco.runtime.console import log
from moco.runtime.preemption import Preempted, PreemptionHandler, Reason, keeping
from moco.runtime.speed import StepTimes
from moco.runtime.watchdog import Watchdog, watched_context

CURVES = "training.jsonl"  # a copy of the metrics.jsonl of the training whose network is in the same folder


class Supervision:
    """The device, the watchdog and the signal handler that all trainings of a command use; see `supervised`.

    Attributes:
        device: Of this process.
        watchdog: Receives the progress of trainings and evaluations.
        preemption: Receives signals, and observes the time limit.
        save_every, log_every: Steps between two saved states, and between two records of the metrics.
    """

    def __init__(
        self, device: torch.device, watchdog: Watchdog, preemption: PreemptionHandler, save_every: int, log_every: int
    ) -> None:
        self.device, self.watchdog, self.preemption = device, watchdog, preemption
        self.save_every, self.log_every = save_every, log_every
        self._saved: tuple[int, int] | tuple[()] = ()  # saved and total steps of the current training

    def heartbeat(self) -> None:
        """Report progress to the watchdog. Raise `Preempted` after a signal.

        Call it only outside of training steps, when no state remains to be saved, and only in code whose exceptions are
        raised on all ranks, such as a function that `on_all_ranks` calls.
        """
        self.watchdog.heartbeat()
        if reason := self.preemption.signal_received():
            raise Preempted(reason, *self._saved)

    def has_saved(self) -> bool:
        """Return whether a training of this attempt has saved a step, or resumed from one."""
        return bool(self._saved)

    def saved(self, done: int, total: int) -> None:
        """Record that `done` of the `total` steps of the current training are saved."""
        self._saved = done, total


@contextmanager
def supervised(config: ResumableConfig, preemption: PreemptionHandler | None) -> Iterator[Supervision]:
    """Set up device, threads, process group and watchdog.

    If `preemption` is None, this function catches the signals itself.

    Raises:
        ConfigError, PeerLost: see `compute_context`.
    """
    with ExitStack() as stack:
        preemption = preemption or stack.enter_context(PreemptionHandler(config.stop_after))
        device, watchdog = stack.enter_context(watched_context(config))
        supervision = Supervision(device, watchdog, preemption, config.save_every, config.log_every)
        stack.enter_context(keeping("saved steps", supervision.has_saved))
        yield supervision


@dataclass(frozen=True)
class ResumableTraining:
    """One training of a command: its encoder, its seed, its length and its files.

    Attributes:
        folder: For the trained network of the last seed. State and metrics are in the parent of this folder.
        encoder: The encoder's entry in the command's field `encoders`.
        seed: Of this training.
        digest: Differs between trainings with different settings, weights or images.
        steps: Number of steps.
        batch_size: Images per step, over all processes.
    """

    folder: Path
    encoder: str
    seed: int
    digest: str
    steps: int
    batch_size: int

    @property
    def title(self) -> str:
        return f"{self.encoder}, seed {self.seed}"

    @property
    def state(self) -> Path:
        return self.folder.parent / f"state_{self.digest[:12]}.pt"

    @property
    def metrics(self) -> Path:
        return self.folder.parent / f"{self.folder.name}_seed{self.seed}_{self.digest[:12]}"

    def copy_curves(self) -> None:
        """Copy the recorded metrics to the folder of the trained network, for the report. For rank 0."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.metrics / METRICS).is_file():
            with atomic_write(self.folder / CURVES) as temporary:
                shutil.copyfile(self.metrics / METRICS, temporary)
        else:  # an earlier version saved the state without metrics: remove the curves of another training
            (self.folder / CURVES).unlink(missing_ok=True)


def train_resumably(
    supervision: Supervision,
    training: ResumableTraining,
    network: nn.Module,
    optimizer: Optimizer,
    train: Callable[[int, OnStep], None],
    on_step: LogStep,
) -> None:
    """Continue a training from its saved state, if there is one; log its metrics and save its state while it runs.

    Args:
        supervision: of the command.
        training: its files and its length.
        network, optimizer: on this rank. One state serves all ranks, because they hold the same weights.
        train: runs the steps from the given one on, and calls the given function after each step.
        on_step: see `LogStep`.

    Raises:
        Preempted: on all ranks, once the state is saved, if one of them received a signal or reached the time limit.
    """
    start, steps, title = resume(training.state, network, optimizer), training.steps, training.title
    if start:
        finished = "already trained" if start == steps else f"resumed at step {start:,}"
        log(f"{title}: {finished} ({training.state})")
        supervision.saved(start, steps)
    for _ in range(start):
        on_step(None)
    on_all_ranks(supervision.heartbeat)
    if start < steps:
        stop = DelayedMaxOverRanks(supervision.device)
        supervision.watchdog.finished(start)
        with _logging(supervision, training, start) as write, supervision.preemption.stepping():

            def after(step: Step) -> None:
                supervision.watchdog.finished(step.done)
                on_step(lambda: f"{title}: loss {step.loss:.3f}")
                write(step)
                reason = stop(supervision.preemption.reason()) if step.done < steps else Reason.NONE
                due = step.done == steps or (supervision.save_every and step.done % supervision.save_every == 0)
                if due or reason:
                    step.check()
                    on_rank_zero(lambda: save_state(training.state, network, optimizer, step.done))
                    supervision.saved(step.done, steps)
                if reason:
                    raise Preempted(Reason(reason), step.done, steps)

            train(start, after)
    on_rank_zero(training.copy_curves)


@contextmanager
def _logging(supervision: Supervision, training: ResumableTraining, start: int) -> Iterator[Callable[[Step], None]]:
    """Yield a function to call after each step. Collective.

    It records the first, the last and every `log_every`-th step in metrics.jsonl and TensorBoard's events.
    """
    opened, times = list[MetricsLogger](), StepTimes(supervision.device, training.batch_size)

    def open_log() -> None:
        training.metrics.mkdir(parents=True, exist_ok=True)
        opened.append(MetricsLogger(training.metrics, start))

    def write(step: Step) -> None:
        times.add_step(step.began, step.arrived)
        if step.done % supervision.log_every == 0 or step.done in (1, training.steps):
            step.check()
            values = {f"train/{name}": getattr(step, name) for name in ("loss", "lr", "gradient_norm")} | times.record()
            on_rank_zero(lambda: opened[0].log(step.done, values))

    on_rank_zero(open_log)
    try:
        yield write
    finally:
        for each in opened:
            each.close()


def save_state(path: Path, network: nn.Module, optimizer: Optimizer, step: int) -> None:
    """Write the state after a number of steps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"step": step, "network": network.state_dict(), "optimizer": optimizer.state_dict()}
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        torch.save(state, file)  # with a path, torch's writer reports a full disk without the system's error


def resume(path: Path, network: nn.Module, optimizer: Optimizer) -> int:
    """Load the state of an interrupted training, if the file exists, and return its number of finished steps.

    Raises:
        CheckpointError: if the file cannot be read.
        ConfigError: if its content is not a state of this network and optimizer.
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
