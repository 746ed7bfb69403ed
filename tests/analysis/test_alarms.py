"""The doctor's alarms on recorded healthy and broken runs, and on made-up series with one fault each.

runs.json holds every second record (CIFAR-10: third) of runs on two CPU cores, each with its command.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moco.analysis.doctor import ALARMS, Alarm, Facts, diagnose
from moco.analysis.doctor.alarms import (
    augmentation_too_weak,
    collapse,
    data_starvation,
    learning_rate_too_high,
    loss_at_chance,
    nothing_learned,
    positive_among_negatives,
    statistics_leak,
    temperature_too_high,
    temperature_too_low,
)
from moco.analysis.doctor.series import Series
from moco.analysis.doctor.settings import (
    few_images,
    learning_rate_zero,
    momentum_too_high,
    momentum_too_low,
    queue_against_dataset,
    stale_queue,
)
from moco.losses import info_nce
from tests.losses.loops import unit

RUNS: dict[str, Any] = json.loads((Path(__file__).parent / "runs.json").read_text())
PUBLISHED = {  # temperature, momentum, K, images, keys per step
    "MoCo v1": Facts(0.07, 0.999, 65536, 1_281_167, 256),
    "MoCo v2": Facts(0.2, 0.999, 65536, 1_281_167, 256, mask_own_keys=False),
    "MoCo v3, ResNet-50": Facts(1.0, 0.99, 0, 1_281_167, 8192),
    "CIFAR-10, official notebook": Facts(0.1, 0.99, 4096, 50_000, 512, mask_own_keys=False),
    "CIFAR-10, lightly": Facts(0.2, 0.99, 8192, 50_000, 1024, mask_own_keys=False),
    "CIFAR-10, solo-learn": Facts(0.2, 0.99, 32768, 50_000, 512),
}
FACTS = PUBLISHED["MoCo v2"]
RECORDS = 60


def healthy(**changed: Any) -> dict[str, list[float]]:
    """A plausible run of K = 65536: the loss falls from chance, ranks and accuracies rise, batches are noisy."""
    part = [i / (RECORDS - 1) for i in range(RECORDS)]
    noise = (torch.rand(RECORDS, generator=torch.Generator().manual_seed(0)) - 0.5).tolist()
    series: dict[str, list[float]] = {
        "train/loss": [7.2 + 3.5 * math.exp(-5 * p) + 0.2 * n for p, n in zip(part, noise, strict=True)],
        "train/chance": [math.log1p(65536)] * RECORDS,
        "train/negatives": [65536.0] * RECORDS,
        "train/contrast_accuracy": [0.7 * p for p in part],
        "train/positive_similarity": [0.8 * p for p in part],
        "train/gradient_norm": [1 + 0.5 * n for n in noise],
        "train/queue_fill": [1.0] * RECORDS,
        "train/epoch": [0.01 + 20 * p for p in part],
        "speed/data_wait": [0.05 + 0.05 * n for n in noise],
        "accuracy/untrained": [20.0],
        "accuracy/knn": [20.0, 30.0, 40.0],
        "analysis/effective_rank": [30 + 30 * p for p in part],
        "analysis/spread": [0.4 + 0.5 * p for p in part],
        "train/effective_negatives": [60000 - 20000 * p for p in part],
        "analysis/duplicate_share": [0.0] * RECORDS,
        "analysis/loss_shuffled": [7.5] * RECORDS,
        "analysis/loss_unshuffled": [7.48] * RECORDS,
    }
    return series | changed


def names(series: Series, facts: Facts) -> list[str]:
    return [alarm.name for alarm in diagnose(series, facts)]


@pytest.mark.parametrize(
    ("run", "alarms"),
    [
        ("healthy", []),
        ("cifar10", []),
        ("unshuffled", []),  # did no harm here: kNN 72.9
        ("hot", ["temperature too high"]),
        ("cold", ["temperature too low", "collapse", "loss at chance"]),
        ("no_momentum", ["momentum too low", "collapse", "loss at chance"]),
        ("lr_10", ["collapse", "loss at chance"]),
        ("lr_1", ["collapse", "loss at chance"]),
        ("no_augmentation", ["augmentation too weak"]),
        ("colliding", ["queue too long for the data set"]),
    ],
)
def test_real_runs(run: str, alarms: list[str]) -> None:
    series, facts = RUNS[run]["series"], Facts(**RUNS[run]["facts"])
    assert names(series, facts) == alarms
    for length in (1, 2, 5, 10):  # at the start of the run no other alarms
        start = {name: values[:length] for name, values in series.items()}
        assert set(names(start, facts)) <= set(alarms) | ({"collapse"} if alarms else set())


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_published_recipes_are_healthy(recipe: str) -> None:
    assert names(healthy(), PUBLISHED[recipe]) == []


def test_nothing_recorded_means_nothing_found() -> None:
    assert names({}, FACTS) == []
    assert names({name: [] for name in healthy()}, FACTS) == []


def test_every_alarm_is_listed_once() -> None:
    assert len(set(ALARMS)) == len(ALARMS) == 14


def assert_found(alarm: Alarm | None, *evidence: str) -> None:
    """The alarm has a name, a remedy and evidence with these numbers."""
    assert alarm is not None
    found = alarm.evidence.replace(" %", "%")
    assert all(word.replace(" %", "%") in found for word in evidence), alarm.evidence
    assert alarm.remedy
    assert alarm.name


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.89])
def test_a_low_momentum(momentum: float) -> None:
    assert_found(momentum_too_low({}, FACTS._replace(momentum=momentum)), f"{momentum:g}")
    assert stale_queue({}, FACTS._replace(momentum=momentum)) is None  # reported by the other alarm only
    assert momentum_too_low({}, FACTS._replace(momentum=momentum, queue_size=0)) is None  # harmless without a queue


def test_a_momentum_of_one() -> None:
    assert_found(momentum_too_high({}, FACTS._replace(momentum=1.0)))
    assert momentum_too_high({}, FACTS._replace(momentum=0.9999)) is None


def test_a_momentum_that_cannot_leave_its_initial_weights() -> None:
    """150 steps at 0.999: NEWCOMER's first defect, found before the first step; the remedy is not alarming itself."""
    short = FACTS._replace(momentum=0.999, queue_size=64, dataset_size=250, total_steps=150)
    assert_found(momentum_too_high({}, short), "0.999", "86%", "150")
    assert "method.momentum=0.99" in str(momentum_too_high({}, short))
    assert momentum_too_high({}, short._replace(momentum=0.99)) is None
    few_steps = momentum_too_high({}, short._replace(total_steps=84, epochs=12))  # 0.99 alone is not enough
    assert few_steps is not None
    assert (
        few_steps.remedy == "a longer run with another momentum, epochs=99 method.momentum=0.99, or a run of epochs=987"
    )
    assert momentum_too_high({}, short._replace(total_steps=7000)) is None
    assert momentum_too_high({}, short._replace(momentum=None)) is None
    assert momentum_too_high({}, short._replace(starts_trained=True)) is None  # its initial weights are good ones
    assert names({}, short) == ["momentum too high"]


