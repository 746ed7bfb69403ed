"""Alarms over what a run was told: momentum, queue, temperature."""

from moco.analysis.series import (
    CONTRAST_ACCURACY,
    EFFECTIVE_NEGATIVES,
    NEGATIVES,
    SPREAD,
    Alarm,
    Facts,
    Series,
    latest,
    present_temperature,
)

LOWEST_MOMENTUM = 0.9  # He et al. (2020), Sec. 4.1: 0.9 costs 3.8 points of 59.0, 0 does not train


def momentum_too_low(series: Series, facts: Facts) -> Alarm | None:
    """The keys change faster than the queue."""
    if not facts.queue_size or facts.momentum >= LOWEST_MOMENTUM:
        return None
    return Alarm(
        "momentum too low",
        f"momentum {facts.momentum:g} is below {LOWEST_MOMENTUM:g}: the queue's keys come from encoders that differ",
        "method.momentum=0.999 (0.99 for runs of a few thousand steps)",
    )


def momentum_frozen(series: Series, facts: Facts) -> Alarm | None:
    """With m = 1 from the start the key encoder stays random. A schedule may end at 1."""
    if facts.momentum < 1:
        return None
    return Alarm(
        "momentum of 1",
        "the key encoder never moves, so queries learn to copy a random network",
        "method.momentum=0.999",
    )


# K / B steps old, the oldest key was made by an encoder of which exp(-3) = 5 % is left in today's. Published recipes
# have at most 2.6 (K 65536, B 256, m 0.99 in MoCo's ablation); m 0.9 has 26.
MOST_LIFETIMES = 3.0


def stale_queue(series: Series, facts: Facts) -> Alarm | None:
    """The oldest keys come from another encoder; a momentum that is too low altogether has its own alarm."""
    steps = facts.queue_size / facts.keys_per_step
    if facts.momentum < LOWEST_MOMENTUM or steps * (1 - facts.momentum) <= MOST_LIFETIMES:
        return None
    left = facts.momentum**steps
    return Alarm(
        "stale queue",
        f"the oldest of {facts.queue_size} keys is {steps:.0f} steps old, and at momentum {facts.momentum:g} "
        f"{left:.1%} of the encoder that made it is left",
        f"method.momentum={1 - 1 / steps:.4g} or higher, or a shorter method.queue_size",
    )


MOST_OF_DATASET = 0.5  # not masked, one query in eight then meets its own key


def queue_against_dataset(series: Series, facts: Facts) -> Alarm | None:
    """The queue meets the query's own image (moco issue 146), or is longer than an epoch."""
    share = facts.queue_size / facts.dataset_size
    if share <= (1.0 if facts.mask_own_keys else MOST_OF_DATASET):
        return None
    if not facts.mask_own_keys:
        what = f"about {_meets_itself(share):.0%} of the queries find a key of their own image among the negatives"
    else:
        what = "it holds several keys of an image, from earlier epochs: no more images, only older keys"
    fix = f"method.queue_size={_power_of_two(facts.dataset_size // 4)}"
    return Alarm(
        "queue too long for the data set",
        f"{facts.queue_size} keys for {facts.dataset_size} images: {what}",
        fix if facts.mask_own_keys else f"method.mask_own_keys=true, {fix}",
    )


LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.03, 1.0  # published: 0.05 ... 1 (MoCo v3's ResNet); see also Wang & Liu
FEW_NEGATIVES = 2.0  # the gradient of a query then comes from its nearest negative, often one of its own class
ALL_NEGATIVES = 0.99  # of K; similarities within a tenth of T of each other: the loss tells no negative from another
SPREAD_OUT = 0.5  # below, an untrained encoder's embeddings lie so close that negatives count alike whatever T is
TOLD_APART = 0.5  # at T = 1 well-spread features weigh alike too, but more than a half of the queries find their key


def temperature_too_low(series: Series, facts: Facts) -> Alarm | None:
    """The gradient comes from one negative alone."""
    temperature = present_temperature(series, facts)
    effective = latest(series, EFFECTIVE_NEGATIVES)
    if temperature >= LOWEST_TEMPERATURE and not effective < FEW_NEGATIVES:
        return None
    evidence = f"temperature {temperature:g}"
    if effective < FEW_NEGATIVES:
        evidence += f"; a query's gradient comes from {effective:.1f} negatives in effect"
    return Alarm("temperature too low", evidence, "method.temperature=0.1 to 0.2")


def temperature_too_high(series: Series, facts: Facts) -> Alarm | None:
    """All negatives count alike, and the queries are not told from them."""
    temperature = present_temperature(series, facts)
    effective, negatives = latest(series, EFFECTIVE_NEGATIVES), latest(series, NEGATIVES)
    accuracy = latest(series, CONTRAST_ACCURACY)
    alike = ""
    close = latest(series, SPREAD) < SPREAD_OUT
    if effective > ALL_NEGATIVES * negatives and accuracy < TOLD_APART and not close:
        alike = f"; {effective:.0f} of {negatives:.0f} negatives count alike, contrast accuracy {accuracy:.0%}"
    if temperature <= HIGHEST_TEMPERATURE and not alike:
        return None
    evidence = f"temperature {temperature:g}{alike}"
    return Alarm("temperature too high", evidence, "method.temperature=0.1 to 0.2 (below 1 in any case)")


def _meets_itself(share: float) -> float:
    """How probably an image's last key is still in a queue of `share` = K / M data sets.

    Each epoch is in an order of its own, so the last visit is M - a + b keys ago, with a and b uniform in 0 ... M.
    """
    return share**2 / 2 if share <= 1 else 1 - max(0.0, 2 - share) ** 2 / 2


def _power_of_two(most: int) -> int:
    return 1 << max(0, most.bit_length() - 1)
