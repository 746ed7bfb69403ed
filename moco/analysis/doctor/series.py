"""The input and output of a check: recorded series by their names in metrics.jsonl, facts about the run, the alarm.

A check whose series was not recorded finds nothing: `latest` is nan then, and every comparison with nan is false.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

Series = Mapping[str, Sequence[float]]  # by the names in metrics.jsonl, in the order of recording; lengths may differ

LATEST = 5  # records whose mean is the present value: single batches are noisy
LATEST_MEASURES = 2  # as LATEST, for measures of thousands of keys, which are recorded rarely and have little noise
AT_CHANCE_COSINE = 0.05  # at chance: the loss is below the chance level by at most this divided by T (nats) ...
AT_CHANCE_SHARE = 0.02  # ... and by at most this share of the chance level, which is the tighter bound at a low T


class Facts(NamedTuple):
    """Settings of the run that the alarms depend on."""

    temperature: float
    momentum: float | None  # of the momentum encoder; None without one
    queue_size: int  # K; 0 without a queue: the negatives are the batch
    dataset_size: int  # images
    keys_per_step: int  # global batch size times keys per image (2 for a symmetric loss)
    mask_own_keys: bool = True
    supervised: bool = False  # the labels define the positives
    epochs: float = math.inf  # of the complete run; inf if unknown
    total_steps: float = math.inf  # of the complete run; inf if unknown
    lr: float = math.nan  # the configured peak; nan if unknown
    has_teacher: bool = False  # the queries learn a teacher's features, and need not find keys
    starts_trained: bool = False  # from published weights, or those of another run
    shuffled_keys: bool = False  # no key is normalized in the BN group of its query
    source: str = ""  # data.name
    in_memory: bool = False  # the images are in memory, so there are no loader processes
    keys_per_image: int = 1  # views of an image that serve as keys in one step
    batch_parts: int = 1  # processes times accumulate, which divide the batch
    bn_group: int = 1  # model.bn_group_size with model.bn=grouped, else 1


class Alarm(NamedTuple):
    """One finding."""

    name: str
    evidence: str  # with the numbers
    remedy: str  # fields to change, from the most to the least likely to help

    def __str__(self) -> str:
        return f"{self.name}: {self.evidence}. Try {self.remedy}"


Check = Callable[[Series, Facts], Alarm | None]


def latest(series: Series, name: str) -> float:
    """Return the mean of the `LATEST` newest records; nan if there is no record."""
    values = series.get(name, ())
    return fmean(values[-LATEST:]) if values else math.nan


def running_means(series: Series, name: str) -> Sequence[float]:
    """Return the means of `LATEST_MEASURES` consecutive records, the newest last; empty with fewer records."""
    values = series.get(name, ())
    return [fmean(values[i : i + LATEST_MEASURES]) for i in range(len(values) - LATEST_MEASURES + 1)]


def present_temperature(series: Series, facts: Facts) -> float:
    """Return the newest recorded temperature, or the configured one."""
    return series["train/temperature"][-1] if series.get("train/temperature") else facts.temperature


def directions(series: Series) -> int:
    """Return how many losses the recorded loss adds up: 2 for a symmetric loss with reduction=sum, else 1."""
    chance, negatives = series.get("train/chance"), series.get("train/negatives")
    if not chance or not negatives or negatives[-1] <= 0:
        return 1
    return max(1, round(chance[-1] / math.log1p(negatives[-1])))


def at_chance(series: Series, facts: Facts) -> int:
    """Count the newest consecutive records whose loss is at chance level or above."""
    temperature, count = present_temperature(series, facts), 0
    nats = AT_CHANCE_COSINE / temperature * directions(series)
    losses, chances = series.get("train/loss", ()), series.get("train/chance", ())
    for loss, chance in zip(reversed(losses), reversed(chances), strict=False):
        if loss < chance - min(nats, AT_CHANCE_SHARE * chance):
            break
        count += 1
    return count


def once_full(series: Series, name: str) -> Sequence[float]:
    """Return the records made with a full queue: before, random initial keys make the loss low and rising."""
    values, fill = series.get(name, ()), series.get("train/queue_fill", ())
    full = next((len(fill) - i for i, share in enumerate(fill) if share >= 1), 0)  # both series end at the same step
    return values[max(0, len(values) - full) :] if fill else values
