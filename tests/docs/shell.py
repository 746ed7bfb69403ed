"""Runs the documentation's commands: a small shell that runs moco's commands in this process.

A moco command runs by `runpy`, as with `python -m`, with its own arguments plus overrides that make it small.
torchrun's own parser reads a torchrun command, and its module runs as one process (tests/faults/ and tests/cli/ start
torchrun itself). A repeated command runs once. bash runs the project's scripts with a PATH on which python, torchrun,
srun and others only record their arguments; the recorded commands run afterwards. `CHECKS` lists the commands that
cannot run here, with the check that replaces each.
"""

import ast
import contextlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, TextIO

import pytest
import yaml

from moco.runs import sweep as runner
from scripts import sweep
from scripts.bench.__main__ import parsed
from tests.docs.pages import REPOSITORY, Command, commands_in
from tests.docs.stand_ins import RENAMED, small
from tests.plugins import temporary_plugins

# Programs that append their command line to the file $CALLS. srun starts the command after its options.
RECORDED = '#!/bin/bash\nprintf "%q " "${0##*/}" "$@" >> "$CALLS"; echo >> "$CALLS"\n'
FAKES = {
    "python": RECORDED,
    "torchrun": RECORDED,
    "srun": '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
    "scontrol": "#!/bin/bash\n[[ $1 == show ]] && echo node0\n",
    "nvidia-smi": '#!/bin/bash\necho "GPU 0: none"\n',
}
SLURM = {"SLURM_NODEID": "0", "SLURM_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_NODELIST": "node0"}


class Invocation(NamedTuple):
    """A command's words, and the existing paths that it names."""

    words: tuple[str, ...]
    existing: frozenset[str]


class InThisProcess:
    """Replaces `subprocess.Popen`: runs `python -m moco.train ...` in this process."""

    def __init__(self, command: list[str], stdout: TextIO, stderr: int) -> None:
        python, dash_m, self.module, *self.arguments = command
        assert (python, dash_m) == (sys.executable, "-m")
        self.out = stdout

    def wait(self) -> int:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(self.out):
            patch.setattr(sys, "argv", [self.module, *self.arguments])
            runpy.run_module(self.module, run_name="__main__", alter_sys=True)
        return 0

    def send_signal(self, number: int) -> None:
        raise AssertionError(f"unexpected signal {number}")


