"""Generated command lines: odd values for every field, unknown fields, odd paths, odd environments."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from moco.composition import field_types

_VALUES = json.loads(Path(__file__).with_name("values.json").read_text())
NUMBERS, WORDS, NESTED, BROKEN = (_VALUES[name] for name in ("numbers", "words", "nested", "broken"))
JUNK, ENVIRONMENT = _VALUES["junk"], _VALUES["environment"]
PATHS = _VALUES["paths"]  # fields that name files
ODD, SYSTEM = _VALUES["odd"], _VALUES["system"]  # what to put there: entries of world.build, and others
SLOW = _VALUES["slow"]  # fields in which a large valid value takes long


@dataclass(frozen=True)
class Case:
    """One call: further overrides and variables of the environment, and the names of which a refusal has one."""

    overrides: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    names: tuple[str, ...] = ()


def leaf_fields(schema: Any) -> list[str]:
    """Return the dotted names of all fields of a schema that hold values."""
    return [name for name, kind in field_types(schema).items() if not is_dataclass(kind)]


def cases(fields: list[str], root: Path, seed: int) -> Iterator[Case]:
    """Yield cases without end: each field in turn, and every fourth case of another kind."""
    rng = random.Random(seed)
    while True:
        for name in rng.sample(fields, len(fields)):
            yield _value(rng, name, root)
            if rng.random() < 0.25:
                yield _other(rng, fields, root)


def _value(rng: random.Random, name: str, root: Path) -> Case:
    short = name.rpartition(".")[2]
    if short in PATHS and rng.random() < 0.7:
        return _path(rng, name, root)
    value = rng.choice(rng.choices((NUMBERS, WORDS, NESTED, BROKEN), (5, 3, 3, 1))[0])
    if short in SLOW and value in ("1e30", "2147483648", "100000", "99999999999999999999", "1_000"):
        value = "-5"
    override = f"{rng.choice(('', '', '', '', '+', '++', '~'))}{name}={value}"
    return Case((override,), names=(name, short, f"{name.partition('.')[0]}.*"))  # or its whole group


def _path(rng: random.Random, name: str, root: Path) -> Case:
    path = str(root / "odd" / rng.choice(ODD)) if rng.random() < 0.7 else rng.choice(SYSTEM)
    quoted = "'" + path.replace("'", "\\'") + "'"
    short = name.rpartition(".")[2]
    value = f"[{quoted}]" if short in ("runs", "query", "compare", "sets", "encoders") else quoted
    group = [f"{name.partition('.')[0]}."] if "." in name else []  # data.labels, for a folder of images
    return Case((f"{name}={value}",), {}, (name, short, *group, *([] if path else ["no encoder"])))


def _other(rng: random.Random, fields: list[str], root: Path) -> Case:
    kind = rng.randrange(4)
    if kind == 0:
        junk = rng.choice(JUNK)
        name = junk.lstrip("+~-").partition("=")[0]
        return Case((junk,), names=(name, f"field {name.partition('.')[0]!r}", junk, "recipe"))
    if kind == 1:
        variable = rng.choice(sorted(ENVIRONMENT))
        return Case((), {variable: rng.choice(ENVIRONMENT[variable])}, (variable,))
    if kind == 2:  # a misspelled field
        name = rng.choice(fields)
        at = rng.randrange(len(name))
        wrong = name[:at] + rng.choice("xz._") + name[at + 1 :]
        return Case((f"{wrong}=1",), names=(wrong, wrong.partition(".")[0], "cannot be read"))
    pair = [_value(rng, name, root) for name in rng.sample(fields, 2)]
    return Case(tuple(each for case in pair for each in case.overrides), names=pair[0].names + pair[1].names)
