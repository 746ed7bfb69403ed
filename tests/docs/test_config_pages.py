"""The pages of docs/config/ agree with the schemas and configs/."""

import re
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import pytest

from moco.config import bounded
from moco.methods import METHODS
from scripts import config_pages


def test_the_pages_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert config_pages.main(["--check"]) == 0, capsys.readouterr().err


def test_outdated_missing_and_surplus_pages_are_reported_and_fixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(config_pages, "PAGES", tmp_path)
    assert config_pages.main([]) == 0
    (tmp_path / "data.md").write_text("something else")
    (tmp_path / "knn.md").unlink()
    (tmp_path / "gone.md").write_text("a group that no longer exists")
    capsys.readouterr()
    assert config_pages.main(["--check"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == [f"docs/config/{name}.md" for name in ("data", "gone", "knn")]
    assert config_pages.main([]) == 0
    assert config_pages.main(["--check"]) == 0
    assert not (tmp_path / "gone.md").exists()


def test_a_page_has_every_field_with_its_type_bounds_and_default() -> None:
    page = config_pages.pages()["method.md"]
    assert "| `queue_size` | int, at least 1 | `65536` |" in page
    assert "| `momentum_end` | float or null, at least 0 and at most 1 | `null` |" in page
    for schema in METHODS.values():
        for each in fields(schema):
            assert f"| `{each.name}` |" in page
    assert "### moco_v2plus" in page  # an option of the group


def test_an_option_has_the_values_of_the_option_that_it_builds_on() -> None:
    lines = [line.split(" | ") for line in config_pages.pages()["augment.md"].splitlines() if line.startswith("| ")]
    table = lines[next(i for i, line in enumerate(lines) if "moco_v2" in line) :]
    column = {name: table[0].index(name) for name in ("moco_v2", "ressl |")}
    found = {line[0].strip("| `"): [line[each].rstrip(" |") for each in column.values()] for line in table[2:]}
    assert found["blur_p"] == ["`0.5`"] * 2
    assert found["mean"] == ["`[0.485,0.456,0.406]`"] * 2
    assert found["second.blur_p"] == ["", "`0`"]


def test_the_string_below_a_field_is_its_meaning() -> None:
    @dataclass
    class Schema:
        """A schema."""

        bare: int = 1
        documented: float | None = None
        """Two
        lines."""
        names: list[str] = bounded(["a"], choices=("a", "b"), min_length=1, unique=True)
        text: str = bounded("x", min_length=1)

    explained = config_pages.declared_fields(Schema)
    assert explained["bare"] == ("int", "")
    assert explained["documented"] == ("float | None", "Two lines.")
    lines = [*config_pages.table(Schema, {"documented": 0.5})][1:]
    assert lines[1:] == [
        "| `documented` | float or null | `0.5` | Two lines. |\n",
        "| `names` | list[str], at least 1 value, each one of a, b, no value twice | `[a]` |  |\n",
        "| `text` | str, not empty | `x` |  |\n",
    ]


@pytest.mark.parametrize(
    "schema", [*config_pages.GROUPS.values(), *METHODS.values(), *config_pages.commands().values()]
)
def test_every_field_has_a_meaning(schema: type) -> None:
    elsewhere = config_pages.declared_fields(config_pages.DOCUMENTED_BY.get(schema, schema))
    missing = {
        name
        for name, (_, meaning) in config_pages.declared_fields(schema).items()
        if not meaning and not elsewhere.get(name, ("", ""))[1]
    }
    assert missing <= {*config_pages.GROUPS, "images", "masks", "boxes", "sweep", "official"}  # groups of fields


def _meanings(schema: type) -> dict[str, str]:
    found = dict[str, str]()
    for base in filter(is_dataclass, reversed(schema.__mro__)):
        found |= {name: meaning for name, (_, meaning) in config_pages.declared_fields(base).items()}
    return found


@pytest.mark.parametrize("command", config_pages.commands())
def test_a_meaning_names_only_fields_that_the_command_has(command: str) -> None:
    """A field that several commands inherit must not refer to a field of one of them."""
    known = {name for schema in config_pages.commands().values() for name in _meanings(schema)}
    own = _meanings(config_pages.commands()[command])
    named = {name for meaning in own.values() for name in re.findall(r"`(\w+)`", meaning)}
    assert named & known <= own.keys()
