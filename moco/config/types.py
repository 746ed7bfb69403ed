"""Check the types of values from a command line, a YAML file or another file. An error is one sentence."""

import shlex
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin

from moco.config.base import check_bounds, require
from moco.config.data import DataConfig
from moco.config.quoting import value_text
from moco.config.train import TrainConfig

_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


def members(kind: Any) -> tuple[Any, ...]:
    """Return the types of a union; for any other type, a tuple of this type only."""
    return (kind,) if get_origin(kind) in (list, dict) else get_args(kind) or (kind,)


def type_error(name: str, value: Any, kind: Any, text: str = "", exact: bool = False) -> str:
    """Return the sentence that refuses a value of another type than its field has; "" for a value that fits.

    Args:
        name: the dotted name of the field; "" for values without a common name.
        value: its value, of plain types; or a dataclass, whose class then replaces `kind`.
        kind: its type, T or `T | None`. T is a scalar type, a list, a mapping, a dataclass, or a dict of the types of
            named values. The value may lack some of these names, and may have others.
        text: the value as the person wrote it; empty: as Python shows it.
        exact: refuse conversions between text and numbers, and check the fields of groups. False: leave this to
            OmegaConf.
    """
    if is_dataclass(value):
        kind, value = type(value), vars(value)
    one, *others = members(kind)
    if one is Any or (value is None and others):
        return ""
    schema = {each.name: each.type for each in fields(one)} if is_dataclass(one) else one
    shown = f"{name}={text or _short(value)}".lstrip("=")
    inner: list[tuple[str, Any, Any]] = []
    if isinstance(schema, Mapping) or issubclass(get_origin(one) or one, Mapping):
        if not isinstance(value, Mapping) or (get_args(one) and not all(isinstance(key, str) for key in value)):
            example = f"{name}.{next(iter(schema))}" if isinstance(schema, Mapping) else f"+{name}.NAME"
            return f"{shown} must hold named values{'' if exact else f': write {example}=VALUE'}"
        if exact and isinstance(schema, Mapping):
            inner = [(f"{name}.{key}".lstrip("."), value[key], schema[key]) for key in schema if key in value]
    elif (get_origin(one) or one) is list:
        if not isinstance(value, list | tuple):
            fix = shlex.quote(f"{name}=[{text or value_text(value)}]") if _is_scalar(value) and not exact else ""
            return f"{shown} must be a list{fix and f': {fix}'}"
        inner = [(f"{name}[{i}]", each, (*get_args(one), Any)[0]) for i, each in enumerate(value)]
    elif not (_has_type(value, one) if exact else _is_scalar(value)):
        return f"{shown} must be {_NAMES.get(one, one.__name__)}"
    return next((error for each in inner if (error := type_error(*each, exact=exact))), "")


def _has_type(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def _is_scalar(value: Any) -> bool:
    return value is not None and not isinstance(value, list | Mapping)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_saved(config: Mapping[str, Any]) -> None:
    """Check a run's configuration, read from one of its files, which another version of moco may have written.

    Fields may be missing or unknown. Bounds, which change between versions, are checked only for `seed` and `data`,
    which other commands than moco.train also use.

    Raises:
        ConfigError: for a value of another type than in the schema, or out of these bounds.
    """
    error = type_error("", config, TrainConfig, exact=True)
    require(not error, error)
    data = {each.name: config["data"][each.name] for each in fields(DataConfig) if each.name in config.get("data", {})}
    check_bounds(TrainConfig(seed=config.get("seed", 0), data=DataConfig(**data)))