@pytest.mark.parametrize("momentum", [0.5, 0.994, 0.999, 0.9999, 1.0])
@pytest.mark.parametrize("steps", [10, 84, 150, 299, 690, 4602])
def test_each_remedy_for_the_momentum_ends_the_alarm(momentum: float, steps: int) -> None:
    facts = FACTS._replace(momentum=momentum, total_steps=steps, epochs=steps / 7)

    def alarm(facts: Facts) -> Alarm | None:
        return momentum_too_low({}, facts) or momentum_too_high({}, facts)

    if (found := alarm(facts)) is None:
        return
    for remedy in found.remedy.split(", or "):
        fields = dict(re.findall(r"([\w.]+)=([\d.]+)", remedy))
        better = float(fields.get("method.momentum", momentum))
        epochs = float(fields.get("epochs", facts.epochs))
        followed = facts._replace(momentum=better, epochs=epochs, total_steps=epochs * 7)
        assert alarm(followed) is None, remedy
        assert better**followed.total_steps <= 0.05, remedy  # and not just because the momentum is the recommended one


def test_a_learning_rate_of_zero_and_few_images() -> None:
    assert_found(learning_rate_zero({}, FACTS._replace(lr=0.0)), "optim.lr=0")
    assert learning_rate_zero({}, FACTS) is None
    few = FACTS._replace(dataset_size=40, queue_size=0)
    assert_found(few_images({}, few), "40")
    assert few_images({}, few._replace(starts_trained=True)) is None
    assert names({}, few) == ["few images"]
    # It is to be acted on first, and makes advice on the length of the run pointless.
    assert names({}, few._replace(momentum=0.999, total_steps=40)) == ["few images"]
    assert names({}, few._replace(momentum=0.5, lr=0.0)) == ["few images", "learning rate of 0"]
    with_queue = few._replace(momentum=0.5, queue_size=64)
    assert names({}, with_queue)[:2] == ["few images", "momentum too low"]


