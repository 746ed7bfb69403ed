"""Steps with a non-finite loss or gradient: detected on all ranks, saved for study, and skipped up to a limit.

The first such step is saved to `step_N.pt`, in which N counts from 1, with the keys "step" and "epoch" (both from 0),
"what" (the loss and the gradient norm), "index" (the image indices of the global batch in the order of the ranks: rank
r had the r-th of "world_size" equal parts), "rank" (0, which wrote the file), and the state of training before the
step. The views are a function of the seed, the epoch and the image indices, so the step can be reproduced. With
data.weights, an epoch can use an image several times, each time with different views; the views are then a function of
the sample indices, which `Plan.samples` yields, instead of the image indices.

If no steps may be skipped, and the precision is not fp16, the host does not wait for the GPU in each step. It reads the
loss of a step after it has queued the next step, and before anything is saved. A non-finite step, and usually the next
step too, have then already changed the weights: the file holds the state after these steps, no checkpoint contains
these weights, and the run ends.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moco.data.plan import Plan
from moco.distributed import HostCopy, gather, on_rank_zero, rank, world_size
from moco.files import WriteError, atomic_write, cause
from moco.runtime.errors import NonFiniteLoss
from moco.training.step import Measures


class NonFiniteGuard:
    """Handles non-finite steps.

    Args:
        in_step: whether `train_step` checks its own loss; otherwise `check` does, one step later.
        limit: number of steps that a run may skip; needs `in_step`.
        skipped: number of steps skipped so far.
        folder: the directory for the state at the first non-finite step.
        state: returns the state to save: configuration, weights, optimizer. Every rank calls it.
    """

    def __init__(
        self,
        plan: Plan,
        in_step: bool,
        limit: int,
        skipped: int,
        folder: Path,
        state: Callable[[], dict[str, Any]],
        log: Callable[[str], None],
    ) -> None:
        assert in_step or not limit
        self.in_step, self.skipped = in_step, skipped
        self._plan, self._limit = plan, limit
        self._folder, self._state, self._log = folder, state, log
        # The last step, which `check_pending` checks: its number, image indices (n,), and its loss and gradient norm.
        self._pending: tuple[int, Tensor, HostCopy] | None = None

    def skip(self, step: int, index: Tensor, error: NonFiniteLoss) -> None:
        """Skip a step, counted from 0, with the image indices `index` (n,) on this rank. Every rank calls this.

        Raises:
            NonFiniteLoss: with the step, its epoch and its images, if no more steps may be skipped.
        """
        saved = self._save(step, index, str(error))
        if self.skipped >= self._limit:
            unchanged = f"The weights, the queue and the last checkpoint are unchanged{saved}"
            raise NonFiniteLoss(self._message(step, index, str(error), unchanged)) from error
        self.skipped += 1
        limit = f"{self.skipped} of at most optim.skip_nonfinite={self._limit}"
        self._log(f"step {step + 1} had {error} and was skipped, {limit}{saved}")

    def check(self, step: int, index: Tensor, measures: Measures) -> None:
        """Check the previous step, and start to copy the loss of this step to the host. Do nothing if `in_step`.

        Errors: see `skip`; they are about the previous step.
        """
        if self.in_step:
            return
        self.check_pending()
        self._pending = step, index, HostCopy(torch.stack([measures["loss"], measures["gradient_norm"]]))

    def check_pending(self) -> None:
        """Check the newest step, before its weights are saved or evaluated. Errors: see `skip`."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        step, index, values = pending
        loss, norm = values.tolist()
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what = f"loss {loss:.4g}, gradient norm {norm:.4g}"
        unchanged = f"The last checkpoint is unchanged{self._save(step, index, what)}"
        raise NonFiniteLoss(self._message(step, index, what, unchanged))

    def _message(self, step: int, index: Tensor, what: str, state: str) -> str:
        epoch, position = divmod(step, self._plan.steps_per_epoch)
        first = ", ".join(map(str, index[:8].tolist()))
        return (
            f"step {step + 1} (epoch {epoch + 1}, batch {position + 1} of {self._plan.steps_per_epoch}; "
            f"rank {rank()} had images {first}, ...) had {what}. {state}. In a new run=..., lower optim.lr, raise "
            "optim.warmup_epochs, or set optim.clip_grad=1; optim.skip_nonfinite=10 skips up to 10 such steps"
        )

    def _save(self, step: int, index: Tensor, what: str) -> str:
        """Save the state on rank 0; return as text where it is, or why saving failed. Every rank calls this."""
        samples = gather(index).cpu()  # (W n,)
        about = {"step": step, "epoch": step // self._plan.steps_per_epoch, "index": samples}
        about |= {"world_size": world_size(), "rank": rank(), "what": what}
        state = about | self._state()  # on all ranks: with sharding the state is gathered
        return on_rank_zero(lambda: self._write(self._folder / f"step_{step + 1}.pt", state))

    def _write(self, file: Path, state: dict[str, Any]) -> str:
        try:
            if not any(self._folder.glob("*.pt")):  # only the first: each file is as large as a checkpoint
                self._folder.mkdir(parents=True, exist_ok=True)
                with atomic_write(file) as temporary, temporary.open("wb") as opened:
                    torch.save(state, opened)
        except (OSError, WriteError) as error:  # the non-finite step is the more important error
            return f" (the state could not be saved to {file}: {cause(error)})"
        first = min(self._folder.glob("*.pt"))
        return f"; the state {'before' if self.in_step else 'after'} the first such step is in {first}"
