"""The training doctor beside a run: gathers what is recorded, and says each finding once."""

import json
import math
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moco.analysis import Alarm, Facts, diagnose

Recorded = dict[str, tuple[list[float], list[float]]]  # by name: steps and values


def facts_of(settings: Mapping[str, Any], images: int) -> Facts:
    """What a run was told, as far as the doctor asks.

    Args:
        settings: the configuration, flat: "method.temperature" and the like.
        images: of the data set.
    """
    name = settings.get("method.name", "moco")
    both = name == "moco_v3" or settings.get("method.symmetric", False)
    return Facts(
        temperature=settings["method.temperature"],
        momentum=0.99 if name == "simclr" else settings["method.momentum"],  # without a key encoder nothing to say
        queue_size=settings["method.queue_size"] if name == "moco" else 0,
        dataset_size=images,
        keys_per_step=settings["batch_size"] * (2 if both else 1),
        mask_own_keys=settings["method.mask_own_keys"],
        supervised=settings.get("method.labels", False),
    )


def recorded(file: Path) -> Recorded:
    """The series of a metrics.jsonl. What is no record (a line that a kill cut in two) is left out; null is nan."""
    series: Recorded = {}
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else []:
        try:
            record = json.loads(line)
            step = float(record.pop("step"))
            values = {name: math.nan if value is None else float(value) for name, value in record.items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
        for name, value in values.items():
            steps, numbers = series.setdefault(name, ([], []))
            steps.append(step)
            numbers.append(value)
    return series


class Doctor:
    """Looks at the records of rank 0 now and then.

    Args:
        facts: of the run.
        file: its metrics.jsonl, with the records of earlier attempts.
        say: gets a line for each new finding.
    """

    def __init__(self, facts: Facts, file: Path, log: Callable[[str], None]) -> None:
        self._facts, self._log = facts, log
        # Of the whole run: 8 bytes a value.
        self._series = {name: array("d", values) for name, (_, values) in recorded(file).items()}
        self._said: set[str] = set()  # an alarm that comes and goes is said once
        self.found: list[Alarm] = []

    def record(self, values: Mapping[str, float]) -> None:
        """Takes in what the journal records."""
        for name, value in values.items():
            self._series.setdefault(name, array("d")).append(value)

    def look(self) -> None:
        """Says what is new; `found` is then all that holds at present."""
        self.found = diagnose(self._series, self._facts)
        for alarm in self.found:
            if alarm.name not in self._said:
                self._said.add(alarm.name)
                epochs = self._series.get("train/epoch")
                when = f", epoch {epochs[-1]:.3g}" if epochs else ""
                self._log(f"doctor{when}: {alarm.name}: {alarm.evidence}. Try {alarm.remedy}")
