"""Names of files are found in either form of Unicode, unless several fit."""

import os
import unicodedata
from pathlib import Path

import pytest

from moco.data.file_names import existing_path, other_forms

COMPOSED, DECOMPOSED = "\u00fc", "u\u0308"


def test_names_in_another_form_are_found_unless_several_fit() -> None:
    assert unicodedata.normalize("NFC", DECOMPOSED) == COMPOSED
    assert other_forms({f"a/{COMPOSED}.png", "b.png"}, [f"a/{DECOMPOSED}.png", "c.png"]) == {
        f"a/{COMPOSED}.png": f"a/{DECOMPOSED}.png"
    }
    assert other_forms({COMPOSED}, [COMPOSED, DECOMPOSED]) == {}  # the same name exists
    assert other_forms({COMPOSED, DECOMPOSED}, [DECOMPOSED]) == {}  # the known name is taken
    three = [f"{COMPOSED}{DECOMPOSED}", f"{DECOMPOSED}{COMPOSED}", DECOMPOSED * 2]
    assert other_forms({COMPOSED * 2}, three) == {}  # ambiguous
    assert other_forms({"a"}, ["b"]) == {}


def test_a_path_exists_in_another_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / DECOMPOSED).mkdir()
    file = tmp_path / DECOMPOSED / f"{COMPOSED}.png"
    file.touch()
    if (tmp_path / COMPOSED).exists():
        pytest.skip("this file system treats both forms as the same name")
    assert existing_path(f"{tmp_path}/{COMPOSED}/{DECOMPOSED}.png") == str(file)
    assert existing_path(str(file)) == str(file)
    assert existing_path(f"{tmp_path}/{COMPOSED}/none.png") == f"{tmp_path}/{COMPOSED}/none.png"
    monkeypatch.chdir(tmp_path)
    assert existing_path(COMPOSED) == DECOMPOSED
    assert existing_path("gone") == "gone"
    two = tmp_path / "two"
    two.mkdir()
    for name in (COMPOSED + DECOMPOSED, DECOMPOSED + COMPOSED):
        (two / name).touch()
    assert existing_path(f"{two}/{COMPOSED * 2}") == f"{two}/{COMPOSED * 2}"  # ambiguous
    (two / (DECOMPOSED * 3)).touch()
    assert os.path.exists(existing_path(f"{two}/{COMPOSED * 3}"))  # a new file is found
