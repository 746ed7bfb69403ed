"""Runs the documentation's commands: a shell in miniature that starts ours in this process.

A command of moco runs as `python -m` would run it, by `runpy`, with all that it says plus what makes it small. What
torchrun is told is read by its own parser, and what it would start runs as one process (tests/faults/ and tests/cli/
start torchrun itself). What is said twice runs once. A script of ours is run by bash with a PATH on which python,
torchrun, srun and the like only write down how they were called; those calls are run next. What cannot run here stands
in `ELSEWHERE`, with what is checked instead.
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

from moco.analysis.studies import temperature
from scripts import sweep
from tests.docs.pages import REPOSITORY, Command, commands_in
from tests.docs.stand_ins import RENAMED, small

# What writes its call into the file $CALLS; srun starts what stands behind its options.
NOTED = '#!/bin/bash\nprintf "%q " "${0##*/}" "$@" >> "$CALLS"; echo >> "$CALLS"\n'
FAKES = {
    "python": NOTED,
    "torchrun": NOTED,
    "srun": '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
    "scontrol": "#!/bin/bash\n[[ $1 == show ]] && echo node0\n",
    "nvidia-smi": '#!/bin/bash\necho "GPU 0: none"\n',
}
SLURM = {"SLURM_NODEID": "0", "SLURM_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_NODELIST": "node0"}


class Said(NamedTuple):
    """A command as it is started, and what it finds."""

    words: tuple[str, ...]
    finds: frozenset[str]


class InThisProcess:
    """What moco.temperature starts as `python -m moco.train ...`, where it stands for `subprocess.Popen`."""

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
        raise AssertionError(f"nobody sends signal {number}")


class Done:
    """What commands have run, in whatever folder, and what each has left there: none is run a second time."""

    def __init__(self) -> None:
        self._left: dict[Said, tuple[Path, list[Path]]] = {}

    @staticmethod
    def said(folder: Path, words: list[str], environment: dict[str, str]) -> Said:
        """A command, and which of the paths that it names are there before it: with others it is not the same one.

        Of a field that is set twice, by the page and to make the command small, the last word counts, as for Hydra.
        """
        last = {word.partition("=")[0]: place for place, word in enumerate(words)}
        words = [word for place, word in enumerate(words) if last[word.partition("=")[0]] == place]
        named = {part for word in words for part in re.split(r"[=\[\],\"']", word) if part and (folder / part).exists()}
        return Said((*words, *sorted(f"{name}={value}" for name, value in environment.items())), frozenset(named))

    def again(self, said: Said, folder: Path) -> bool:
        """Whether it ran before; if so, what it left is put into this folder as well."""
        if said not in self._left:
            return False
        there, left = self._left[said]
        for path in left:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(there / path, folder / path)
        return True

    @contextlib.contextmanager
    def noting(self, said: Said, folder: Path) -> Iterator[None]:
        """Notes what a command leaves, unless it fails."""
        before = files(folder)
        yield
        self._left[said] = folder, [path for path, state in files(folder).items() if before.get(path) != state]


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    """Each file below a folder, links not followed, with its size and time."""
    return {
        Path(at, name).relative_to(folder): (state.st_size, state.st_mtime_ns)
        for at, _, names in os.walk(folder)
        for name in names
        for state in [Path(at, name).lstat()]
    }


class Shell:
    """Runs commands in a folder.

    Args:
        folder: the working directory, with the stand-ins.
        monkeypatch: of the test.
        output: gives what was printed since it was last asked.
        done: what other shells have run.
    """

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, output: Callable[[], str], done: Done | None = None
    ) -> None:
        self.folder, self.monkeypatch, self.output, self.done = folder, monkeypatch, output, done or Done()
        self.ran: list[str] = []

    def run(self, command: Command) -> None:
        """Runs one command, or checks what stands for it in `ELSEWHERE`.

        Raises:
            AssertionError: where it ends with another status than 0, or leaves not what it should.
            ValueError: for a command that nothing here knows.
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
                assert os.access(REPOSITORY / script, os.X_OK), f"{command}: {script} may not be executed"
                self._script(words, command.environment, command)
            case ["sbatch", *arguments]:
                self._sbatch(arguments, command)
            case ["docker", "run", *arguments]:
                image = arguments.index("moco")
                self.module("moco.train", arguments[image + 1 :], command)
            case _:
                checks = [check for pattern, check in ELSEWHERE.items() if re.match(pattern, shlex.join(words))]
                if len(checks) != 1:
                    raise ValueError(f"{command}: say in tests/docs/shell.py how to run it, or what to check instead")
                checks[0](self.folder, words)
        self.ran.append(shlex.join(words))

    def module(self, module: str, arguments: list[str], command: Command) -> None:
        """`python -m MODULE ARGUMENTS`, small, in this process."""
        shown = any(each in ("--help", "--cfg") for each in arguments)
        said = [*arguments, *([] if shown else small(module, tuple(arguments)))]
        self._call(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True), [module, *said], command)
        if not shown:
            self._left(module, arguments, command)

    def compose(self, command: Command) -> None:
        """A command that the text mentions: its configuration is composed and printed, nothing is started.

        `...` stands for whatever the reader adds.
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
        said = self.done.said(self.folder, words, command.environment)
        if self.done.again(said, self.folder):
            return
        with self.done.noting(said, self.folder), self.monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # small queues and short schedules are warned of, rightly
            patch.setattr(warnings, "formatwarning", warnings.formatwarning)  # a command changes it, as its own
            patch.setenv("HYDRA_FULL_ERROR", "1")  # and this
            patch.setattr(sys, "argv", words)
            patch.setattr(temperature, "subprocess", SimpleNamespace(Popen=InThisProcess, STDOUT=subprocess.STDOUT))
            for name, value in command.environment.items():
                patch.setenv(name, value)
            status: object = None
            try:
                start()
            except SystemExit as end:
                status = end.code
            assert status in (None, 0), f"{command}\nran as {shlex.join(words)}\n{status}\n{self.output()}"

    def _left(self, module: str, arguments: list[str], command: Command) -> None:
        """A run leaves its encoder, any other command what it was asked to write."""
        said = dict(each.split("=", 1) for each in arguments if re.match(r"(run|output)=", each) and "$" not in each)
        wanted = said.get("output")
        if module == "moco.train" and "run" in said:
            wanted = f"{said['run']}/encoder.safetensors"
        assert wanted is None or (self.folder / wanted).exists(), f"{command}: there is no {wanted}\n{self.output()}"

    def _torchrun(self, arguments: list[str], command: Command) -> None:
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(arguments)
        assert parsed.module, f"{command}: torchrun starts a module of ours with -m"
        self.module(parsed.training_script, parsed.training_script_args, command)

    def _script(self, words: list[str], environment: dict[str, str], command: Command) -> None:
        """A script of ours, and then what it has started."""
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
        """The batch script under Slurm's variables."""
        options = [each for each in arguments if each.startswith("--")]
        script, *rest = arguments[len(options) :]
        told = dict(each.removeprefix("--").split("=") for each in options)
        self._script(["bash", script, *rest], SLURM | {"SLURM_NNODES": told["nodes"]}, command)

    def _sweep(self, arguments: list[str], command: Command) -> None:
        """scripts/sweep.py, whose trials run in this process, one after the other."""

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