SHORT_RUN = {  # 150 steps, a record every 10 steps, and no evaluation
    "train/epoch": [0.02, *(0.2 * i for i in range(1, 16))],
    "train/contrast_accuracy": [0.0, 0.02, 0.05, 0.08, *[0.04] * 12],
    "train/loss": [4.15] * 16,
    "train/chance": [4.174] * 16,
}


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({}, True),
        ({"retrieval/retrieval": [46.0, 48.4]}, True),  # the noise of 250 images is 6 points
        ({"retrieval/retrieval": [46.0, 60.0]}, False),
        ({"train/contrast_accuracy": [0.2] * 16, "retrieval/retrieval": [25.0, 25.9]}, True),
        ({"train/contrast_accuracy": [0.2] * 16, "retrieval/retrieval": [95.0, 95.9]}, False),  # it can hardly rise
        ({"train/contrast_accuracy": [0.2] * 16, "retrieval/retrieval": [25.0, 60.0]}, False),
        ({"accuracy/knn": [58.0, 57.6]}, True),
        ({"accuracy/knn": [58.0, 65.0]}, False),
        ({"train/contrast_accuracy": [0.05] * 10 + [0.2] * 6}, False),
        ({"train/epoch": [0.02, *(0.15 * i for i in range(1, 16))]}, False),  # not finished, few records
    ],
)
def test_a_short_run_that_learns_nothing(changed: dict[str, list[float]], found: bool) -> None:
    facts = FACTS._replace(momentum=0.95, queue_size=64, dataset_size=250, epochs=3, total_steps=150)
    series = SHORT_RUN | changed
    assert names(series, facts) == ["nothing learned"] * found
    assert (nothing_learned(series, facts) is not None) == found
    trained = nothing_learned(series, facts._replace(starts_trained=True))
    assert (trained is not None) == found
    if trained:
        assert "lower optim.lr" in trained.remedy
    # With a cause, only the cause is reported.
    assert names(series, facts._replace(momentum=0.999)) == ["momentum too high"]


@pytest.mark.parametrize(
    ("retrieval", "found"),
    [([25.0], False), ([25.0, 29.5], False), ([25.0, 29.5, 28.0], True), ([25.0, 29.5, 35.0], False)],
)
def test_before_the_end_two_evaluations_show_that_nothing_is_learned(retrieval: list[float], found: bool) -> None:
    """A healthy run on 255 photographs had 29.5 % at its first evaluation, 34.8 % at its second, 46.2 % at its end."""
    facts = FACTS._replace(momentum=0.994, queue_size=64, dataset_size=250, epochs=157, total_steps=1099)
    series = {"train/epoch": [float(i) for i in range(30)], "train/contrast_accuracy": [0.08] * 30}
    alarm = nothing_learned(series | {"retrieval/retrieval": retrieval}, facts)
    assert (alarm is not None) == found
    if alarm:
        assert_found(alarm, "28.0 %", "25.0 %", "5.7 points")


def test_a_stale_queue() -> None:
    assert_found(stale_queue({}, FACTS._replace(momentum=0.9)), "256", "0.0%")
    assert stale_queue({}, FACTS._replace(momentum=0.99)) is None  # in MoCo's own ablation, 1.2 points


@pytest.mark.parametrize(
    ("size", "masked", "found"),
    [(512, True, False), (512, False, False), (800, False, True), (1297, True, False), (1298, True, True)],
)
def test_the_queue_against_the_data_set(size: int, masked: bool, found: bool) -> None:
    alarm = queue_against_dataset({}, Facts(0.2, 0.99, size, 1297, 128, masked))
    assert (alarm is not None) == found
    if alarm is not None:
        assert ("mask_own_keys" in alarm.remedy) == (not masked)
        assert "queue_size=384" in alarm.remedy  # a quarter, in steps of 128 keys


def test_the_advice_on_a_queue_is_never_the_queue_in_use() -> None:
    alarm = queue_against_dataset({}, Facts(0.2, 0.99, 32, 40, 32))
    assert alarm is None  # masked, and shorter than the data set
    alarm = queue_against_dataset({}, Facts(0.2, 0.99, 32, 40, 32, mask_own_keys=False))
    assert alarm is not None
    assert alarm.remedy == "method.mask_own_keys=true, batch_size=20 method.queue_size=20"
    alarm = queue_against_dataset({}, Facts(0.2, 0.99, 64, 40, 32, bn_group=16))  # of moco_v2_small
    assert alarm is not None
    assert alarm.remedy == "batch_size=16 model.bn_group_size=8 method.queue_size=16"


def test_a_low_temperature_by_value_and_by_effective_negatives() -> None:
    assert_found(temperature_too_low({}, FACTS._replace(temperature=0.01)), "0.01")
    assert_found(temperature_too_low(healthy(**{"train/effective_negatives": [1.4] * 9}), FACTS), "0.2", " 1.4 ")
    assert_found(temperature_too_low({"train/temperature": [0.2, 0.02]}, FACTS), "0.02")  # learned


