"""The results of `moco.transfer`: a file per data set and mode, from which a later call continues; and the table."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moco.config import ConfigError
from moco.config.types import type_error
from moco.data.transfer_sets import SETS
from moco.evaluation.transfer_data import OF_FIELDS
from moco.files import write_json
from moco.runtime.console import percent, table
from moco.untrusted import read_json

FOLDER = "transfer"  # below the output


@dataclass
class SetResults:
    """The results of all encoders on one data set, and what they depend on."""

    name: str  # the entry of `sets`
    mode: str
    settings: dict[str, Any]  # what the results depend on besides the encoder; "images" identifies the images
    about: dict[str, Any] = field(default_factory=dict)  # measure, classes, numbers of images, "data" and "changed"
    encoders: dict[str, dict[str, Any]] = field(default_factory=dict)  # by the entry of `encoders`

    def lacking(self, digests: Mapping[str, str]) -> list[str]:
        """Return the encoders without a result for their digest, which identifies weights and image preparation."""
        return [each for each, digest in digests.items() if self.encoders.get(each, {}).get("digest") != digest]


def short_name(name: str) -> str:
    """Return the name of a data set in file names; for a folder, its last part and a digest of its path."""
    if name in (*SETS, OF_FIELDS):  # even if there is a folder of this name
        return name
    path = Path(name).absolute()
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', path.name)[:60]}_{digest}"


def result_file(output: Path, name: str, mode: str) -> Path:
    """Return the path of the results of a data set."""
    return output / FOLDER / f"{mode}_{short_name(name)}.json"


def read_results(file: Path, wanted: SetResults) -> tuple[SetResults, str]:
    """Return the recorded results if they have the settings of `wanted`, otherwise `wanted`, which has no results.

    The second value says which settings differ; "" if none do, or nothing is recorded.

    Raises:
        ConfigError: if the file is damaged.
    """
    if not file.is_file():
        return wanted, ""
    try:
        stored = read_json(file)
        if error := type_error("", stored, SetResults, exact=True):
            raise ValueError(error)
        found = SetResults(**stored)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{file} is damaged ({error}): remove it") from error
    before = {"precision": "fp32"} | found.settings  # earlier versions did not write it
    changed = [name for name, value in wanted.settings.items() if before.get(name) != value]
    if changed:
        named = [f"{name}={before.get(name)}" for name in changed if name != "images"]
        named += ["other images or another split"] * ("images" in changed)
        return wanted, f"{wanted.name}: {file} was made with {', '.join(named)}, so all encoders are evaluated again"
    return found, ""


def write_results(file: Path, found: SetResults) -> None:
    """Write the results of a data set. For rank 0 only."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, json.loads(json.dumps(vars(found))))


def show(
    title: str, found: Sequence[SetResults], encoders: Sequence[str], measures: Mapping[str, str], note: str
) -> None:
    """Print one table: a row per data set, a column per encoder, and the mean of the data sets."""
    rows = []
    for each in found:
        of_encoders = [each.encoders[encoder] for encoder in encoders]
        cells = [percent(one["value"], one.get("half_width95"), one.get("interval95")) for one in of_encoders]
        rows.append([each.name, measures[each.about["measure"]], f"{each.about['test']:,}", *cells])
    if len(found) > 1:
        means = [sum(each.encoders[encoder]["value"] for each in found) / len(found) for encoder in encoders]
        rows.append([f"mean of {len(found)}", "", "", *map(percent, means)])
    table(title, ["data set", "measure", "test images", *(f"{each} %" for each in encoders)], rows, note, left=(0, 1))
