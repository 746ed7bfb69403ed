"""Training time, and when to save a checkpoint."""

import time

from moco.config import CheckpointConfig


class CheckpointSchedule:
    """Measures the training time of a run, and decides when to save.

    `recorded` is the training time in seconds in the last checkpoint; at the start, that of earlier attempts.
    """

    def __init__(self, config: CheckpointConfig, steps_per_epoch: int, seconds: float) -> None:
        self._config, self._steps_per_epoch = config, steps_per_epoch
        self._earlier = self.recorded = seconds
        self._began = self._saved = time.monotonic()

    def record(self) -> float:
        """Return the training time so far in seconds, with that of earlier attempts, for a checkpoint."""
        self.recorded = self._earlier + time.monotonic() - self._began
        return self.recorded

    def keeps(self, done: int) -> bool:
        """Return whether the checkpoint after `done` steps is kept permanently."""
        return self._at_epoch(self._config.keep_epochs, done)

    def is_due(self, done: int) -> bool:
        """Return whether to save after `done` steps, regardless of the time."""
        steps = self._config.every_steps
        at_step = bool(steps) and done % steps == 0
        return at_step or self.keeps(done) or self._at_epoch(self._config.every_epochs, done)

    def is_late(self) -> bool:
        """Return whether the last checkpoint is older than `every_minutes`."""
        minutes = self._config.every_minutes
        return minutes > 0 and time.monotonic() - self._saved > 60 * minutes

    def saved(self) -> None:
        """Record the current time as that of the last checkpoint."""
        self._saved = time.monotonic()

    def _at_epoch(self, epochs: int, done: int) -> bool:
        epoch, rest = divmod(done, self._steps_per_epoch)
        return bool(epochs) and rest == 0 and epoch % epochs == 0
