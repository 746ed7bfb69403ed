"""The pages of docs/config/ are what the schemas and configs/ say."""

from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from moco.methods import METHODS
from scripts import config_pages


def test_the_pages_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert config_pages.main(["--check"]) == 0, capsys.readouterr().err


def test_a_stale_a_missing_and_a_surplus_page_are_named_and_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(config_pages, "PAGES", tmp_path)
    assert config_pages.main([]) == 0
    (tmp_path / "data.md").write_text("something else")
    (tmp_path / "knn.md").unlink()
    (tmp_path / "gone.md").write_text("of a group that is no more")
    capsys.readouterr()
    assert config_pages.main(["--check"]) == 1
    said = capsys.readouterr().err
    assert [f"docs/config/{name} is not" in said for name in ("data.md", "gone.md", "knn.md")] == [True] * 3
    assert len(said.splitlines()) == 3
    assert config_pages.main([]) == 0
    assert config_pages.main(["--check"]) == 0
    assert not (tmp_path / "gone.md").exists()


def test_a_page_has_every_field_with_its_type_default_and_meaning() -> None:
    page = config_pages.pages()["method.md"]
    assert "| `queue_size` | int, at least 1 | `65536` | K. |" in page
    assert "| `momentum_end` | float or null, at least 0 and at most 1 | `null` | m grows to this along half" in page
    for schema in METHODS.values():
        for each in fields(schema):
            assert f"| `{each.name}` |" in page
    assert "### moco_v2plus" in page  # an option, with what its file says


def test_the_string_below_a_field_is_its_meaning() -> None:
    @dataclass
    class Schema:
        """Words."""

        bare: int = 1
        told: float | None = None
        """of two
        lines"""

    assert config_pages.explained(Schema) == {"bare": ("int", ""), "told": ("float | None", "of two lines")}
    (line, *_) = [each for each in config_pages.table(Schema, {"told": 0.5}) if "told" in each]
    assert line == "| `told` | float or null | `0.5` | of two lines |\n"


@pytest.mark.parametrize(
    "schema", [*config_pages.GROUPS.values(), *METHODS.values(), *config_pages.commands().values()]
)
def test_every_field_says_what_it_means(schema: type) -> None:
    told = config_pages.explained(config_pages.EXPLAINED.get(schema, schema))
    silent = {
        name
        for name, (_, meaning) in config_pages.explained(schema).items()
        if not meaning and not told.get(name, ("", ""))[1]
    }
    assert silent <= {*config_pages.GROUPS, "images", "sweep", "official"}  # groups of fields
