"""Alarms about the configuration: momentum, temperature and the length of the queue.

The thresholds are set so that the settings of the published recipes raise no alarm.
"""

from moco.analysis.doctor.series import (
    CONTRAST_ACCURACY,
    EFFECTIVE_NEGATIVES,
    NEGATIVES,
    SPREAD,
    Alarm,
    Check,
    Facts,
    Series,
    latest,
    present_temperature,
)

LOWEST_MOMENTUM = 0.9  # He et al. (2020), Sec. 4.1: 0.9 costs 3.8 points of 59.0, and 0 does not train


def momentum_too_low(series: Series, facts: Facts) -> Alarm | None:
    """Find keys that change faster than the queue is renewed."""
    if not facts.queue_size or facts.momentum is None or facts.momentum >= LOWEST_MOMENTUM:
        return None
    return Alarm(
        "momentum too low",
        f"momentum {facts.momentum:g} is below {LOWEST_MOMENTUM:g}, so the queue mixes keys of very different encoders",
        "method.momentum=0.999 (0.99 for runs of a few thousand steps)",
    )


def momentum_frozen(series: Series, facts: Facts) -> Alarm | None:
    """Find a momentum of 1 from the start: the momentum encoder stays random. A schedule may end at 1."""
    if facts.momentum is None or facts.momentum < 1:
        return None
    return Alarm(
        "momentum of 1",
        "the momentum encoder never changes, so the queries learn to match a random network",
        "method.momentum=0.999",
    )


LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.03, 1.0  # published: 0.05 ... 1 (MoCo v3 with ResNet)
FEW_NEGATIVES = 2.0  # the gradient then comes from the nearest negative, often one of the query's own class
ALL_NEGATIVES = 0.99  # share of K: similarities differ by less than about T / 10, so the loss ranks no negatives
SPREAD_OUT = 0.5  # below: an untrained encoder's embeddings are so close that all negatives count equally at any T
RECOGNIZED = 0.5  # at T = 1 well-spread features have equal weights too, but over half of the queries find their key


def temperature_too_low(series: Series, facts: Facts) -> Alarm | None:
    """Find a gradient that comes from a single negative."""
    temperature, effective = present_temperature(series, facts), latest(series, EFFECTIVE_NEGATIVES)
    if temperature >= LOWEST_TEMPERATURE and not effective < FEW_NEGATIVES:
        return None
    evidence = f"the temperature is {temperature:g}"
    if effective < FEW_NEGATIVES:
        evidence += f", and the gradient of a query comes from only {effective:.1f} effective negatives"
    return Alarm("temperature too low", evidence, "method.temperature=0.1 to 0.2")


def temperature_too_high(series: Series, facts: Facts) -> Alarm | None:
    """Find negatives that all count equally while the queries do not find their keys."""
    temperature = present_temperature(series, facts)
    effective, negatives = latest(series, EFFECTIVE_NEGATIVES), latest(series, NEGATIVES)
    accuracy = latest(series, CONTRAST_ACCURACY)
    equal = effective > ALL_NEGATIVES * negatives and accuracy < RECOGNIZED and not latest(series, SPREAD) < SPREAD_OUT
    if temperature <= HIGHEST_TEMPERATURE and not equal:
        return None
    evidence = f"the temperature is {temperature:g}"
    if equal:
        evidence += f", {effective:.0f} of {negatives:.0f} negatives count equally, and only {accuracy:.0%} of the "
        evidence += "queries find their key"
    return Alarm("temperature too high", evidence, "method.temperature=0.1 to 0.2 (below 1 in any case)")


MOST_OF_DATASET = 0.5  # without masking, 1 query in 8 then meets a key of its own image


def queue_against_dataset(series: Series, facts: Facts) -> Alarm | None:
    """Find a queue that often holds the query's own image (moco issue 146), or is longer than an epoch."""
    share = facts.queue_size / facts.dataset_size
    if share <= (1.0 if facts.mask_own_keys else MOST_OF_DATASET):
        return None
    evidence = f"the queue has {facts.queue_size} keys for {facts.dataset_size} images, so "
    remedy = f"method.queue_size={_power_of_two(facts.dataset_size // 4)}"
    if facts.mask_own_keys:
        evidence += "it holds several keys per image: old keys instead of more images"
    else:
        evidence += f"about {_meets_itself(share):.0%} of the queries meet a key of their own image as a negative"
        remedy = f"method.mask_own_keys=true, {remedy}"
    return Alarm("queue too long for the data set", evidence, remedy)


# The oldest key is K / B steps old. At 3 lifetimes, exp(-3) = 5 % of the encoder that made it is left in the present
# one. Published recipes have at most 2.6 (K 65536, B 256, m 0.99 in MoCo's ablation); m 0.9 has 26.
MOST_LIFETIMES = 3.0


def stale_queue(series: Series, facts: Facts) -> Alarm | None:
    """Find keys that are too old for the momentum. `momentum_too_low` reports a momentum that is too low anyway."""
    steps = facts.queue_size / facts.keys_per_step
    if not steps or facts.momentum is None or facts.momentum < LOWEST_MOMENTUM:
        return None
    if steps * (1 - facts.momentum) <= MOST_LIFETIMES:
        return None
    return Alarm(
        "stale queue",
        f"the oldest of {facts.queue_size} keys is {steps:.0f} steps old, and at momentum {facts.momentum:g} only "
        f"{facts.momentum**steps:.1%} of the encoder that made it is left",
        f"method.momentum={1 - 1 / steps:.4g} or higher, or a shorter method.queue_size",
    )


def _meets_itself(share: float) -> float:
    """Return the probability that an image's last key is still in a queue of `share` = K / M data sets.

    The order of each epoch is independent, so the last visit was M - a + b keys ago, with a and b uniform in 0 ... M.
    """
    return share**2 / 2 if share <= 1 else 1 - max(0.0, 2 - share) ** 2 / 2


def _power_of_two(most: int) -> int:
    return 1 << max(0, most.bit_length() - 1)


SETTINGS_ALARMS: tuple[Check, ...] = (
    momentum_too_low,
    momentum_frozen,
    temperature_too_low,
    temperature_too_high,
    queue_against_dataset,
    stale_queue,
)