def test_a_high_temperature_by_value_and_by_effective_negatives() -> None:
    assert_found(temperature_too_high({}, FACTS._replace(temperature=2)), "is 2")
    equal = healthy(**{"train/effective_negatives": [65500.0] * 9, "train/contrast_accuracy": [0.1] * 9})
    assert_found(temperature_too_high(equal, FACTS), "65500", "65536", "10%")
    assert temperature_too_high(equal | {"analysis/spread": [0.2, 0.3]}, FACTS) is None  # not spread out yet
    solved = equal | {"train/contrast_accuracy": [0.9] * 9}  # T = 1 with well-spread features
    assert temperature_too_high(solved, FACTS._replace(temperature=1.0)) is None


def test_a_collapse_by_spread_rank_or_gradient() -> None:
    assert_found(collapse(healthy(**{"analysis/spread": [0.5, 0.3] + [0.02] * 5}), FACTS), "0.02")
    late = [60.0] * 40 + [60 * 0.8**i for i in range(20)]  # MoCo v3's late collapse
    falling = {"analysis/effective_rank": late, "accuracy/knn": [20.0, 40.0, 30.0]}
    assert_found(collapse(healthy(**falling), FACTS), "60.0")
    assert_found(collapse(healthy(**falling | {"accuracy/knn": []}), FACTS), "60.0")
    for knn in ([20.0], [20.0, 30.0, 40.0]):  # not evaluated yet, or better than ever: fewer dimensions do no harm
        assert collapse(healthy(**falling | {"accuracy/knn": knn}), FACTS) is None
    labeled = FACTS._replace(supervised=True)  # a class becomes a point
    assert collapse(healthy(**falling), labeled) is None
    untrained = healthy(**{"analysis/spread": [0.03, 0.04]})  # a deep network starts with similar embeddings
    assert collapse(untrained, FACTS) is None
    assert_found(collapse(healthy(**{"analysis/spread": [0.3, 0.04, 0.03]}), FACTS), "0.03")
    assert collapse(healthy(**{"analysis/spread": [0.05]}), FACTS) is None  # one measurement shows no direction
    digits = [43.0, 34.0, 29.0, 28.5, 28.2, 27.4, 25.0, 23.0, 22.0]  # falls in a healthy run
    assert collapse(healthy(**{"analysis/effective_rank": digits}), FACTS) is None
    chance = math.log1p(65536)
    one_point = {"train/loss": [chance - 0.01] * RECORDS, "train/positive_similarity": [0.999] * RECORDS}
    assert_found(collapse(healthy(**one_point), FACTS), "0.999")
    gone = {"train/loss": [chance] * RECORDS, "train/gradient_norm": [2.0] + [0.001] * (RECORDS - 1)}
    assert_found(collapse(healthy(**gone), FACTS), " 2 ", "0.001")
    assert collapse(healthy(**{"train/positive_similarity": [0.999] * RECORDS}), FACTS) is None  # well aligned


def test_a_leak_by_accuracy_without_knn_gain_and_by_the_two_losses() -> None:
    solved = {"train/contrast_accuracy": [0.3] * 10 + [0.999] * 50}
    assert_found(
        statistics_leak(healthy(**solved, **{"accuracy/knn": [20.0, 15.0]}), FACTS), "99.9%", "15.0 %", "20.0 %"
    )
    assert statistics_leak(healthy(**solved), FACTS) is None  # kNN 40: the task is easy, but the features improve
    lower = healthy(**{"analysis/loss_unshuffled": [5.0] * 9})
    assert_found(statistics_leak(lower, FACTS), "5.00", "7.50")
    assert statistics_leak(lower, FACTS._replace(shuffled_keys=True)) is None  # training cannot use it


def test_a_weak_augmentation_needs_records_of_the_start() -> None:
    easy = {"train/positive_similarity": [0.995] * RECORDS, "train/contrast_accuracy": [1.0] * RECORDS}
    assert_found(augmentation_too_weak(healthy(**easy), FACTS), "0.995", "100.0%")
    later = healthy(**easy, **{"train/epoch": [50.0 + i for i in range(RECORDS)]})
    assert augmentation_too_weak(later, FACTS) is None  # normal for a trained encoder
    assert augmentation_too_weak(healthy(**{"train/positive_similarity": [0.995] * RECORDS}), FACTS) is None


