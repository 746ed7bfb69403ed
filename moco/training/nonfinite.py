"""Steps whose loss or gradient is not finite: seen by all ranks alike, kept for study, skipped if so wished.

Of the first such step a file is kept, `step_N.pt`: "step" and "epoch" from 0, "what" was not finite, "index", the
samples of the global batch in the order of the ranks (rank r had the r-th of "world_size" equal parts), "rank", which
wrote it, and the state. The views are a function of the seed, the epoch and the samples, so the culprit can be found.

Without a limit on skipping, a GPU is not waited for: a step's loss is read once the next step is queued, and before
anything is saved. A step that is found so has changed the weights, which no checkpoint holds; the run ends.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moco.data.plan import Plan
from moco.distributed import gather, on_rank_zero, rank, world_size
from moco.files import WriteError, atomic_write, cause
from moco.runtime.errors import NonFiniteLoss

Measures = dict[str, Tensor]


class _Pending(NamedTuple):
    """A step whose loss and gradient norm are on their way to the host."""

    step: int
    samples: Tensor  # (n,)
    figures: Tensor  # (2,), on the host
    ready: torch.cuda.Event | None


class NonFiniteGuard:
    """Runs steps, and deals with those that are not finite.

    Args:
        plan: the length of training.
        late: read a step's loss behind the next one; `train_step` is then called with wait=False.
        limit: how many steps a run may skip; skipping needs late=False.
        skipped: how many it has skipped so far.
        folder: where what is known of such a step is kept.
        state: gives what to keep besides the step and its samples: weights and the optimizer's state.
        say: gets a line about a skipped step.
    """

    def __init__(
        self,
        plan: Plan,
        late: bool,
        limit: int,
        skipped: int,
        folder: Path,
        state: Callable[[], dict[str, Any]],
        log: Callable[[str], None],
    ) -> None:
        assert not (late and limit)
        self.skipped = skipped
        self._plan, self._late, self._limit = plan, late, limit
        self._folder, self._state, self._log = folder, state, log
        self._pending: _Pending | None = None

    def run(self, step: int, index: Tensor, train: Callable[[], Measures]) -> Measures | None:
        """One step; None if it was skipped.

        Args:
            step: its number, from 0.
            index: its samples, (n,).
            train: runs it.

        Raises:
            NonFiniteLoss: naming the step, its epoch and its samples.
        """
        try:
            measures = train()
        except NonFiniteLoss as error:
            kept = self._keep(step, index, str(error))
            if self.skipped >= self._limit:
                unchanged = "The weights, the queue and the last checkpoint are untouched"
                raise NonFiniteLoss(self._sentence(step, index, str(error), unchanged, kept)) from error
            self.skipped += 1
            self._log(
                f"step {step + 1} gave {error} and was skipped, {self.skipped} of at most optim.skip_nonfinite="
                f"{self._limit}{kept}"
            )
            return None
        if self._late:
            self.settle()
            figures = torch.stack([measures["loss"], measures["gradient_norm"]])
            if figures.device.type == "cuda":
                host = torch.empty(2, pin_memory=True).copy_(figures, non_blocking=True)
                ready = torch.cuda.Event()
                ready.record()
                self._pending = _Pending(step, index, host, ready)
            else:
                self._pending = _Pending(step, index, figures, None)
        return measures

    def settle(self) -> None:
        """Reads the step that is still to be read: before its weights are saved or evaluated.

        Raises:
            NonFiniteLoss: as `run`.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.ready is not None:
            pending.ready.synchronize()
        loss, norm = pending.figures.tolist()
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what = f"loss {loss:.4g}, gradient norm {norm:.4g}"
        kept = self._keep(pending.step, pending.samples, what)
        unchanged = "The last checkpoint is untouched"
        raise NonFiniteLoss(self._sentence(pending.step, pending.samples, what, unchanged, kept))

    def _sentence(self, step: int, index: Tensor, what: str, unchanged: str, kept: str) -> str:
        epoch, position = divmod(step, self._plan.steps_per_epoch)
        first = ", ".join(str(i) for i in index[:8].tolist())
        return (
            f"step {step + 1} (epoch {epoch + 1}, batch {position + 1} of {self._plan.steps_per_epoch}; "
            f"rank {rank()} had samples {first}, ...) gave {what}. {unchanged}{kept}; in a new run=..., lower "
            "optim.lr, lengthen optim.warmup_epochs, or set optim.clip_grad=1; optim.skip_nonfinite=10 leaves out as "
            "many such steps"
        )

    def _keep(self, step: int, index: Tensor, what: str) -> str:
        """Writes what is known, and says where it is or why it is not; every rank calls it."""
        all_gather_object = gather(index)  # (W n,)
        about = {
            "step": step,
            "epoch": step // self._plan.steps_per_epoch,
            "index": all_gather_object.cpu(),
            "world_size": world_size(),
            "rank": rank(),
            "what": what,
        }
        return on_rank_zero(lambda: self._write(self._folder / f"step_{step + 1}.pt", about))

    def _write(self, file: Path, about: dict[str, Any]) -> str:
        try:
            if not any(self._folder.glob("*.pt")):  # one is enough to study, and each is a checkpoint's size
                self._folder.mkdir(parents=True, exist_ok=True)
                with atomic_write(file) as temporary, temporary.open("wb") as opened:
                    torch.save(about | self._state(), opened)
        except (OSError, WriteError) as error:  # what the step gave matters more than that it could not be kept
            return f" (the state could not be kept: {file}: {cause(error)})"
        first = min(self._folder.glob("*.pt"))
        return f", and {first} holds the state {'behind' if self._late else 'before'} the first such step for study"