def an_extra_or_the_tree(_: Path, words: list[str]) -> None:
    """pip: what is installed is this tree, or an extra that pyproject.toml has. .ci/run installs for real."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (what,) = [word for word in words[2:] if not word.startswith("-")]
    name, bracket, extra = what.removesuffix("]").partition("[")
    assert name in (".", project["name"]), f"pip install {what}: not this project"
    assert not bracket or extra in project["optional-dependencies"], f"pip install {what}: there is no such extra"


def tests_that_are_there(_: Path, words: list[str]) -> None:
    """pytest: this is pytest. What it is told to run is there."""
    for word in words[3:]:
        assert not word.startswith("tests") or (REPOSITORY / word).exists(), f"{word} is not there"


def the_image(_: Path, words: list[str]) -> None:
    """docker build: what the Dockerfile copies is there, and what it starts is moco.train."""
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    copied = [name for line in re.findall(r"^COPY (.*)", text, flags=re.MULTILINE) for name in line.split()[:-1]]
    assert len(copied) > 5
    for name in copied:
        assert (REPOSITORY / name).exists(), f"Dockerfile copies {name}, which is not there"
    (entry,) = re.findall(r"^ENTRYPOINT (.*)", text, flags=re.MULTILINE)
    assert ast.literal_eval(entry) == ["python", "-m", "moco.train"]


def the_events(folder: Path, words: list[str]) -> None:
    """tensorboard: it is installed, and finds events where it is told to look."""
    assert entry_points(group="console_scripts", name="tensorboard")
    assert list((folder / words[words.index("--logdir") + 1]).rglob("events.out.tfevents.*"))


def the_hooks(_: Path, words: list[str]) -> None:
    """pre-commit install would write into .git/hooks: its configuration can be read."""
    assert yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]


def the_site(_: Path, words: list[str]) -> None:
    """mkdocs: its links, anchors and menu are checked by test_links.py, without it. The extra has what it names."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = " ".join(project["optional-dependencies"]["docs"])
    plugins = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["plugins"]
    assert all("search" in each or next(iter(each)) in wanted for each in plugins)


def an_environment(_: Path, words: list[str]) -> None:
    """A virtual environment, made for real by .ci/run with the same module."""
    text = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    assert "python3 -m venv" in text
    assert words[-1].startswith(".venv")


ELSEWHERE: dict[str, Callable[[Path, list[str]], None]] = {
    r"pip install ": an_extra_or_the_tree,
    r"python -m pytest": tests_that_are_there,
    r"docker build ": the_image,
    r"tensorboard ": the_events,
    r"pre-commit install$": the_hooks,
    r"mkdocs (build|serve)": the_site,
    r"python3 -m venv |source ": an_environment,
}
