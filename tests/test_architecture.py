"""Imports run downward only, Hydra stays in two modules, functions stay small (the limits are in pyproject.toml)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the top down. A package may import from packages further down and from itself, not from its neighbors. A module
# that does a command's work may stand higher than its package: it is listed with its full name below `moco`.
ORDER = [
    {"api"},  # the Python interface
    {
        "train",
        "linear",
        "knn",
        "finetune",
        "transfer",
        "segment",
        "detect",
        "embed",
        "search",
        "convert",
        "check_data",
        "pack",
        "temperature",
        "choose",
        "report",
        "__main__",
    },  # the commands
    {"cli"},
    {"composition"},
    {"overrides"},
    {"training"},
    {"retrieval"},
    {"reporting"},
    {"analysis.studies"},
    {"interop.convert"},
    {"segmentation", "detection"},
    {"evaluation"},
    {"analysis"},
    {"interop"},
    {"runs"},
    {"optim"},
    {"methods"},
    {"builder"},
    {"losses", "models", "data"},
    {"runtime"},
    {"kernels"},
    {"plugins"},
    {"distributed", "config", "files", "digest", "untrusted"},
]
HYDRA_USERS = {"composition", "overrides"}
LONGEST_FILE, LONGEST_FUNCTION = 400, 60  # lines

MODULES = sorted((ROOT / "moco").rglob("*.py"))
LEVEL = {room: len(ORDER) - number for number, rooms in enumerate(ORDER) for room in rooms}


def level(name: str) -> int | None:
    """The level of a module, or of the package that holds it; None for the package `moco` itself and unknown ones."""
    _, *parts = name.split(".")
    return LEVEL.get(".".join(parts[:2]), LEVEL.get(parts[0] if parts else ""))


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
            # `from moco import training` imports moco.training, `from moco.runs import checkpoint` a module of it
            names |= {f"{base}.{alias.name}" for alias in node.names} if base.startswith("moco") else {base}
    return names


def violations(name: str, source: str, is_package: bool = False) -> list[str]:
    """The imports that a module of the given name must not have; the package `moco` itself exports from any level."""
    package = name if is_package else name.rpartition(".")[0]
    mine = level(name)
    wrong = []
    for other in sorted(imported(source, package)):
        first, *rest = other.split(".")
        if first in ("hydra", "omegaconf") and name.removeprefix("moco.") not in HYDRA_USERS:
            wrong.append(f"{name} imports {other}: only {', '.join(sorted(HYDRA_USERS))} may")
        if name == "moco" or first != "moco" or not rest or rest[0].startswith("__"):
            continue
        theirs = level(other)
        same_package = theirs == mine and rest[0] == name.split(".")[1]
        if theirs is None or mine is None or not (theirs < mine or same_package):
            wrong.append(f"{name} imports {other}, which is not below it")
    return wrong


def test_imports_run_downward() -> None:
    assert ROOT / "moco" / "builder.py" in MODULES
    assert [name_of(path) for path in MODULES if level(name_of(path)) is None] == ["moco"]
    assert [
        each for path in MODULES for each in violations(name_of(path), path.read_text(), path.name == "__init__.py")
    ] == []


@pytest.mark.parametrize(
    ("name", "source", "allowed"),
    [
        ("moco.builder", "from moco.losses import info_nce", True),
        ("moco.losses", "from moco.builder import MoCo", False),
        ("moco.losses", "import moco.builder", False),
        ("moco.losses", "from moco import builder", False),
        ("moco.models.norm", "def f():\n    from moco.training.step import train_step", False),
        ("moco.models.norm", "from ..training import step", False),
        ("moco.models.norm", "from . import encoder", True),
        ("moco.models.norm", "from moco.data.crop import crop", False),  # a neighbor
        ("moco.evaluation.knn", "from moco.training.step import train_step", False),
        ("moco.training.live_evaluation", "from moco.evaluation.knn_classifier import knn_accuracy", True),
        ("moco.training.live_evaluation", "import hydra.utils", False),
        ("moco.data.pack", "from moco.data.sources import Source", True),
        ("moco.data.sources", "from moco.interop.foreign import read", False),
        ("moco.config", "from omegaconf import OmegaConf", False),
        ("moco.composition", "from omegaconf import OmegaConf", True),
        ("moco.cli", "import moco.train", False),
        ("moco.train", "import torch", True),
        ("moco.report", "from moco.cli import run_command", True),
        ("moco.reporting.page", "from moco.cli import run_command", False),
        ("moco", "from moco.api import load_encoder", True),
    ],
)
def test_an_upward_import_would_be_noticed(name: str, source: str, allowed: bool) -> None:
    assert (violations(name, source) == []) == allowed


def test_nothing_is_sent_to_a_gpu_by_name() -> None:
    calls = [
        f"{name_of(path)}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda"
    ]
    assert calls == [], "allocate on the input's device instead of .cuda()"


def test_configs_name_nothing_to_instantiate() -> None:
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    assert len(files) > 10
    assert [path.name for path in files if "_target_" in path.read_text()] == []
    # in code a docstring may mention it
    used = [path.name for path in MODULES if "instantiate(" in path.read_text() or '"_target_"' in path.read_text()]
    assert used == []


def test_no_file_is_too_long() -> None:
    files = [path for folder in ("moco", "scripts", "tests") for path in (ROOT / folder).rglob("*.py")]
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def test_no_function_is_too_long() -> None:
    functions = [
        (f"{name_of(path)}.{node.name}", node.end_lineno - node.lineno + 1)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    ]
    assert len(functions) > 500
    assert {name: lines for name, lines in functions if lines > LONGEST_FUNCTION} == {}
