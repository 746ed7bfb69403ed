"""The checks of the doctor, causes before consequences.

Each check returns an alarm with evidence and a remedy, or None.

With these thresholds, the settings of the published recipes and this project's own runs (digits, CIFAR-10) raise no
alarm, and deliberately broken runs on the digits raise alarms. `tests/analysis/runs.json` holds the records of these
runs.
"""

import math
from itertools import pairwise
from statistics import fmean, median

from moco.analysis.doctor.series import (
    LATEST,
    LATEST_MEASURES,
    Alarm,
    Check,
    Facts,
    Series,
    at_chance,
    directions,
    latest,
    once_full,
    present_temperature,
    running_means,
)
from moco.analysis.doctor.settings import (
    better_momentum,
    few_images,
    learning_rate_zero,
    momentum_too_high,
    momentum_too_low,
    queue_against_dataset,
    stale_queue,
)

# Published temperatures are 0.05 to 1; MoCo v3 uses 1 with a ResNet.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.03, 1.0
# Effective negatives: with fewer, the gradient comes from the nearest negative, which is often of the query's class.
FEW_NEGATIVES = 2.0
# Effective negatives as a share of all negatives. Above it, the standard deviation of the similarities is below about
# T / 7: no negative stands out.
ALL_NEGATIVES = 0.99
# A spread of the embeddings. With a lower spread, such as that of an untrained encoder, all negatives count equally at
# any temperature.
SPREAD_OUT = 0.5
# Share of the queries that find their key. Above it, it is normal that all negatives count equally, as the negatives do
# at T = 1 if the features are well spread.
RECOGNIZED = 0.5


def temperature_too_low(series: Series, facts: Facts) -> Alarm | None:
    """Find a temperature well below the published ones, or a gradient that comes from one or two negatives."""
    temperature, effective = present_temperature(series, facts), latest(series, "train/effective_negatives")
    if temperature >= LOWEST_TEMPERATURE and not effective < FEW_NEGATIVES:
        return None
    evidence = f"the temperature is {temperature:g}"
    if effective < FEW_NEGATIVES:
        evidence += f", and the gradient of a query comes from only {effective:.1f} effective negatives"
    return Alarm("temperature too low", evidence, "method.temperature=0.1 to 0.2")


def temperature_too_high(series: Series, facts: Facts) -> Alarm | None:
    """Find a temperature above 1, or negatives that all count equally while the queries do not find their keys."""
    temperature = present_temperature(series, facts)
    effective, negatives = latest(series, "train/effective_negatives"), latest(series, "train/negatives")
    accuracy = latest(series, "train/contrast_accuracy")
    spread_out = not latest(series, "analysis/spread") < SPREAD_OUT
    equal = effective > ALL_NEGATIVES * negatives and accuracy < RECOGNIZED and spread_out
    if temperature <= HIGHEST_TEMPERATURE and not equal:
        return None
    evidence = f"the temperature is {temperature:g}"
    if equal:
        evidence += (
            f", {effective:.0f} of {negatives:.0f} negatives count equally, and only {100 * accuracy:.0f} % of the "
            "queries find their key"
        )
    return Alarm("temperature too high", evidence, "method.temperature=0.1 to 0.2 (below 1 in any case)")


# Share of the queries with their own key among the negatives. It is 1 if keys are enqueued before the loss is computed.
# When embeddings begin to collapse, it lies between 0 and 1: some negatives then equal the query's own key.
MAX_DUPLICATES = 0.1
LOG_2_MARGIN = 0.05  # nats above log 2 that the other negatives may still add in a well-trained run
SOLVED = 0.99  # share of the queries that find their key; without shuffling over 0.999 (He et al., 2020, Fig. A.1)


def positive_among_negatives(series: Series, facts: Facts) -> Alarm | None:
    """Find a key that is in the queue before the loss is computed: the loss then cannot fall below log 2."""
    share = latest(series, "analysis/duplicate_share")
    losses = [loss / directions(series) for loss in series.get("train/loss", ())[-2 * LATEST :]]
    similarity, accuracy = latest(series, "train/positive_similarity"), latest(series, "train/contrast_accuracy")
    found = []
    if share > MAX_DUPLICATES and not _has_collapsed(series):
        found.append(f"{100 * share:.1f} % of the queries have their own key among the negatives")
    at_floor = len(losses) == 2 * LATEST and all(-0.01 < loss - math.log(2) < LOG_2_MARGIN for loss in losses)
    if at_floor and similarity > 0.9 and accuracy < SOLVED:
        found.append(f"the loss stays at {losses[-1]:.3f} (log 2), but positives have a similarity of {similarity:.2f}")
    return _alarm("positive among the negatives", found, "enqueueing after the loss, or method.mask_own_keys=true")