class CommandCache:
    """The commands that have run in any folder, with the files that each wrote. No command runs twice."""

    def __init__(self) -> None:
        self._written: dict[Invocation, tuple[Path, list[Path]]] = {}

    @staticmethod
    def invocation(folder: Path, words: list[str], environment: dict[str, str]) -> Invocation:
        """Return the command with the existing paths that it names; with other paths it is another command.

        If a field is set twice, by the page and by the overrides that make the command small, the last one counts, as
        in Hydra.
        """
        last = {word.partition("=")[0]: place for place, word in enumerate(words)}
        words = [word for place, word in enumerate(words) if last[word.partition("=")[0]] == place]
        named = {part for word in words for part in re.split(r"[=\[\],\"']", word) if part and (folder / part).exists()}
        return Invocation((*words, *sorted(f"{name}={value}" for name, value in environment.items())), frozenset(named))

    def restore(self, invocation: Invocation, folder: Path) -> bool:
        """If the command ran before, copy the files that it wrote into this folder. Return whether it ran before."""
        if invocation not in self._written:
            return False
        there, written = self._written[invocation]
        for path in written if there != folder else []:  # a page may repeat a command
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(there / path, folder / path)
        return True

    @contextlib.contextmanager
    def record(self, invocation: Invocation, folder: Path) -> Iterator[None]:
        """Record the files that a command writes, unless it fails."""
        before = files(folder)
        yield
        changed = [path for path, state in files(folder).items() if before.get(path) != state]
        self._written[invocation] = folder, changed


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return size and modification time of each file below a folder, without following links."""
    return {
        Path(at, name).relative_to(folder): (state.st_size, state.st_mtime_ns)
        for at, _, names in os.walk(folder)
        for name in names
        for state in [Path(at, name).lstat()]
    }


class Shell:
    """Runs commands in a folder.

    Args:
        folder: working directory with the substitute data.
        monkeypatch: the test's.
        output: returns what was printed since its last call.
        cache: the commands that other shells have run.
    """

    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        output: Callable[[], str],
        cache: CommandCache | None = None,
    ) -> None:
        self.folder, self.monkeypatch, self.output = folder, monkeypatch, output
        self.cache = cache or CommandCache()
        self.ran: list[str] = []

    def run(self, command: Command) -> None:
        """Run one command, or its check from `CHECKS`.

        Raises:
            AssertionError: if its status is not 0, or an expected file is missing.
            ValueError: for an unknown command.
        """
        words = [self._renamed(word) for word in command.words]
        match words:
            case ["python", "-m", module, *arguments] if module.startswith("moco."):
                self.module(module, arguments, command)
            case ["python", script, *arguments] if script == "scripts/sweep.py":
                self._sweep(arguments, command)
            case ["python", script, *arguments] if script.startswith("scripts/"):
                self._call(lambda: runpy.run_path(script, run_name="__main__"), [script, *arguments], command)
            case ["torchrun", *arguments]:
                self._torchrun(arguments, command)
            case ["bash", script, *_] if script.startswith("scripts/"):
                self._script(words, command.environment, command)
            case [script, *_] if script.startswith("scripts/") and script.endswith(".sh"):
                assert os.access(REPOSITORY / script, os.X_OK), f"{command}: {script} is not executable"
                self._script(words, command.environment, command)
            case ["sbatch", *arguments]:
                self._sbatch(arguments, command)
            case ["docker", "run", *arguments]:
                image = arguments.index("moco")
                self.module("moco.train", arguments[image + 1 :], command)
            case _:
                checks = [check for pattern, check in CHECKS.items() if re.match(pattern, shlex.join(words))]
                if len(checks) != 1:
                    raise ValueError(f"{command}: add to tests/docs/shell.py how to run it, or a check for it")
                checks[0](self.folder, words)
        self.ran.append(shlex.join(words))

    def module(self, module: str, arguments: list[str], command: Command) -> None:
        """Run `python -m MODULE ARGUMENTS` in this process, made small."""
        shown = any(each in ("--help", "--cfg") for each in arguments)
        words = [module, *arguments, *([] if shown else small(module, tuple(arguments)))]
        self._call(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True), words, command)
        if not shown:
            self._check_output(module, arguments, command)

    def compose(self, command: Command) -> None:
        """Compose and print the configuration of a command that the text mentions, without running it.

        `...` stands for arguments that the reader adds.
        """
        words = [self._renamed(word) for word in command.words if word != "..."]
        if words[0] == "torchrun":
            from torch.distributed.run import get_args_parser

            parsed = get_args_parser().parse_args(words[1:])
            words = ["python", "-m", parsed.training_script, *parsed.training_script_args]
        if words[0] != "python":
            self.run(command)
            return
        shown = [] if "--help" in words or "--cfg" in words else ["--cfg", "job"]
        self.module(words[2], [*words[3:], *shown], command)
        self.ran.append(shlex.join(words))

    def _call(self, start: Callable[[], object], words: list[str], command: Command) -> None:
        self.output()
        invocation = self.cache.invocation(self.folder, words, command.environment)
        if self.cache.restore(invocation, self.folder):
            return
        recorded = self.cache.record(invocation, self.folder)
        with recorded, self.monkeypatch.context() as patch, warnings.catch_warnings(), temporary_plugins(self.folder):
            warnings.simplefilter("ignore")  # small queues and short schedules cause correct warnings
            patch.setattr(warnings, "formatwarning", warnings.formatwarning)  # restores what a command changes
            patch.setenv("HYDRA_FULL_ERROR", "1")  # likewise
            patch.setattr(sys, "argv", words)
            patch.setattr(runner, "subprocess", SimpleNamespace(Popen=InThisProcess, STDOUT=subprocess.STDOUT))
            for name, value in command.environment.items():
                patch.setenv(name, value)
            status: object = None
            try:
                start()
            except SystemExit as end:
                status = end.code
            assert status in (None, 0), f"{command}\nran as {shlex.join(words)}\n{status}\n{self.output()}"

    def _check_output(self, module: str, arguments: list[str], command: Command) -> None:
        """Check that a run wrote its encoder, and any other command its output."""
        given = dict(each.split("=", 1) for each in arguments if re.match(r"(run|output)=", each) and "$" not in each)
        expected = given.get("output")
        if module == "moco.train" and "run" in given:
            expected = f"{given['run']}/encoder.safetensors"
        assert expected is None or (self.folder / expected).exists(), f"{command}: no {expected}\n{self.output()}"

    def _torchrun(self, arguments: list[str], command: Command) -> None:
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(arguments)
        assert parsed.module, f"{command}: torchrun must start a module with -m"
        self.module(parsed.training_script, parsed.training_script_args, command)

    def _script(self, words: list[str], environment: dict[str, str], command: Command) -> None:
        """Run a script of the project, then the commands that it started."""
        fakes, calls = self.folder / "fakes", self.folder / "calls"
        fakes.mkdir(exist_ok=True)
        calls.write_text("")
        for name, text in FAKES.items():
            (fakes / name).write_text(text)
            (fakes / name).chmod(0o755)
        ended = subprocess.run(
            ["bash", *words] if words[0] != "bash" else words,
            env=os.environ | environment | {"PATH": f"{fakes}:{os.environ['PATH']}", "CALLS": str(calls)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
        started = list(commands_in(calls.read_text(), where=f"{command.where} started"))
        assert started, f"{command} started nothing"
        for each in started:
            self.run(each)

    def _sbatch(self, arguments: list[str], command: Command) -> None:
        """Run the batch script with Slurm's variables."""
        options = [each for each in arguments if each.startswith("--")]
        script, *rest = arguments[len(options) :]
        values = dict(each.removeprefix("--").split("=") for each in options)
        self._script(["bash", script, *rest], SLURM | {"SLURM_NNODES": values["nodes"]}, command)

    def _sweep(self, arguments: list[str], command: Command) -> None:
        """Run scripts/sweep.py with its trials in this process, one after the other."""

        def train(run: Path, overrides: list[str]) -> int:
            self.module("moco.train", [*overrides, f"run={run}"], command)
            return 0

        with self.monkeypatch.context() as patch:
            patch.setattr(sweep, "train", train)
            assert sweep.main(arguments) == 0, command

    def _renamed(self, word: str) -> str:
        for name, here in RENAMED.items():
            word = word.replace(name, here)
        return word


