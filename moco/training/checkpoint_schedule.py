"""Training time, and when to save."""

import time

from moco.config import CheckpointConfig


class CheckpointSchedule:
    """Training time over all attempts, and when the next checkpoint is due.

    Args:
        before: seconds of earlier attempts.
        often: how often to save.
        steps_per_epoch: the plan's.
    """

    def __init__(self, before: float, often: CheckpointConfig, steps_per_epoch: int) -> None:
        self._before, self._often, self._steps_per_epoch = before, often, steps_per_epoch
        self._began = self._saved = time.monotonic()

    def total(self) -> float:
        return self._before + time.monotonic() - self._began

    def keeps(self, done: int) -> bool:
        """Whether the checkpoint behind so many steps is kept for good."""
        return self._each(self._often.keep_epochs, done)

    def is_due(self, done: int) -> bool:
        """Whether one is due behind so many steps, whatever the time."""
        often = self._often
        at_step = bool(often.every_steps) and done % often.every_steps == 0
        return self.keeps(done) or self._each(often.every_epochs, done) or at_step

    def is_late(self) -> bool:
        """Whether one is due by the time since the last."""
        return self._often.every_minutes > 0 and time.monotonic() - self._saved > 60 * self._often.every_minutes

    def saved(self) -> None:
        self._saved = time.monotonic()

    def _each(self, epochs: int, done: int) -> bool:
        epoch, rest = divmod(done, self._steps_per_epoch)
        return bool(epochs) and rest == 0 and epoch % epochs == 0
