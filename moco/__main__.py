"""List the commands: `python -m moco`."""

import ast
import difflib
import shutil
import sys
from pathlib import Path

from moco.runtime.stdio import exit_on_broken_pipe, print_error, protected_streams, wrapped

COMMANDS = {
    "train": ("train",),
    "check and pack images": ("check_data", "pack"),
    "evaluate": ("knn", "linear", "finetune", "transfer", "segment", "detect"),
    "use the features": ("embed", "search"),
    "understand": ("report", "temperature", "choose"),
    "exchange": ("convert",),
}


def summary(command: str) -> str:
    """Return what a command does: the first words of its file's docstring. The file is not imported."""
    text = ast.get_docstring(ast.parse(Path(__file__).with_name(f"{command}.py").read_text(encoding="utf-8"))) or ""
    return text.partition(": `")[0]


def main() -> None:
    """Print each command with its purpose."""
    width = shutil.get_terminal_size().columns
    print("Momentum Contrast, from pretraining to evaluation. Commands:")
    for title, commands in COMMANDS.items():
        print(f"\n  {title}")
        for command in commands:
            line = f"    python -m moco.{command}"
            purpose = summary(command)
            below = wrapped(purpose, width, " " * 8, " " * 8)
            print(f"{line:<32}{purpose}" if 32 + len(purpose) <= width else f"{line}\n{below}")
    print()
    print(wrapped("Each prints its fields with --help. First steps: README.md; all pages: docs/index.md", width))


def refuse(word: str) -> None:
    """Refuse an argument: print the command with the most similar name, if there is one, and exit with status 2."""
    known = [each for names in COMMANDS.values() for each in names]
    close = difflib.get_close_matches(word.removeprefix("moco."), known)
    fix = f"run python -m moco.{close[0]}, or" if close else "run"
    print_error(f"moco: unknown argument {word}: {fix} python -m moco for the list of commands")
    sys.exit(2)


if __name__ == "__main__":
    with protected_streams(), exit_on_broken_pipe():
        refuse(sys.argv[1]) if sys.argv[1:] and not sys.argv[1].startswith("-") else main()