VIEWS_SIMILAR = 0.98  # mean similarity of two views for an untrained encoder; this project's recipes have 0.72 to 0.85
EARLY_EPOCHS = 3.0
# Share of the queries that find their key after these epochs: digits 0.10, CIFAR-10 0.12, without augmentation 0.94.
EARLY_SOLVED = 0.9


def augmentation_too_weak(series: Series, facts: Facts) -> Alarm | None:
    """Find views that an untrained encoder already recognizes, so that the task is solved within a few epochs."""
    records = zip(series.get("train/epoch", ()), series.get("train/contrast_accuracy", ()), strict=False)
    early = [accuracy for epoch, accuracy in records if 1 <= epoch <= EARLY_EPOCHS]
    if not early or early[-1] < EARLY_SOLVED or not _views_similar(series):
        return None
    return Alarm(
        "augmentation too weak",
        f"positives had a similarity of {series['train/positive_similarity'][0]:.3f} in the first step, and after "
        f"at most {EARLY_EPOCHS:g} epochs {100 * early[-1]:.1f} % of the queries find their key",
        "smaller crops (augment.crop_scale=[0.2,1.0]), stronger color jitter, grayscale and blur",
    )


NO_GAIN = 1.0  # percentage points: a kNN accuracy at most this far above that of the untrained encoder is no gain
LEAK_NATS = 0.1  # loss with shuffled keys minus that with unshuffled keys of the same views; its noise is far smaller


def statistics_leak(series: Series, facts: Facts) -> Alarm | None:
    """Find BN statistics that reveal the key, so that the features need not improve (He et al., 2020, Sec. 3.3)."""
    shuffled, unshuffled = latest(series, "analysis/loss_shuffled"), latest(series, "analysis/loss_unshuffled")
    remedy = "model.shuffle_keys=true with model.bn=grouped, and a larger model.bn_group_size"
    if facts.momentum is None:  # without a momentum encoder there are no keys to shuffle
        remedy = "model.bn=sync"
    if shuffled - unshuffled > LEAK_NATS and not facts.shuffled_keys:  # with shuffling, training cannot use the leak
        evidence = f"the loss is {unshuffled:.2f} with keys in the BN groups of their queries and {shuffled:.2f} with "
        return Alarm("BN leak", f"{evidence}shuffled keys", remedy)
    accuracies = once_full(series, "train/contrast_accuracy")
    knns, untrained = series.get("accuracy/knn", ()), latest(series, "accuracy/untrained")
    if len(accuracies) < LATEST or len(knns) < 2:  # the first kNN is the untrained encoder's
        return None
    accuracy, knn = fmean(accuracies[-LATEST:]), knns[-1]
    if accuracy < SOLVED or not knn <= untrained + NO_GAIN or _views_similar(series) or at_chance(series, facts):
        return None
    evidence = (
        f"{100 * accuracy:.1f} % of the queries find their key, but kNN is {knn:.1f} % (untrained: {untrained:.1f} %)"
    )
    return Alarm("BN leak", evidence, f"{remedy}; otherwise check what the two views share besides the image")


# A jump of the loss exceeds this number of nats, and this multiple of the noise, which is about 0.1 nats between steps.
SPIKE_NATS, SPIKE_DEVIATIONS = 0.5, 6.0
SPIKES = 2  # jumps
BEFORE = 10  # records before a jump; their consecutive differences measure the noise, even while the loss falls
NORM_GROWTH = 3.0  # factor from the second to the last quarter of the records; healthy runs: at most 1.4 (CIFAR-10)


def learning_rate_too_high(series: Series, facts: Facts) -> Alarm | None:
    """Find a loss that jumps up repeatedly, or a growing gradient norm."""
    found = []
    spikes = _spikes(series)
    if spikes >= SPIKES:
        found.append(f"the loss rose {spikes} times by at least {SPIKE_NATS:g} nats above its previous values")
    norms = once_full(series, "train/gradient_norm")
    quarter = len(norms) // 4
    if quarter >= LATEST and not at_chance(series, facts):
        early, late = median(norms[quarter : 2 * quarter]), median(norms[-quarter:])
        if late > NORM_GROWTH * early > 0:
            found.append(f"the gradient norm grew from {early:.2g} to {late:.2g}")
    return _alarm("learning rate too high", found, "half of optim.lr, a longer warm-up, or optim.clip_grad=1")


