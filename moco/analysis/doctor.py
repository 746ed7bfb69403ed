"""The training doctor: alarms over recorded measures, each with its evidence and a remedy.

An alarm is a function from series of measures and a few facts of the run to None or an `Alarm`; those over what a
run was told are in `causes`, those over what came of it in `symptoms`. One that reads a series that was not
recorded is silent. The thresholds were set so that the published recipes' settings and this project's own runs
(digits, CIFAR-10) raise no alarm, and deliberately broken runs of the digits do: `tests/analysis/runs.json`.
"""

from collections.abc import Callable

from moco.analysis.causes import (
    momentum_frozen,
    momentum_too_low,
    queue_against_dataset,
    stale_queue,
    temperature_too_high,
    temperature_too_low,
)
from moco.analysis.series import Alarm, Facts, Series
from moco.analysis.symptoms import (
    augmentation_too_weak,
    collapse,
    data_starvation,
    learning_rate_too_high,
    loss_at_chance,
    positive_among_negatives,
    statistics_leak,
)

ALARMS: tuple[Callable[[Series, Facts], Alarm | None], ...] = (  # causes before what comes of them
    momentum_too_low,
    momentum_frozen,
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
    data_starvation,
)


def diagnose(series: Series, facts: Facts) -> list[Alarm]:
    """All alarms that ring, in the order in which to act on them.

    Args:
        series: of the whole run so far, or its newest part. Two alarms look at the start and are silent without it.
        facts: of the run.
    """
    return [alarm for look in ALARMS if (alarm := look(series, facts)) is not None]