def check_pip(_: Path, words: list[str]) -> None:
    """pip installs this tree or one of its extras. .ci/run runs the installation."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (what,) = [word for word in words[2:] if not word.startswith("-")]
    name, bracket, extra = what.removesuffix("]").partition("[")
    assert name in (".", project["name"]), f"pip install {what}: not this project"
    assert not bracket or extra in project["optional-dependencies"], f"pip install {what}: there is no such extra"


def check_pytest(_: Path, words: list[str]) -> None:
    """The tests that pytest is to run exist."""
    for word in words[3:]:
        assert not word.startswith("tests") or (REPOSITORY / word).exists(), f"{word} does not exist"


def check_docker(_: Path, words: list[str]) -> None:
    """The files that the Dockerfile copies exist, and it starts moco.train."""
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    copied = [name for line in re.findall(r"^COPY (.*)", text, flags=re.MULTILINE) for name in line.split()[:-1]]
    assert len(copied) > 5
    for name in copied:
        assert (REPOSITORY / name).exists(), f"Dockerfile copies {name}, which does not exist"
    (entry,) = re.findall(r"^ENTRYPOINT (.*)", text, flags=re.MULTILINE)
    assert ast.literal_eval(entry) == ["python", "-m", "moco.train"]


def check_tensorboard(folder: Path, words: list[str]) -> None:
    """TensorBoard is installed, and the directory contains events."""
    assert entry_points(group="console_scripts", name="tensorboard")
    assert list((folder / words[words.index("--logdir") + 1]).rglob("events.out.tfevents.*"))


def check_pre_commit(_: Path, words: list[str]) -> None:
    """The configuration of pre-commit is readable. (Its installation would write into .git/hooks.)"""
    assert yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]


def check_mkdocs(_: Path, words: list[str]) -> None:
    """The extra `docs` contains the plugins. test_links.py checks links, anchors and menu without mkdocs."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = " ".join(project["optional-dependencies"]["docs"])
    plugins = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["plugins"]
    assert all("search" in each or next(iter(each)) in wanted for each in plugins)


def check_venv(_: Path, words: list[str]) -> None:
    """.ci/run creates a virtual environment with the same module."""
    text = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    assert "python3 -m venv" in text
    assert words[-1].startswith(".venv")


def check_bench(_: Path, words: list[str]) -> None:
    """The options of a benchmark exist. tests/test_bench.py runs the benchmarks, small."""
    parsed(words[3:])


def check_code(folder: Path, words: list[str]) -> None:
    """`python -c CODE` runs, with random weights instead of those that it would download."""
    exec(words[-1].replace("'DEFAULT'", "None"), {})
    assert (folder / "resnet18.pth").is_file()


CHECKS: dict[str, Callable[[Path, list[str]], None]] = {
    r"pip install ": check_pip,
    r"python -m pytest": check_pytest,
    r"python -c ": check_code,
    r"python -m scripts\.bench ": check_bench,
    r"docker build ": check_docker,
    r"tensorboard ": check_tensorboard,
    r"pre-commit install$": check_pre_commit,
    r"mkdocs (build|serve)": check_mkdocs,
    r"python3 -m venv |source ": check_venv,
}
