"""A command that is stopped by a signal says how to continue."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from moco.cli import run_command
from moco.config.knn import KnnConfig
from moco.config.pack import PackConfig
from moco.data.shard_index import PARTS
from moco.runtime.preemption import keeping
from tests.cli.conftest import Run
from tests.data.packed import class_folders, packed
from tests.evaluation.runs import trained

KEPT = "; finished shards are kept: run the same command again to resume"
NOTHING = "; no finished shards yet: run the same command again to start"
RESUMES: list[tuple[str, type, bool | None, str]] = [
    ("pack", PackConfig, True, KEPT),
    ("pack", PackConfig, False, NOTHING),
    ("pack", PackConfig, None, "; run the same command again"),  # stopped before it knows
    ("knn", KnnConfig, None, ""),
]


def kill(number: int, some: bool | None = None) -> Callable[[object], None]:
    def command(_: object) -> None:
        with nullcontext() if some is None else keeping("finished shards", lambda: some):
            os.kill(os.getpid(), number)
            time.sleep(10)

    return command


@pytest.mark.parametrize("stopped", RESUMES)
@pytest.mark.parametrize(
    ("number", "status", "words"),
    [
        (signal.SIGTERM, 143, "stopped by SIGTERM"),
        (signal.SIGHUP, 129, "stopped by SIGHUP"),
        (signal.SIGUSR1, 138, "stopped by SIGUSR1"),
        (signal.SIGINT, 130, "interrupted"),
    ],
)
def test_the_sentence_names_the_signal_and_how_to_continue(
    stopped: tuple[str, type, bool | None, str],
    number: int,
    status: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    name, schema, some, resume = stopped
    monkeypatch.setattr(sys, "argv", [f"moco.{name}"])
    with pytest.raises(SystemExit) as caught:
        run_command(name, schema, kill(number, some))
    assert caught.value.code == status
    assert capfd.readouterr().err == f"moco: {words}{resume}\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


HALF_BUILT = """
import os, time
from moco.cli import run_command
from moco.config.knn import KnnConfig

class File:
    def __init__(self):
        os.kill(os.getpid(), {number})
        time.sleep(10)
        self.closed = False

    def __del__(self):
        self.closed or self.close()

run_command("knn", KnnConfig, lambda config: File())
"""


@pytest.mark.parametrize(("number", "words"), [(signal.SIGTERM, "stopped by SIGTERM"), (signal.SIGINT, "interrupted")])
def test_an_object_that_the_signal_left_half_built_adds_no_traceback(number: int, words: str) -> None:
    done = subprocess.run([sys.executable, "-c", HALF_BUILT.format(number=int(number))], capture_output=True, text=True)
    assert done.stderr == f"moco: {words}\n"


STOPS = [  # a command, a function that interrupts it before it has kept anything, and what is not there
    ("pack data.root=images output=out", "moco.data.pack.pack_split", "finished shards"),
    (
        "embed run=run data=folder data.root=images output=out",
        "moco.retrieval.embed._compute_missing",
        "finished features",
    ),
    (
        "search run=run data=folder data.root=images output=out",
        "moco.retrieval.embed._compute_missing",
        "finished features",
    ),
    ("train run=new data.workers=0", "moco.training.build.make_method", "checkpoints"),
    ("finetune run=run fraction=0.1", "moco.evaluation.finetune._train", "saved steps"),
    ("transfer run=run output=out", "moco.evaluation.transfer._evaluate_set", "finished results"),
    ("temperature epochs=1 output=out", "moco.analysis.studies.temperature.run_to_end", "saved runs"),
]


@pytest.mark.parametrize(("command", "function", "what"), STOPS, ids=[each[0].split()[0] for each in STOPS])
def test_a_command_that_has_kept_nothing_says_so(
    command: str, function: str, what: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path / "run")
    class_folders(tmp_path / "images", 6)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(function, interrupted)
    status, _, err = run(*command.split())
    assert (status, err.splitlines()[-1]) == (
        130,
        f"moco: interrupted; no {what} yet: run the same command again to start",
    )


def test_moco_pack_leaves_no_shard_whose_creation_was_stopped(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class_folders(tmp_path / "images", 6)

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moco.data.shard_writer.tarfile.TarFile", stopped)
    assert run("pack", "data.root=images", "output=out", "workers=0")[0] == 130
    assert not list((tmp_path / "out").glob("*.tmp"))


@pytest.mark.slow
def test_moco_pack_keeps_the_finished_shards_and_resumes(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "images", 120)
    arguments = [f"data.root={root}", f"output={tmp_path / 'out'}", "shard_mb=0.012", "workers=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "moco.pack", *arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out" / PARTS).glob("train-*.npz")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the command ended before the signal")
    assert process.returncode == 143
    assert errors == f"moco: stopped by SIGTERM{KEPT}\n"
    assert not list((tmp_path / "out").glob("*.tmp"))
    packed(tmp_path / "out", root)
    expected = packed(tmp_path / "once", root)
    names = sorted(each.name for each in expected.glob("*.tar"))
    assert all((tmp_path / "out" / name).read_bytes() == (expected / name).read_bytes() for name in names)
    assert not multiprocessing.active_children()
