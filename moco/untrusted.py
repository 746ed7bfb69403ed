"""Limits for files that others may have written: weights, metadata, configurations, indexes, results.

Every function raises ValueError for a file that it refuses. The message is only the reason: the caller puts the name of
the file before it.
"""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

DEPTH = 50  # levels of nested dicts and lists
_VALUES = 1_000_000  # largest number of values and containers in one file; a checkpoint of a ResNet-50 has about 2,000
_YAML_BYTES = 1_000_000  # a config.yaml has about 3,000


def refuse_special_file(path: Path) -> int:
    """Return the size of a regular file in bytes; refuse pipes, devices, and files larger than the memory."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        kind = "a directory" if stat.S_ISDIR(about.st_mode) else "a pipe, socket or device"
        raise ValueError(f"it is {kind}, not a file")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if about.st_size > memory:
        raise ValueError(f"its {about.st_size:,} bytes are more than this machine's memory")
    return about.st_size


def values_of(value: Any) -> Iterator[Any]:
    """Yield all values of nested dicts, lists and tuples, except these containers.

    In a file, a container can contain itself, and a small file can describe an exponential number of values (by YAML's
    aliases). Therefore the depth and the number of values are limited.
    """
    left, count = [(value, 0)], 0
    while left:
        each, depth = left.pop()
        count += 1
        if depth > DEPTH:
            raise ValueError(f"its values are nested deeper than {DEPTH} levels")
        if count > _VALUES:
            raise ValueError(f"it holds more than {_VALUES:,} values")
        if isinstance(each, Mapping):
            left += [(inner, depth + 1) for inner in each.values()]
        elif isinstance(each, list | tuple):
            left += [(inner, depth + 1) for inner in each]
        else:
            yield each


def parse_json(text: str | bytes) -> Any:
    """Parse JSON with limited depth and number of values."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("its values are nested too deeply") from error
    for _ in values_of(value):
        pass
    return value


def read_json(path: Path) -> Any:
    """Read a JSON file with limited depth and number of values."""
    refuse_special_file(path)
    return parse_json(path.read_bytes())


def read_yaml(path: Path) -> Any:
    """Read a YAML file with limited size, depth and number of values. It can construct plain values only."""
    size = refuse_special_file(path)
    if size > _YAML_BYTES:
        raise ValueError(f"its {size:,} bytes are too many for a configuration")
    try:
        value = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError("it is not valid YAML, or nested too deeply") from error
    for _ in values_of(value):
        pass
    return value
