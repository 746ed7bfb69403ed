"""The training doctor: run all alarms over the records of a run, and log each finding once."""

import math
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moco.analysis.doctor.alarms import ALARMS, data_starvation, nothing_learned
from moco.analysis.doctor.series import Alarm, Facts, Series
from moco.config import MethodConfig
from moco.runs.metrics import read_metrics


def diagnose(series: Series, facts: Facts) -> list[Alarm]:
    """Return all findings, in the order in which to act on them.

    The series must begin at the first step: some checks compare the newest records with the first ones.
    """
    found = [alarm for check in ALARMS if (alarm := check(series, facts)) is not None]
    if not found and (alarm := nothing_learned(series, facts)):
        found.append(alarm)
    if alarm := data_starvation(series, facts):
        found.append(alarm)
    return found


def facts_of(method: MethodConfig, images: int, batch_size: int, epochs: float = math.inf, **more: Any) -> Facts:
    """Return the settings that the doctor needs; `images` is the size of the data set, `more` are fields of `Facts`."""
    steps = images // batch_size * epochs if images >= batch_size else math.inf
    return Facts(
        temperature=method.temperature,
        momentum=method.momentum if method.has_momentum_encoder else None,
        queue_size=method.queue_size,
        dataset_size=images,
        keys_per_step=batch_size * method.keys_per_image,
        keys_per_image=method.keys_per_image,
        mask_own_keys=method.mask_own_keys,
        supervised=method.labels,
        has_teacher=bool(method.teacher),
        epochs=epochs,
        **({"total_steps": steps} | more),
    )


class Doctor:
    """Collects the records of a run on rank 0 and checks them for problems.

    Args:
        facts: settings of the run.
        file: metrics.jsonl of the run. After a resume, it holds the earlier records.
        log: called with one line per new finding.
    """

    def __init__(self, facts: Facts, file: Path, log: Callable[[str], None]) -> None:
        self._facts, self._log = facts, log
        self._series = {name: array("d", values) for name, (_, values) in read_metrics(file).items()}
        self._reported: set[str] = set()  # an alarm that disappears and returns is logged once
        self.found: list[Alarm] = []

    def record(self, values: Mapping[str, float]) -> None:
        """Append one record."""
        for name, value in values.items():
            self._series.setdefault(name, array("d")).append(value)

    def check(self) -> None:
        """Run all alarms, log the new findings and keep all present ones in `found`."""
        self.found = diagnose(self._series, self._facts)
        for alarm in self.found:
            if alarm.name not in self._reported:
                self._reported.add(alarm.name)
                epochs = self._series.get("train/epoch")
                when = f", epoch {epochs[-1]:.3g}" if epochs else ", before the first step"
                self._log(f"doctor{when}: {alarm}")
