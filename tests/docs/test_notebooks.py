"""The notebooks run from the first cell to the last, with small data and small training."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from matplotlib import pyplot as plt

from tests.docs.pages import REPOSITORY, Command
from tests.docs.test_commands import Workplace, shell_in, surroundings, workplace  # noqa: F401 # fixtures

NOTEBOOKS = sorted((REPOSITORY / "docs" / "notebooks").glob("*.ipynb"))


def cells(notebook: Path) -> list[str]:
    """Return the code of each code cell."""
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(each["source"]) for each in found if each["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[each.stem for each in NOTEBOOKS])
def test_a_notebook_runs(
    notebook: Path,
    workplace: Workplace,  # noqa: F811 # a fixture
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A line `!COMMAND` runs as in a shell, with `{NAME}` replaced by the variable, as in Jupyter."""
    shell = shell_in(workplace.copied(), monkeypatch, capfd, workplace.cache)
    names: dict[str, Any] = {}
    pictures = 0
    monkeypatch.setattr(plt, "show", plt.close)
    with torch.random.fork_rng(), mpl.rc_context({"backend": "agg"}):
        for code in cells(notebook):
            pictures += "plt.show()" in code
            python, *commands = re.split(r"^!(.*)$", code, flags=re.MULTILINE)  # Python first, then commands
            exec(compile(python, notebook.name, "exec"), names)
            for line in filter(str.strip, commands):
                shell.run(Command(f"{notebook.name}: {line}", tuple(shlex.split(line.format_map(names)))))
    assert pictures > 0
    if "accuracy" in names:  # of the own training loop
        untrained, trained = (names["accuracy"](names["embeddings"](names[each])) for each in ("untrained", "encoder"))
        assert trained > untrained + 10


def test_the_folder_of_images_may_have_spaces_in_its_path() -> None:
    lines = [line for each in NOTEBOOKS for code in cells(each) for line in re.findall(r"^!(.*)$", code, re.MULTILINE)]
    with_folder = [line for line in lines if "{IMAGES}" in line]
    assert len(with_folder) == 2
    for line in with_folder:
        assert "data.root=Max's Photos, 2024" in shlex.split(
            line.format(IMAGES="Max's Photos, 2024", FITTING="epochs=1")
        )
    assert {each for line in lines for each in re.findall(r"\{(.*?)\}", line)} == {"IMAGES", "FITTING"}


def test_the_notebooks_hold_no_output() -> None:
    assert len(NOTEBOOKS) == 3
    for notebook in NOTEBOOKS:
        for each in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            assert not each.get("outputs"), f"{notebook.name}: clear the output"
