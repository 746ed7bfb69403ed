"""Values that follow from the number of images and steps, for warnings, the doctor's remedies and suggestions."""

LARGEST_QUEUE = 65_536  # of MoCo v1 and v2 on ImageNet (He et al., 2020)
LEFT = 1e-3  # of the initial weights of the momentum encoder, at the end of the run


def momentum_for(steps: int) -> float:
    """Return a momentum with which the momentum encoder leaves its initial weights behind within a run.

    After N steps at momentum m, the share m**N of the initial weights is left. With this value it is `LEFT`, unless the
    value would lie outside the published range, 0.9 to 0.999. It is 0.95 for 150 steps and 0.99 for 700.
    """
    momentum: float = LEFT ** (1 / max(1, steps))
    return min(0.999, max(0.9, round(momentum, 2 if momentum < 0.99 else 3)))


def queue_for(images: int, keys_per_step: int) -> int:
    """Return a queue size of about a quarter of the images: a multiple of the keys per step, and not zero."""
    return max(1, min(images // 4, LARGEST_QUEUE) // keys_per_step) * keys_per_step