def _spikes(series: Series) -> int:
    """Count the jumps of the loss; consecutive high records are one jump."""
    losses, spikes, high = once_full(series, "train/loss"), 0, False
    for i in range(BEFORE, len(losses)):
        before = losses[i - BEFORE : i]
        variation = median(abs(after - loss) for loss, after in pairwise(before))
        jump = losses[i] - median(before[-LATEST:])
        was_high, high = high, jump > max(SPIKE_NATS * directions(series), SPIKE_DEVIATIONS * variation)
        spikes += high and not was_high
    return spikes


# At this spread, two images have a mean cosine of 0.99. On the digits, the spread is 0.6 to 0.97, and at most 0.03
# after a collapse.
COLLAPSED_SPREAD = 0.1
RANK_FALL = 0.25  # share of the highest rank so far; the rank also falls in some healthy runs (2,000 images: 79 to 12)
# Gradient norm as a share of its value in the first step. On the digits, healthy runs end at 0.06 or more. Runs that
# collapse because of optim.lr=1 end below 0.001.
GRADIENT_GONE = 0.01
ONE_POINT = 0.98  # a positive similarity that shows a collapse only while the loss is at chance


def collapse(series: Series, facts: Facts) -> Alarm | None:
    """Find embeddings that become one point or use ever fewer dimensions."""
    found = []
    spreads = series.get("analysis/spread", ())[-LATEST_MEASURES:]
    if _has_collapsed(series) and spreads[-1] <= spreads[0]:  # an untrained encoder's spread is low too, but grows
        found.append(f"the spread of the embeddings is {spreads[-1]:.2g} (1 is uniform, 0 is a single point)")
    ranks = running_means(series, "analysis/effective_rank")
    # With labels each class becomes a point, and the rank falls to the number of classes.
    harmless = facts.supervised or _improves(series, facts) or _awaits_evaluation(series)
    if ranks and ranks[-1] < RANK_FALL * max(ranks) and not harmless:
        found.append(f"the effective rank fell from {max(ranks):.1f} to {ranks[-1]:.1f}")
    similarity, stuck = latest(series, "train/positive_similarity"), at_chance(series, facts) >= LATEST
    if similarity > ONE_POINT and stuck:
        found.append(f"all keys are the same: the positive similarity is {similarity:.3f} with the loss at chance")
    norm, first = latest(series, "train/gradient_norm"), (*series.get("train/gradient_norm", ()), 0.0)[0]
    if norm < GRADIENT_GONE * first and stuck:
        found.append(f"the gradient norm fell from {first:.2g} to {norm:.2g} with the loss at chance")
    momentum = "" if facts.momentum is None else ", method.momentum=0.99 or higher"
    return _alarm("collapse", found, f"a lower optim.lr, method.temperature=0.2{momentum}")


LONG_EPOCHS, LONG_RECORDS = 3.0, 20  # the loss of a healthy run is below chance after an epoch or two


def loss_at_chance(series: Series, facts: Facts) -> Alarm | None:
    """Find a run that learns nothing (facebookresearch/moco issues 9 and 12: "stuck at 6.9")."""
    count, epochs = at_chance(series, facts), series.get("train/epoch", ())
    if count < LONG_RECORDS or (len(epochs) >= count and epochs[-1] - epochs[-count] < LONG_EPOCHS):
        return None
    return Alarm(
        "loss at chance",
        f"the last {count} records of the loss are at chance: {series['train/loss'][-1]:.2f}, where random keys give "
        f"{series['train/chance'][-1]:.2f}",
        "a lower optim.lr or a warm-up, method.temperature=0.2; check in views.png that both views show the same image",
    )


# Share of the queries that find their key. Healthy runs reach 0.15; with a short queue, chance alone is almost 0.1.
FEW_FOUND = 0.1
NO_GAIN_ERRORS = 2.0  # standard errors: a retrieval at most this far above that of the first step is no gain
HIGH_RETRIEVAL = 90.0  # percent; above, the retrieval of a run that learns may rise by less than its noise
EVALUATIONS = ("retrieval/retrieval", "accuracy/knn")


