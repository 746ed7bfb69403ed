"""Errors that several packages raise."""


class NonFiniteLoss(FloatingPointError):
    """The loss or its gradient is not finite."""