@pytest.mark.parametrize(("temperature", "loss"), [(0.2, 10.95), (0.07, 10.9), (1.0, 11.06), (0.2, 11.5)])
def test_a_loss_at_chance_for_long(temperature: float, loss: float) -> None:
    facts = FACTS._replace(temperature=temperature)
    assert_found(loss_at_chance(healthy(**{"train/loss": [loss] * RECORDS}), facts), f"{loss:.2f}", "11.09")
    assert loss_at_chance(healthy(**{"train/loss": [loss] * 50 + [9.0] * 10}), facts) is None
    short = {name: values[:10] for name, values in healthy(**{"train/loss": [loss] * RECORDS}).items()}
    assert loss_at_chance(short, facts) is None
    first_epoch = healthy(**{"train/loss": [loss] * RECORDS, "train/epoch": [i / RECORDS for i in range(RECORDS)]})
    assert loss_at_chance(first_epoch, facts) is None


def test_at_a_high_temperature_a_loss_slightly_below_chance_is_progress() -> None:
    assert loss_at_chance(healthy(**{"train/loss": [10.9] * RECORDS}), FACTS._replace(temperature=1.0)) is None


def test_spikes_and_a_growing_gradient() -> None:
    loss = healthy()["train/loss"]
    for i in (30, 45):
        loss[i] += 1.5
    assert_found(learning_rate_too_high(healthy(**{"train/loss": loss}), FACTS), " 2 ")
    loss[45] -= 1.5
    loss[31] += 1.5  # still the first jump
    assert learning_rate_too_high(healthy(**{"train/loss": loss}), FACTS) is None  # one jump is accepted
    falling = [7 - 0.05 * i + (0.7 if i in (20, 21, 40) else 0.0) for i in range(RECORDS)]
    assert_found(learning_rate_too_high(healthy(**{"train/loss": falling}), FACTS), " 2 ")
    growing = [0.5 * 1.05**i for i in range(RECORDS)]
    assert_found(learning_rate_too_high(healthy(**{"train/gradient_norm": growing}), FACTS), "gradient norm")


def test_a_rise_while_the_queue_fills_is_not_a_jump() -> None:
    loss = [1.0] * 11 + [7.0, 1.0, 7.0, 7.2, 7.4] + [7.0] * 20
    fill = [0.05 * i for i in range(15)] + [1.0] * 21
    assert learning_rate_too_high({"train/loss": loss, "train/queue_fill": fill}, FACTS) is None
    assert_found(learning_rate_too_high({"train/loss": loss}, FACTS))


@pytest.mark.parametrize("directions", [1, 2])
def test_a_positive_among_the_negatives(directions: int) -> None:
    """The floor is computed by the loss itself with the keys among the negatives."""
    key = unit(64, 128, seed=0)
    loss, _ = info_nce(key, key, torch.cat([key, unit(64, 128, seed=1)]), 0.05)
    assert loss.item() == pytest.approx(math.log(2), abs=0.01)
    floor = {
        "train/loss": [directions * loss.item()] * 20,
        "train/chance": [directions * math.log1p(128)] * 20,
        "train/negatives": [128.0] * 20,
        "train/positive_similarity": [0.99] * 20,
        "train/contrast_accuracy": [0.5] * 20,
    }
    assert_found(positive_among_negatives(floor, FACTS), f"{loss.item():.3f}")
    falling = floor | {"train/loss": [directions * (1.2 - 0.06 * i) for i in range(20)]}
    assert positive_among_negatives(falling, FACTS) is None
    assert_found(positive_among_negatives(healthy(**{"analysis/duplicate_share": [1.0] * 9}), FACTS), "100.0%")
    collapsed = healthy(**{"analysis/duplicate_share": [1.0] * 9, "analysis/spread": [0.01] * 9})
    assert positive_among_negatives(collapsed, FACTS) is None  # all keys are the same then


def test_a_device_that_waits() -> None:
    assert_found(data_starvation(healthy(**{"speed/data_wait": [0.05] * 9 + [0.6] * 5}), FACTS), "60%")
    assert data_starvation(healthy(**{"speed/data_wait": [0.9] + [0.05] * 9}), FACTS) is None
    assert data_starvation(healthy(**{"speed/data_wait": [0.9, 0.6] + [0.3] * 4}), FACTS) is None  # start of the loader
    packed = data_starvation(healthy(**{"speed/data_wait": [0.6] * 9}), FACTS._replace(source="shards"))
    assert packed is not None
    assert "moco.pack" not in packed.remedy
    in_memory = data_starvation(healthy(**{"speed/data_wait": [0.6] * 9}), FACTS._replace(in_memory=True))
    assert in_memory is not None
    assert "workers" not in in_memory.remedy  # there are no loader processes