def nothing_learned(series: Series, facts: Facts) -> Alarm | None:
    """Find a run that shows no sign of learning at its end, or after enough epochs.

    `diagnose` runs this check only if there is no other alarm.
    """
    accuracies, epochs = series.get("train/contrast_accuracy", ()), series.get("train/epoch", ())
    if facts.has_teacher or not accuracies or not epochs:
        return None
    at_end = epochs[-1] >= facts.epochs
    if not at_end and (len(accuracies) < LONG_RECORDS or epochs[-1] < LONG_EPOCHS or _awaits_evaluation(series, 2)):
        return None
    gains = {name: _gain(series, name, facts) for name in EVALUATIONS}
    if any(gain > 0 for gain, _ in gains.values()):  # nan, without an evaluation, is not above 0
        return None
    found = latest(series, "train/contrast_accuracy")
    retrieval = series.get(EVALUATIONS[0], ())
    should_rise = at_end and len(retrieval) > 1 and retrieval[-1] < HIGH_RETRIEVAL
    if found >= FEW_FOUND and not should_rise:
        return None
    evidence = [f"only {100 * found:.0f} % of the queries find their key"] * (found < FEW_FOUND)
    evidence += [text for gain, text in gains.values() if not math.isnan(gain)]
    better = better_momentum(facts)
    momentum = f", method.momentum={better:g}" if facts.momentum not in (None, better) else ""
    remedy = f"more epochs, twice the optim.lr{momentum}, or more images"
    if facts.starts_trained:
        remedy = "a lower optim.lr, more epochs, or the initial weights without further training"
    return Alarm("nothing learned", ", and ".join(evidence), remedy)


def _gain(series: Series, name: str, facts: Facts) -> tuple[float, str]:
    """Return the gain of an evaluation since the first step, minus its noise, in percentage points; and a text.

    The text states both values and the noise. The noise of kNN is the constant `NO_GAIN`, which is too low for few
    held-out images. Without a second value the result is (nan, "").
    """
    values = series.get(name, ())
    if len(values) < 2:
        return math.nan, ""
    first, last = values[0], values[-1]
    noise = NO_GAIN
    if name == "retrieval/retrieval":  # measured on at most 1024 images, or on one batch if that is larger
        share = last / 100
        noise = NO_GAIN_ERRORS * 100 * math.sqrt(share * (1 - share) / min(facts.dataset_size, 1024))
    text = f"{name.rpartition('/')[2]} is {last:.1f} % ({first:.1f} % before the first step"
    return last - first - noise, f"{text}; a gain of up to {noise:.1f} points counts as none)"


def _improves(series: Series, facts: Facts) -> bool:
    """Return whether an evaluation during training has a gain and is within `NO_GAIN` of its best value."""
    values = {name: series[name] for name in EVALUATIONS if series.get(name)}
    return any(_gain(series, name, facts)[0] > 0 and each[-1] > max(each) - NO_GAIN for name, each in values.items())


def _awaits_evaluation(series: Series, count: int = 1) -> bool:
    """Return whether the encoder was evaluated before the first step, and fewer than `count` times since then."""
    return any(1 <= len(series.get(name, ())) <= count for name in EVALUATIONS)


MAX_WAITING = 0.2  # share of the time; 0.09 on the digits, 0.05 on CIFAR-10 with a CPU
STARTING = 2  # records at the start of a run, while the loader's processes start and fill their queue


def data_starvation(series: Series, facts: Facts) -> Alarm | None:
    """Find a device that waits for images."""
    waits = series.get("speed/data_wait", ())[STARTING:][-LATEST:]
    if len(waits) < LATEST or not (waiting := median(waits)) > MAX_WAITING:
        return None
    remedy = "more data.workers (at most one per processor core)"
    if facts.in_memory:  # no loader process is involved
        remedy = "cheaper augmentation (fields of augment), or stop other programs on this machine"
    elif facts.source in ("folder", "imagenet", "video"):
        smaller = "frames in shards" if facts.source == "video" else "smaller images"
        remedy += f", or {smaller}: python -m moco.pack writes them with a chosen short_side"
    return Alarm("data starvation", f"{100 * waiting:.0f} % of the time is spent waiting for batches", remedy)


# Without `nothing_learned` and `data_starvation`, which `diagnose` adds.
ALARMS: tuple[Check, ...] = (
    few_images,
    momentum_too_low,
    momentum_too_high,
    learning_rate_zero,
    temperature_too_low,
    temperature_too_high,
    queue_against_dataset,
    stale_queue,
    positive_among_negatives,
    augmentation_too_weak,
    statistics_leak,
    learning_rate_too_high,
    collapse,
    loss_at_chance,
)


def _alarm(name: str, found: list[str], remedy: str) -> Alarm | None:
    return Alarm(name, "; ".join(found), remedy) if found else None


def _has_collapsed(series: Series) -> bool:
    """Return whether the newest `LATEST_MEASURES` spreads all show a single point; False with fewer records."""
    spreads = series.get("analysis/spread", ())[-LATEST_MEASURES:]
    return len(spreads) == LATEST_MEASURES and max(spreads) < COLLAPSED_SPREAD


def _views_similar(series: Series) -> bool:
    """Return whether the positives of the first step were already similar; False without records of the start."""
    epochs, similarity = series.get("train/epoch", ()), series.get("train/positive_similarity", ())
    return bool(epochs and similarity) and epochs[0] <= 1 and similarity[0] > VIEWS_SIMILAR
