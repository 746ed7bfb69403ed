"""Alarms over what came of a run: leaks, collapse, a loss that stands still or jumps, a device that waits."""

import math
from itertools import pairwise
from statistics import fmean, median

from moco.analysis.series import (
    CHANCE,
    CONTRAST_ACCURACY,
    DATA_WAIT,
    DUPLICATES,
    EFFECTIVE_RANK,
    EPOCH,
    GRADIENT_NORM,
    KNN,
    LATEST,
    LOOKS,
    LOSS,
    LOSS_SHUFFLED,
    LOSS_UNSHUFFLED,
    POSITIVE_SIMILARITY,
    SPREAD,
    UNTRAINED,
    Alarm,
    Facts,
    Series,
    at_chance,
    directions,
    latest,
    looks,
    once_full,
)

COLLAPSED_SPREAD = 0.1  # the mean cosine of two images is then 0.99; digits: 0.8 to 0.96, collapsed below 0.02
RANK_FALL = 0.25  # of the highest rank; it falls in healthy runs too (digits: 43 to 27), collapsed ones have 1.1
GRADIENT_GONE = 0.01  # of the first step's; the digits end at 0.06, and broken runs at 0.002
ONE_POINT = 0.98  # a positive similarity that means something only if the loss is not at chance


def collapse(series: Series, facts: Facts) -> Alarm | None:
    """All images become one point, or fill ever fewer dimensions."""
    found = []
    spreads = series.get(SPREAD, ())[-LOOKS:]
    if _has_collapsed(series) and spreads[-1] <= spreads[0]:  # an untrained encoder's is low too, and grows
        found.append(f"the spread of the embeddings is {spreads[-1]:.2g} (1 is uniform, 0 is one point)")
    ranks = looks(series, EFFECTIVE_RANK)
    # With labels a class becomes a point, and the rank falls to the number of classes.
    if ranks and ranks[-1] < RANK_FALL * max(ranks) and not facts.supervised:
        found.append(f"the effective rank fell from {max(ranks):.1f} to {ranks[-1]:.1f}")
    similarity, stuck = latest(series, POSITIVE_SIMILARITY), at_chance(series, facts) >= LATEST
    if similarity > ONE_POINT and stuck:
        found.append(f"the positives' similarity is {similarity:.3f} and the loss at chance: all keys are alike")
    norm, first = latest(series, GRADIENT_NORM), (*series.get(GRADIENT_NORM, ()), 0.0)[0]
    if norm < GRADIENT_GONE * first and stuck:
        found.append(f"the gradient norm fell from {first:.2g} to {norm:.2g} with the loss at chance")
    if not found:
        return None
    return Alarm("collapse", "; ".join(found), "lower optim.lr, method.temperature=0.2, method.momentum=0.99 or higher")


SOLVED = 0.99  # of the queries find their key; without shuffling, He et al.'s (2020) Fig. 5 shows over 99.9 %
NO_GAIN = 1.0  # percentage points of kNN over the untrained encoder
LEAK_NATS = 0.1  # between the two losses on the same views; paired, so a batch's noise is far below


def statistics_leak(series: Series, facts: Facts) -> Alarm | None:
    """BN's statistics tell the key (He et al., 2020, Sec. 3.3): the task is solved, the features are no better."""
    shuffled, unshuffled = latest(series, LOSS_SHUFFLED), latest(series, LOSS_UNSHUFFLED)
    remedy = "model.shuffle_keys=true with model.bn=grouped; a larger model.bn_group_size"
    if shuffled - unshuffled > LEAK_NATS:
        evidence = f"loss {unshuffled:.2f} with keys in their queries' BN groups, {shuffled:.2f} with shuffled ones"
        return Alarm("BN leak", evidence, remedy)
    accuracies, knns, untrained = once_full(series, CONTRAST_ACCURACY), series.get(KNN, ()), latest(series, UNTRAINED)
    if len(accuracies) < LATEST or len(knns) < 2:  # the first kNN is the untrained encoder's
        return None
    accuracy, knn = fmean(accuracies[-LATEST:]), knns[-1]
    if accuracy < SOLVED or not knn <= untrained + NO_GAIN or _views_alike(series) or at_chance(series, facts):
        return None
    evidence = (
        f"contrast accuracy {accuracy:.1%}, but kNN {knn:.1f} % where the untrained encoder has {untrained:.1f} %"
    )
    return Alarm("BN leak", evidence, remedy + "; else look for what the two views share beside the image")


VIEWS_ALIKE = 0.98  # similarity of two views to an untrained encoder; this project's recipes have 0.72 to 0.85
EARLY_EPOCHS = 3.0
EARLY_SOLVED = 0.9  # by then digits find 20 % of their keys, CIFAR-10 15 %, digits without augmentation 96 %


def augmentation_too_weak(series: Series, facts: Facts) -> Alarm | None:
    """Two views of an image look alike to an untrained encoder, and the task is solved at once."""
    records = zip(series.get(EPOCH, ()), series.get(CONTRAST_ACCURACY, ()), strict=False)
    early = [accuracy for epoch, accuracy in records if 1 <= epoch <= EARLY_EPOCHS]
    if not early or early[-1] < EARLY_SOLVED or not _views_alike(series):
        return None
    return Alarm(
        "augmentation too weak",
        f"positives had a similarity of {series[POSITIVE_SIMILARITY][0]:.3f} in the first step, and after "
        f"{EARLY_EPOCHS:g} epochs {early[-1]:.1%} of the queries find their key",
        "smaller crops (augment.crop_scale=[0.2,1.0]), more color jitter, grayscale and blur",
    )


