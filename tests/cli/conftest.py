"""Run a command in the process of the test."""

import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that does what `python -m moco.NAME` does, and returns its exit status, stdout and stderr.

    The working directory is `tmp_path`. `main` replaces the code of the command.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)

    def call(name: str, *arguments: str, main: Callable[[], object] | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.delitem(sys.modules, f"moco.{name}", raising=False)  # runpy would warn
        status = 0
        try:
            main() if main else runpy.run_module(f"moco.{name}", run_name="__main__")
        except SystemExit as error:
            status = int(error.code or 0)
        return status, *capsys.readouterr()

    return call


@pytest.fixture(autouse=True)
def finalizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the hook for errors of finalizers, which `run_command` replaces when it is interrupted."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
