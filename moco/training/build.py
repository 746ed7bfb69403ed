"""From the configuration to the parts: the one place that takes a group of fields and calls a constructor."""

import warnings

from moco.config import RunWarning, TrainConfig, require
from moco.data.plan import Plan
from moco.distributed import world_size


def check_against_data(config: TrainConfig, plan: Plan) -> None:
    """What only shows once the data set's size is known.

    Raises:
        ConfigError: if an epoch would not fill one batch.
    """
    require(
        plan.steps_per_epoch > 0,
        f"batch_size={config.batch_size} exceeds the {plan.length} images of data.name={config.data.name}: lower it",
    )
    if config.optim.warmup_epochs >= config.epochs:
        warnings.warn(
            f"optim.warmup_epochs={config.optim.warmup_epochs} is not over within epochs={config.epochs}: "
            "the learning rate never reaches its peak; set optim.warmup_epochs=0",
            RunWarning,
            stacklevel=2,
        )
    method = config.method
    per_step = config.batch_size * method.keys_per_image
    queue = method.queue_size
    if queue >= plan.length * method.keys_per_image:
        fit_in = max(per_step, plan.length // 2 // per_step * per_step)
        warnings.warn(
            f"method.queue_size={queue} holds every one of the {plan.length} images at least once, so each query meets "
            f"its own old keys (masked: {method.mask_own_keys}) and very stale ones; "
            f"set method.queue_size={fit_in} or less",
            RunWarning,
            stacklevel=2,
        )
    if not method.has_momentum_encoder:
        if config.model.bn == "grouped":
            warnings.warn(
                "model.bn=grouped normalizes an image's views in groups of the same images, which gives each other "
                f"away, and {method.name} has no keys to shuffle: set model.bn=sync",
                RunWarning,
                stacklevel=2,
            )
        return
    parts = config.batch_size // world_size() // config.accumulate
    group = config.model.bn_group_size if config.model.bn == "grouped" else parts
    if config.model.shuffle_keys and config.model.bn != "sync" and group >= config.batch_size:
        warnings.warn(
            f"model.shuffle_keys has nothing to shuffle between: BN sees all {config.batch_size} images as one group, "
            "and query and key of an image share it; set model.bn=grouped with a smaller model.bn_group_size",
            RunWarning,
            stacklevel=2,
        )
