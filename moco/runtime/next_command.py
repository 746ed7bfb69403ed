"""The command to run next, with all that the person said to this one, as it can be pasted into a shell."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any

from moco.config.subject import SubjectConfig

# What Hydra reads as text, as it stands. Quoted is always right, but hard to read.
_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./:@%+-]*")
_WORDS = {"true", "false", "null", "nan", "inf"}  # these it takes for values


def command(module: str, config: SubjectConfig, **said: Any) -> str:
    """`python -m MODULE` with each field of `SubjectConfig` in which the configuration differs from the defaults.

    Args:
        module: such as "moco.linear".
        config: what this command was told.
        **said: fields by name that go in instead, or beside them. A field of `SubjectConfig` with its default goes out.
    """
    standard = asdict(SubjectConfig())
    told = {each.name: asdict(config)[each.name] for each in fields(SubjectConfig)} | said
    parts = [f"{name}={_value(each)}" for name, each in _differing(told, standard)]
    return shlex.join(["python", "-m", module, *parts])


def _differing(values: Mapping[str, Any], standard: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of what differs; a name that is not of the schema needs Hydra's plus."""
    for name, value in values.items():
        plus = "+" * (name not in standard and bool(prefix) and not prefix.startswith("+"))
        if isinstance(value, Mapping):
            yield from _differing(value, standard.get(name, {}), f"{plus}{prefix}{name}.")
        elif name not in standard or value != standard[name]:
            yield f"{plus}{prefix}{name}", value


def _value(value: Any) -> str:
    """In the grammar of Hydra's overrides."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_value, value))}]"
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) and value.lower() not in _WORDS else quoted(value)
    return json.dumps(value)


def quoted(text: str) -> str:
    """Text that Hydra takes letter by letter: backslashes count only before a quote, and there they are doubled."""
    return '"' + re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + ('\\"' if found[2] else ""), text) + '"'
