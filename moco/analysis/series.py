"""What the doctor reads and says: series of measures by the names of metrics.jsonl, a run's facts, an alarm."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

Series = Mapping[str, Sequence[float]]  # each in the order of recording; lengths may differ

# What the training loop records.
LOSS, CHANCE = "train/loss", "train/chance"
CONTRAST_ACCURACY = "train/contrast_accuracy"  # 0 ... 1
POSITIVE_SIMILARITY = "train/positive_similarity"
EFFECTIVE_NEGATIVES = "train/effective_negatives"
NEGATIVES, QUEUE_FILL = "train/negatives", "train/queue_fill"
TEMPERATURE, GRADIENT_NORM, EPOCH = "train/temperature", "train/gradient_norm", "train/epoch"
KNN, UNTRAINED = "accuracy/knn", "accuracy/untrained"  # percent
DATA_WAIT = "speed/data_wait"  # share of the time
# What `moco.analysis` measures.
EFFECTIVE_RANK = "analysis/effective_rank"  # `rank_me` of real keys, not of a queue's random start
SPREAD = "analysis/spread"  # `spread` of the same
DUPLICATES = "analysis/duplicate_share"  # `duplicate_share`
LOSS_SHUFFLED, LOSS_UNSHUFFLED = "analysis/loss_shuffled", "analysis/loss_unshuffled"  # the same views, keys either way

LATEST = 5  # records whose mean is the present value: single batches are noisy
LOOKS = 2  # the same for what is measured of thousands of keys, seldom: it is hardly noisy, and five would be late
AT_CHANCE_COSINE = 0.05  # at chance: positives nearer than negatives by no more than this; over T it is nats ...
AT_CHANCE_SHARE = 0.02  # ... and no more than this share of the chance level, which decides at a low T


class Facts(NamedTuple):
    """What a run was told."""

    temperature: float
    momentum: float  # of the momentum encoder
    queue_size: int  # K; 0: none, the negatives are the batch
    dataset_size: int  # images
    keys_per_step: int  # of the global batch, times the directions
    mask_own_keys: bool = True
    supervised: bool = False  # positives by labels


class Alarm(NamedTuple):
    """One finding."""

    name: str
    evidence: str  # with the numbers
    remedy: str  # fields to change, the likeliest first


def latest(series: Series, name: str) -> float:
    """The mean of the newest records; nan, with which every comparison fails, where nothing was recorded."""
    values = series.get(name, ())
    return fmean(values[-LATEST:]) if values else math.nan


def looks(series: Series, name: str) -> Sequence[float]:
    """The means of `LOOKS` records in a row, the newest last; empty with fewer."""
    values = series.get(name, ())
    return [fmean(values[i : i + LOOKS]) for i in range(len(values) - LOOKS + 1)]


def present_temperature(series: Series, facts: Facts) -> float:
    """Where it is learned or follows a schedule, the newest record."""
    return series[TEMPERATURE][-1] if series.get(TEMPERATURE) else facts.temperature


def directions(series: Series) -> int:
    """How many losses were added up: 2 with reduction=sum and both directions, else 1."""
    chance, negatives = series.get(CHANCE), series.get(NEGATIVES)
    if not chance or not negatives or negatives[-1] <= 0:
        return 1
    return max(1, round(chance[-1] / math.log1p(negatives[-1])))


def at_chance(series: Series, facts: Facts) -> int:
    """How many of the newest records of the loss in a row stand at chance or above."""
    temperature, count = present_temperature(series, facts), 0
    nats = AT_CHANCE_COSINE / temperature * directions(series)
    for loss, chance in zip(reversed(series.get(LOSS, ())), reversed(series.get(CHANCE, ())), strict=False):
        if loss < chance - min(nats, AT_CHANCE_SHARE * chance):
            break
        count += 1
    return count


def once_full(series: Series, name: str) -> Sequence[float]:
    """A series from the record on in which the queue is full: before, its random keys make an easy loss that rises."""
    values, fill = series.get(name, ()), series.get(QUEUE_FILL, ())
    start = next((i for i, share in enumerate(fill) if share >= 1), len(fill))
    return values[max(0, start - len(fill) + len(values)) :] if fill else values
