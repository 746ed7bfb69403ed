"""Errors that several packages raise."""


class NonFiniteLoss(FloatingPointError):
    """The loss or its gradient is not finite. Nothing has changed: not a weight, a statistic, or a key in the queue."""
