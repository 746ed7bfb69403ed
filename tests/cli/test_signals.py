"""A command that is stopped by a signal says how to continue."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moco.cli import run_command
from moco.config.knn import KnnConfig
from moco.config.pack import PackConfig
from tests.data.packed import class_folders, packed

RESUMES: list[tuple[str, type, str]] = [
    ("pack", PackConfig, "; finished shards are kept: run the same command again to resume"),
    ("knn", KnnConfig, ""),
]


def kill(number: int) -> Callable[[object], None]:
    def command(_: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(10)

    return command


@pytest.mark.parametrize(("name", "schema", "resume"), RESUMES)
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
    name: str,
    schema: type,
    resume: str,
    number: int,
    status: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [f"moco.{name}"])
    with pytest.raises(SystemExit) as caught:
        run_command(name, schema, kill(number))
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


@pytest.mark.slow
def test_moco_pack_keeps_the_finished_shards_and_resumes(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "images", 120)
    arguments = [f"data.root={root}", f"output={tmp_path / 'out'}", "shard_mb=0.012", "workers=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "moco.pack", *arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("train-*.tar")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the command ended before the signal")
    assert process.returncode == 143
    assert errors == "moco: stopped by SIGTERM; finished shards are kept: run the same command again to resume\n"
    assert not list((tmp_path / "out").glob("*.tmp"))
    packed(tmp_path / "out", root)
    expected = packed(tmp_path / "once", root)
    names = sorted(each.name for each in expected.glob("*.tar"))
    assert all((tmp_path / "out" / name).read_bytes() == (expected / name).read_bytes() for name in names)
    assert not multiprocessing.active_children()
