"""One function refuses values of another type, from a command line, a YAML file or another file."""

from collections.abc import Mapping
from typing import Any

import pytest

from moco.config import ConfigError
from moco.config.subject import ImagesConfig
from moco.config.types import check_saved, type_error


@pytest.mark.parametrize(
    ("value", "kind", "error"),
    [
        (None, int, "a=None must be an integer"),
        (None, int | None, ""),
        ("3", int, ""),  # OmegaConf converts it
        ([1], float, "a=[1] must be a number"),
        ({}, bool, "a={} must be true or false"),
        (3, list[int], "a=3 must be a list: 'a=[3]'"),
        (None, list[int], "a=None must be a list"),
        ([[1]], list[int], "a[0]=[1] must be an integer"),
        ([1], list[float] | None, ""),
        (3, dict[str, Any], "a=3 must hold named values: write +a.NAME=VALUE"),
        ({1: 2}, dict[str, Any], "a={1: 2} must hold named values: write +a.NAME=VALUE"),
        ({}, dict[str, Any], ""),
        (3, ImagesConfig, "a=3 must hold named values: write a.size=VALUE"),
        ({"size": []}, ImagesConfig, ""),  # the field has its own call
        (3, Any, ""),
    ],
)
def test_an_override_of_another_form_is_refused(value: Any, kind: Any, error: str) -> None:
    assert type_error("a", value, kind) == error


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ({"a": 1, "b": {"c": "x"}}, ""),
        ({"a": True, "b": {"c": "x"}}, "a=True must be an integer"),
        ({"a": "1"}, "a='1' must be an integer"),
        ({"b": {"c": 2}}, "b.c=2 must be text"),
        ({"b": []}, "b=[] must hold named values"),
        ({"d": "x"}, "d='x' must be a list"),
        ({"d": [1, "x"]}, "d[1]='x' must be a number"),
        ({"d": (1, 2.5)}, ""),
        ({"e": {"size": 2.5}}, "e.size=2.5 must be an integer"),
        ({"e": ImagesConfig(mean=[0.5, "x", 0.5])}, "e.mean[1]='x' must be a number"),  # type: ignore[list-item]
        ({"f": {1: 2}, "g": [object()]}, ""),
        ([], "[] must hold named values"),
        ("x" * 99, f"'{'x' * 56}... must hold named values"),
        ({"other": object()}, ""),
    ],
)
def test_the_first_value_of_another_type_in_a_file_is_named(value: Any, error: str) -> None:
    schema = {"a": int, "b": {"c": str}, "d": list[float], "e": ImagesConfig, "f": Mapping, "g": list}
    assert type_error("", value, schema, exact=True) == error


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({}, ""),
        ({"seed": 1, "data": {"name": "folder", "other": 3}, "other": None}, ""),
        ({"optim": {"lr": -1.0}}, ""),  # only moco.train uses it
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"data": {"bits": 3}}, "data.bits=3 must be at least 8"),
        ({"data": {"workers": "2"}}, "data.workers='2' must be an integer"),
        ({"data": 3}, "data=3 must hold named values"),
        ({"augment": {"mean": [0.5, None]}}, r"augment.mean\[1\]=None must be a number"),
    ],
)
def test_the_configuration_in_a_file_is_checked(config: dict[str, Any], error: str) -> None:
    if not error:
        return check_saved(config)
    with pytest.raises(ConfigError, match=f"^{error}"):
        check_saved(config)
    return None
