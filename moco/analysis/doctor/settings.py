"""The alarms that depend only on the settings of a run. They can be raised before the first step of the run."""

import math

import numpy as np

from moco.analysis.doctor.series import Alarm, Facts, Series
from moco.config.recommended import FEW_IMAGES, INITIAL_SHARE, momentum_for, queue_advice

LOWEST_MOMENTUM = 0.9  # He et al. (2020), Sec. 4.1: top-1 is 55.2 % at 0.9 and 59.0 % at 0.999; at 0, training fails


def momentum_too_low(series: Series, facts: Facts) -> Alarm | None:
    """Find a momentum encoder that changes faster than the queue is renewed."""
    if not facts.queue_size or facts.momentum is None or facts.momentum >= LOWEST_MOMENTUM:
        return None
    return Alarm(
        "momentum too low",
        f"momentum {facts.momentum:g} is below {LOWEST_MOMENTUM:g}, so the queue mixes keys of very different encoders",
        _momentum_remedy(facts),
    )


# The largest share of its initial weights that the momentum encoder may keep until the end of the run. The recipe
# digits keeps 0.05, cifar10_cpu 1e-5.
MAX_KEPT = 0.5
# The largest share of the initial weights that may be left at the end of the run with a proposed momentum. At momentum
# 0.99, the lowest of the published range, this needs 299 steps.
MAX_KEPT_BY_REMEDY = 0.05


def momentum_too_high(series: Series, facts: Facts) -> Alarm | None:
    """Find a momentum encoder that hardly leaves its random weights in a run of this length, or never changes.

    `facts.momentum` is the momentum of the first step, so a schedule that ends at 1 raises no alarm.
    """
    if facts.momentum is None:
        return None
    if facts.momentum >= 1:
        evidence = "the momentum encoder never changes, so the queries learn to match a random network"
        return Alarm("momentum of 1", evidence, _momentum_remedy(facts))
    left, better = facts.momentum**facts.total_steps, better_momentum(facts)
    if left <= MAX_KEPT or facts.momentum <= better or facts.starts_trained:
        return None
    if few_images(series, facts):  # then a longer run does not help
        return None
    return Alarm(
        "momentum too high",
        f"at momentum {facts.momentum:g}, {100 * left:.0f} % of the momentum encoder's initial weights are left "
        f"after all {facts.total_steps:.0f} steps",
        f"{_momentum_remedy(facts)}, or a run of {_length_for(facts.momentum, facts)}",
    )


def _momentum_remedy(facts: Facts) -> str:
    """Return the momentum that fits the run; if more than `MAX_KEPT_BY_REMEDY` would be left, also a longer run."""
    better = better_momentum(facts)
    left = better**facts.total_steps
    if left <= MAX_KEPT_BY_REMEDY:
        return f"method.momentum={better:g}"
    return f"a longer run with another momentum, {_length_for(better, facts)} method.momentum={better:g}"


def _length_for(momentum: float, facts: Facts) -> str:
    """Return the length of a run that leaves `INITIAL_SHARE` of the initial weights: epochs if known, else steps."""
    steps = math.ceil(math.log(INITIAL_SHARE) / math.log(momentum))
    if math.isinf(facts.epochs):
        return f"{steps:,} steps"
    return f"epochs={math.ceil(steps * facts.epochs / facts.total_steps)}"


def better_momentum(facts: Facts) -> float:
    """Return the momentum that fits the number of steps."""
    return momentum_for(round(min(facts.total_steps, 1e6)))


def learning_rate_zero(series: Series, facts: Facts) -> Alarm | None:
    """Find a learning rate at which no weight changes."""
    if facts.lr != 0:
        return None
    return Alarm("learning rate of 0", "optim.lr=0, so no weight changes", "optim.lr=0.03 for sgd, 1e-4 for adamw")


def few_images(series: Series, facts: Facts) -> Alarm | None:
    """Find a data set that is too small to train a network from random weights."""
    if facts.starts_trained or facts.dataset_size >= FEW_IMAGES:
        return None
    return Alarm(
        "few images",
        f"{facts.dataset_size} images are too few to train an encoder from random weights",
        "published weights: init_from=FILE, or, without training, moco.embed checkpoint=FILE",
    )


# The largest ratio of queue to data set without masking: 1 query in 8 then meets a key of its own image.
MAX_QUEUE_RATIO = 0.5


def queue_against_dataset(series: Series, facts: Facts) -> Alarm | None:
    """Find a queue that often holds the query's image (facebookresearch/moco issue 146) or exceeds the data set."""
    ratio = facts.queue_size / facts.dataset_size
    if ratio <= (1.0 if facts.mask_own_keys else MAX_QUEUE_RATIO):
        return None
    evidence = f"the queue has {facts.queue_size} keys for {facts.dataset_size} images, so "
    remedy = queue_advice(
        facts.dataset_size, facts.keys_per_step, facts.keys_per_image, facts.batch_parts, facts.bn_group
    )
    if facts.mask_own_keys:
        evidence += "it holds several keys of an image, and the older ones add no new image"
    else:
        meeting = 100 * share_meeting_own_keys(facts)
        evidence += f"about {meeting:.0f} % of the queries meet a key of their own image as a negative"
        remedy = f"method.mask_own_keys=true, {remedy}"
    return Alarm("queue too long for the data set", evidence, remedy)


def share_meeting_own_keys(facts: Facts) -> float:
    """Return the share of queries whose image has a key in the queue, averaged over an epoch.

    The keys of the same epoch show other images. Each epoch has a new order, so a batch of an earlier epoch shows the
    query's image with the probability batch / images.
    """
    batch = facts.keys_per_step // facts.keys_per_image
    steps = max(1, facts.dataset_size // batch)  # of an epoch; the images that do not fill a batch are left out
    absent = np.ones(steps)  # at each step, the probability that the queue does not hold the query's image
    older = facts.queue_size / facts.keys_per_step - np.arange(steps)  # batches in the queue from earlier epochs
    while older.max() > 0:
        absent *= 1 - older.clip(0, steps) * batch / max(batch, facts.dataset_size)
        older -= steps
    return float(1 - absent.mean())


# The momentum encoder has a time constant of 1 / (1 - m) steps: after 3 of them, an earlier momentum encoder has a
# weight of exp(-3), 5 %, in the present one. The oldest key is K / B steps old: with K 65536 and B 256, as published,
# 2.6 time constants for m 0.99, and 26 for m 0.9.
MAX_TIME_CONSTANTS = 3.0


def stale_queue(series: Series, facts: Facts) -> Alarm | None:
    """Find keys that are too old for the momentum. `momentum_too_low` reports a momentum below `LOWEST_MOMENTUM`."""
    steps = facts.queue_size / facts.keys_per_step
    if not steps or facts.momentum is None or facts.momentum < LOWEST_MOMENTUM:
        return None
    if steps * (1 - facts.momentum) <= MAX_TIME_CONSTANTS:
        return None
    return Alarm(
        "stale queue",
        f"the oldest of {facts.queue_size} keys is {steps:.0f} steps old, and at momentum {facts.momentum:g} the "
        f"encoder that made it has a weight of only {100 * facts.momentum**steps:.1f} % in the present one",
        f"method.momentum={1 - 1 / steps:.4g} or higher, or a smaller method.queue_size",
    )
