"""Files that others may have written: limits of size, depth and kind."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moco.untrusted import DEPTH, parse_json, read_json, read_yaml, refuse_special_file, values_of

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(PLAIN)
def test_plain_json_is_read_unchanged(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("depth", [DEPTH + 2, 100_000])
def test_deep_nesting_is_refused(depth: int, tmp_path: Path) -> None:
    file = tmp_path / "deep"
    file.write_text(nested(depth))
    for read in (read_json, read_yaml):
        with pytest.raises(ValueError, match="nested"):
            read(file)
    assert parse_json(nested(DEPTH)) is not None


def test_aliases_that_multiply_are_refused_at_once(tmp_path: Path) -> None:
    """One kilobyte of YAML that would expand to 9**9 values (S2)."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="more than 1,000,000 values"):
        read_yaml(tmp_path / "config.yaml")


def test_a_container_that_holds_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ValueError, match="nested deeper"):
        list(values_of(loop))


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait forever
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/zero")
    for name, kind in (("pipe", "a pipe"), ("folder", "a directory"), ("device", "a pipe, socket or device")):
        for read in (refuse_special_file, read_json, read_yaml):
            with pytest.raises(ValueError, match=kind):
                read(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        refuse_special_file(tmp_path / "missing")


@pytest.mark.parametrize("text", ["{a: [", "a: !!python/object/apply:os.system [ls]", "\x00"])
def test_invalid_yaml_is_refused_without_running_anything(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match="not valid YAML"):
        read_yaml(tmp_path / "a.yaml")
