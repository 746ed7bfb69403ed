"""Imports run downward only, Hydra stays in the commands, and no module grows beyond reading in one go."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the top down. A room may import from rooms further down and from itself, not from its neighbours.
ORDER = [
    # commands; a new one is added here; __main__ is a command that shares its name with a room
    {
        "__main__",
        "train",
        "linear",
        "knn",
        "finetune",
        "embed",
        "search",
        "convert",
        "check_data",
        "pack",
        "temperature",
        "choose",
    },
    {"cli"},
    {"stages"},
    {"interop", "evaluation", "analysis", "report"},
    {"engine"},
    {"methods"},
    {"builder"},
    {"losses", "models", "data"},
    {"distributed", "config", "files"},
]
HYDRA_USERS = {"cli"}
MOST_LINES = 350
LONGER: dict[str, int] = {}  # a longer one, and how long it may be, says here why

MODULES = sorted((ROOT / "moco").rglob("*.py"))
LEVEL = {room: len(ORDER) - number for number, rooms in enumerate(ORDER) for room in rooms}


def room(name: str) -> str:
    """moco.data.loader -> data; moco -> the package itself, ''; moco.report.__main__ -> the command, __main__."""
    return "__main__" if name.endswith(".__main__") else [*name.split("."), ""][1]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, package: str) -> set[str]:
    """Full names of all modules that a source imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], base]).rstrip(".")
            # `from moco import engine` imports moco.engine
            names |= {f"{base}.{alias.name}" for alias in node.names} if base == "moco" else {base}
    return names


def violations(name: str, source: str, is_package: bool = False) -> list[str]:
    """What a module of the given name may not import."""
    package = name if is_package else name.rpartition(".")[0]
    wrong = []
    for other in sorted(imported(source, package)):
        if other.split(".")[0] in ("hydra", "omegaconf") and room(name) not in HYDRA_USERS:
            wrong.append(f"{name} imports {other}: only {', '.join(sorted(HYDRA_USERS))} may")
        if other.split(".")[0] != "moco" or room(other) in ("", room(name)):
            continue
        if room(other) not in LEVEL or LEVEL[room(other)] >= LEVEL[room(name)]:
            wrong.append(f"{name} imports {other}, which is not below it")
    return wrong


def test_the_modules_are_found() -> None:
    assert len(MODULES) > 20
    assert ROOT / "moco" / "builder.py" in MODULES


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_downward(path: Path) -> None:
    name = name_of(path)
    assert room(name) == "" or room(name) in LEVEL, f"say in ORDER where {room(name)!r} belongs"
    assert violations(name, path.read_text(), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("name", "source", "allowed"),
    [
        ("moco.builder", "from moco.losses import info_nce", True),
        ("moco.losses", "from moco.builder import MoCo", False),
        ("moco.losses", "import moco.builder", False),
        ("moco.losses", "from moco import builder", False),
        ("moco.models.norm", "def f():\n    from moco.engine.step import train_step", False),
        ("moco.models.norm", "from ..engine import step", False),
        ("moco.models.norm", "from . import encoder", True),
        ("moco.models.norm", "from moco.data.crop import crop", False),  # a neighbour
        ("moco.engine.step", "from moco.evaluation.knn import knn_accuracy", False),
        ("moco.stages.live", "from moco.evaluation.knn import knn_accuracy", True),
        ("moco.stages.live", "import hydra.utils", False),
        ("moco.config", "from omegaconf import OmegaConf", False),
        ("moco.cli", "from omegaconf import OmegaConf", True),
        ("moco.cli", "import moco.train", False),
        ("moco.train", "import torch", True),
        ("moco.report.__main__", "from moco.cli import run_command", True),
        ("moco.report.page", "from moco.cli import run_command", False),
    ],
)
def test_an_upward_import_would_be_noticed(name: str, source: str, allowed: bool) -> None:
    assert (violations(name, source) == []) == allowed


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_is_sent_to_a_gpu_by_name(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    lines = [call.lineno for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "cuda"]
    assert lines == [], "allocate on the input's device instead of .cuda()"


def test_configs_name_nothing_to_instantiate() -> None:
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    assert len(files) > 10
    assert [path.name for path in files if "_target_" in path.read_text()] == []
    # in code a docstring may speak of it
    used = [path.name for path in MODULES if "instantiate(" in path.read_text() or '"_target_"' in path.read_text()]
    assert used == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_can_be_read_in_one_go(path: Path) -> None:
    assert len(path.read_text().splitlines()) < LONGER.get(name_of(path), MOST_LINES)
