"""Training time, and when to save."""

import time


class Clock:
    """Training time over all attempts, and when the next checkpoint is due."""

    def __init__(self, before: float, every_minutes: float) -> None:
        self._before, self._every = before, 60 * every_minutes
        self._began = self._saved = time.monotonic()

    def total(self) -> float:
        return self._before + time.monotonic() - self._began

    def is_due(self) -> bool:
        return self._every > 0 and time.monotonic() - self._saved > self._every

    def saved(self) -> None:
        self._saved = time.monotonic()
