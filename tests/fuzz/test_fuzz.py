"""Generated command lines end in status 0 or in one sentence that names the field. `python -m tests.fuzz` runs more."""

from pathlib import Path

import pytest

from tests.fuzz.__main__ import COMMANDS, fields_of
from tests.fuzz.cases import Case
from tests.fuzz.run import judge, run
from tests.fuzz.world import build


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    build(root)
    return root


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("count", [3, pytest.param(30, marks=pytest.mark.long)])
@pytest.mark.filterwarnings("default:::moco")  # a warning is no error for a person
def test_every_command(count: int, command: str, world: Path, tmp_path: Path) -> None:
    outcome = run(command, fields_of(command), world, tmp_path / "case", count, seed=0)
    assert outcome.failures == []
    assert outcome.counts["refused"] > count / 5


@pytest.mark.parametrize(
    ("status", "err", "kind"),
    [
        (0, "moco: warning: a\n", "ok"),
        (0, "Traceback (most recent call last)", "FAILED"),
        (2, "moco: seed=x must be of type integer\n", "refused"),
        (2, "moco: it must be of type integer\n", "FAILED"),
        (2, "moco: seed=\x1b[31m\n", "FAILED"),
        (1, "moco: seed\nmoco: forged\n", "FAILED"),
        (1, "", "FAILED"),
        (75, "moco: stopped by SIGTERM\n", "stopped"),
        (7, "moco: seed\n", "FAILED"),
    ],
)
def test_what_counts_as_a_refusal(status: int, err: str, kind: str) -> None:
    assert judge(status, err, Case(("seed=x",), names=("seed",)))[0] == kind
