"""Values that follow from the number of images and steps, for warnings, the training doctor and suggested commands."""

from typing import Any

LARGEST_QUEUE = 65_536  # of MoCo v1 and v2 on ImageNet (He et al., 2020)
INITIAL_SHARE = 1e-3  # the share of its initial weights that the momentum encoder keeps until the end of a run
FEW_IMAGES = 200  # with fewer images, train only from published weights, see docs/howto/own_images.md
SMALL_SET = 20_000  # with fewer images, train a small network, as on a laptop
SMALL_BATCH, FEWEST_EPOCHS = 32, 10  # of the recipe for a small set
BUDGET = 40_000  # epochs times images: about ten minutes on a laptop


def momentum_for(steps: int) -> float:
    """Return a momentum with which the momentum encoder leaves its initial weights behind within a run.

    After N steps at momentum m, the share m**N of the initial weights is left. With the returned m, this share is
    `INITIAL_SHARE`, except that m is rounded to three decimals and limited to 0.99 ... 0.999. (In the ablation of He et
    al., 2020, Sec. 4.1, the accuracy is highest at 0.999, and good from 0.99 to 0.9999.) So m is 0.99 up to 723 steps,
    and 0.999 from 4,602 steps.
    """
    momentum: float = INITIAL_SHARE ** (1 / max(1, steps))
    return min(0.999, max(0.99, round(momentum, 3)))


def queue_for(images: int, keys_per_step: int) -> int:
    """Return a queue size of about a quarter of the images, but at most about `LARGEST_QUEUE`.

    It is a multiple of the keys per step, and not zero.
    """
    return max(1, round(min(images / 4, LARGEST_QUEUE) / keys_per_step)) * keys_per_step


def batch_for(most: float, parts: int, group: int) -> tuple[int, str]:
    """Return the largest valid batch size up to `most`, and the fields that set it; 0 and "" if there is none.

    Args:
        most: the upper limit, in images.
        parts: processes times accumulate.
        group: model.bn_group_size with model.bn=grouped, else 1. A smaller group is used if fewer than two groups fit,
            because keys of a single group cannot be shuffled.
    """
    fitting = group
    while fitting > 2 and 2 * parts * fitting > most:
        fitting = max(2, fitting // 2)
    batch = int(most // (parts * fitting)) * parts * fitting
    if batch < 2 * parts * fitting:
        return 0, ""
    lowered = f" model.bn_group_size={fitting}" if fitting < group else ""
    return batch, f"batch_size={batch}{lowered}"


def queue_advice(images: int, keys_per_step: int, keys_per_image: int = 1, parts: int = 1, group: int = 1) -> str:
    """Return the fields that shorten a queue that is too long for the number of images; see `batch_for`."""
    queue = queue_for(images, keys_per_step)
    if queue <= images / 2:
        return f"method.queue_size={queue}"
    batch, fields = batch_for(images / 2 / keys_per_image, parts, group)
    if not batch:
        return "a data.root with more images"
    return f"{fields} method.queue_size={queue_for(images, batch * keys_per_image)}"


def resize_for(size: int) -> int:
    """Return the shorter side to which evaluation resizes images before a central crop of `size`: 256 for 224."""
    return size * 8 // 7


def crop_advice(size_field: str, size: int, resize_field: str, resize: int) -> str:
    """Return what to change if evaluation crops most of an image away; "" if it does not."""
    if resize <= 2 * size:
        return ""
    seen = f"evaluations see at most the central {100 * (size / resize) ** 2:.2g} % of an image"
    return (
        f"{resize_field}={resize} is more than twice {size_field}={size}: {seen}; set {resize_field}={resize_for(size)}"
    )


def recipe_for(images: int, budget: int = BUDGET) -> dict[str, Any]:
    """Return the overrides of a run on a data set; {} if the data set has fewer than `SMALL_BATCH` images.

    Args:
        images: number of training images.
        budget: epochs times images, for a small data set.
    """
    steps_per_epoch = images // SMALL_BATCH
    if steps_per_epoch == 0:
        return {}
    if images >= SMALL_SET:
        return {"experiment": "moco_v2_folder", "method.queue_size": min(4096, queue_for(images, 256))}
    epochs = max(FEWEST_EPOCHS, round(budget / images))
    momentum, queue = momentum_for(epochs * steps_per_epoch), queue_for(images, SMALL_BATCH)
    fitting = {"epochs": epochs, "method.queue_size": queue, "method.momentum": momentum}
    return {"experiment": "moco_v2_small", **fitting}
