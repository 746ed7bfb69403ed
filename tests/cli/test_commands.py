"""Each command names a function that takes its configuration; help and invalid configurations do not import torch."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from moco.cli import Command
from moco.config import config_dir

COMMANDS = sorted({path.stem for path in Path(config_dir()).glob("*.yaml")} - {"train"})


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_names_a_function_that_takes_its_configuration(name: str) -> None:
    command = getattr(importlib.import_module(f"moco.{name}"), name)
    assert isinstance(command, Command)
    assert command.name == name
    module, _, function = command.work.partition(":")
    hints = get_type_hints(getattr(importlib.import_module(module), function))
    assert hints["config"] is command.schema


def test_the_commands_do_not_import_torch() -> None:
    modules = ", ".join(f"moco.{name}" for name in [*COMMANDS, "train"])
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