LONG_EPOCHS, LONG_RECORDS = 3.0, 20  # the loss of a healthy run leaves chance within an epoch or two


def loss_at_chance(series: Series, facts: Facts) -> Alarm | None:
    """Nothing is learned (moco issues 9, 12: "stuck at 6.9")."""
    count = at_chance(series, facts)
    epochs = series.get(EPOCH, ())
    if count < LONG_RECORDS or (len(epochs) >= count and epochs[-1] - epochs[-count] < LONG_EPOCHS):
        return None
    return Alarm(
        "loss at chance",
        f"the last {count} records of the loss stand at {series[LOSS][-1]:.2f}; keys at random give "
        f"{series[CHANCE][-1]:.2f}",
        "lower optim.lr or a warm-up; method.temperature=0.2; see in views.png that both views show the same image",
    )


SPIKE_NATS, SPIKE_DEVIATIONS, SPIKES = 0.5, 6.0, 2  # a batch's mean loss varies by about 0.1 nats from step to step
BEFORE = 10  # records whose steps from one to the next say how much a loss varies, falling or not
NORM_GROWTH = 3.0  # over the window; it falls or stays in healthy runs (CIFAR-10: at most 1.4 times)


def learning_rate_too_high(series: Series, facts: Facts) -> Alarm | None:
    """The loss jumps up again and again, or the gradient grows."""
    losses, norms = once_full(series, LOSS), once_full(series, GRADIENT_NORM)
    found = []
    spikes, up = 0, False
    for i in range(BEFORE, len(losses)):
        before = losses[i - BEFORE : i]
        varies = median(abs(after - loss) for loss, after in pairwise(before))
        was_up, up = (
            up,
            losses[i] - median(before[-LATEST:]) > max(SPIKE_NATS * directions(series), SPIKE_DEVIATIONS * varies),
        )
        spikes += up and not was_up
    if spikes >= SPIKES:
        found.append(f"the loss rose {spikes} times by {SPIKE_NATS:g} nats or more over the records before")
    quarter = len(norms) // 4
    if quarter >= LATEST and not at_chance(series, facts):
        early, late = median(norms[quarter : 2 * quarter]), median(norms[-quarter:])
        if late > NORM_GROWTH * early > 0:
            found.append(f"the gradient norm grew from {early:.2g} to {late:.2g}")
    if not found:
        return None
    return Alarm("learning rate too high", "; ".join(found), "halve optim.lr, a longer warm-up, or optim.clip_grad=1")


MOST_DUPLICATES = 0.1  # of the queries: the defect gives all of them one; in a run that collapses some come about
LOG_2_MARGIN = 0.05  # nats above log 2 that a well-trained run may still have to other negatives


def positive_among_negatives(series: Series, facts: Facts) -> Alarm | None:
    """The key is in the queue already when the loss is taken: the loss cannot fall below log 2."""
    share = latest(series, DUPLICATES)
    losses = [loss / directions(series) for loss in series.get(LOSS, ())[-2 * LATEST :]]
    similarity, accuracy = latest(series, POSITIVE_SIMILARITY), latest(series, CONTRAST_ACCURACY)
    found = []
    if share > MOST_DUPLICATES and not _has_collapsed(series):
        found.append(f"{share:.1%} of the queries have their own key among the negatives")
    at_floor = len(losses) == 2 * LATEST and all(-0.01 < loss - math.log(2) < LOG_2_MARGIN for loss in losses)
    if at_floor and similarity > 0.9 and accuracy < SOLVED:
        found.append(f"the loss stands at {losses[-1]:.3f}, log 2, with positives at {similarity:.2f}")
    if not found:
        return None
    return Alarm("positive among the negatives", "; ".join(found), "enqueue last, after the loss; mask_own_keys=true")


MOST_WAITING = 0.2  # a fifth of the hardware's time; the digits wait 9 %, CIFAR-10 on a CPU 5 %


def data_starvation(series: Series, facts: Facts) -> Alarm | None:
    """The device waits for pictures."""
    waiting = latest(series, DATA_WAIT)
    if not waiting > MOST_WAITING:
        return None
    remedy = "more data.workers, pictures prepared at a shorter side of 256, or data.resident=true"
    return Alarm("data starvation", f"{waiting:.0%} of the time went into waiting for batches", remedy)


def _has_collapsed(series: Series) -> bool:
    """Whether the embeddings were one point in each of the newest looks; False with fewer."""
    spreads = series.get(SPREAD, ())[-LOOKS:]
    return len(spreads) == LOOKS and max(spreads) < COLLAPSED_SPREAD


def _views_alike(series: Series) -> bool:
    """Whether the first step's positives were alike already; False where the window begins later."""
    epochs, similarity = series.get(EPOCH, ()), series.get(POSITIVE_SIMILARITY, ())
    return bool(epochs and similarity) and epochs[0] <= 1 and similarity[0] > VIEWS_ALIKE
