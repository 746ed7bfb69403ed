"""Failures of loader processes (killed, stopped, no shared memory) become one-sentence errors."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moco.config import DataConfig, config_dir
from moco.data.loader import batches
from moco.data.plan import Plan
from moco.data.sources import Source, load_source
from moco.data.view import View
from moco.data.workers import LoaderError, count_processes, in_order, loaded, make_loader, start_worker
from moco.evaluation.features import EvalTransform, Inference, extract, stream
from moco.runtime.preemption import STOP_SIGNALS
from tests.data.unreadable_files import folder

CPU = torch.device("cpu")
PLAN, VIEWS = Plan(40, 4, 100, seed=0), (View(8, (0.2, 1.0)),) * 2
DIED = (
    r"^a loader process died \(Killed\), most likely because memory ran out: lower {}=1 .*run the same command again$"
)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return load_source(DataConfig("folder", str(folder(tmp_path / "images", good=40, unreadable=False)))).train


def kill_worker() -> None:
    """Kill a loader process, as the kernel does when memory runs out, and wait for the error."""
    (process,) = multiprocessing.active_children()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    for _ in range(1000):  # the handler runs between two of these
        time.sleep(0.01)
    raise AssertionError("no error was raised")


def test_a_death_is_reported_between_two_training_batches(source: Source) -> None:
    made = batches(source, PLAN, VIEWS, CPU, workers=1)
    next(made)
    with pytest.raises(LoaderError, match=DIED.format("data.workers")):
        kill_worker()
    made.close()
    assert multiprocessing.active_children() == []


def test_a_death_is_reported_in_an_evaluation(source: Source) -> None:
    def network(images: Tensor) -> Tensor:
        kill_worker()
        return images

    with pytest.raises(LoaderError, match=DIED.format("data.workers")):
        extract(network, source, EvalTransform(8), Inference(CPU, 4, workers=1))
    features = stream(lambda images: images, source, range(40), EvalTransform(8), Inference(CPU, 4, workers=1))
    next(features)
    with pytest.raises(LoaderError, match=DIED.format("data.workers")):
        kill_worker()
    del features
    assert multiprocessing.active_children() == []


def test_a_death_is_reported_in_packing() -> None:
    with pytest.raises(LoaderError, match=DIED.format("workers")):  # while the parent waits
        list(in_order(lambda _: os.kill(os.getpid(), signal.SIGKILL), range(40), 1, "workers"))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", r"died \(unknown cause\), most likely because mem"),
        ("DataLoader worker (pid 7) is killed by signal: Terminated. ", r"died \(Terminated\): lower data\.workers=1"),
        (
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is",
            r"shared memory .*: make /dev/shm larger.* data\.workers=0",
        ),
        ("Too many open files. Communication with the workers", r"raise ulimit -n, or lower data\.workers=1"),
    ],
)
def test_errors_of_torch_become_loader_errors(message: str, expected: str) -> None:
    with pytest.raises(LoaderError, match=expected) as caught:
        list(loaded(Fails(message), "data.workers"))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match=r"^the size of tensor a"):
        list(loaded(Fails("the size of tensor a"), "data.workers"))  # type: ignore[arg-type]


def test_full_shared_memory_names_the_field_of_the_command() -> None:
    with pytest.raises(LoaderError, match=r"or set masks\.workers=0, which"):
        list(loaded(Fails("DataLoader worker (pid 7) is killed by signal: Bus error. "), "masks.workers"))  # type: ignore[arg-type]


class Fails:
    """A loader that raises an error with the given message."""

    def __init__(self, message: str) -> None:
        self.message, self.num_workers = message, 1

    def __iter__(self) -> "Fails":
        return self

    def __next__(self) -> None:
        raise RuntimeError(self.message)


def _stopped_at_its_start(worker: int) -> None:
    """A stop that reaches all processes comes before this one ignores it."""
    for number in STOP_SIGNALS:
        os.kill(os.getpid(), number)
    start_worker(worker)


def test_a_stop_that_reaches_all_processes_ends_no_loader() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    loader = make_loader(range(4), 1, worker_init_fn=_stopped_at_its_start)
    assert list(loaded(loader, "data.workers")) == [0, 1, 2, 3]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_a_worker_ends_if_its_parent_is_killed_while_results_are_unread() -> None:
    code = (
        "import numpy, os, signal, time\n"
        "from moco.data.workers import make_loader\n"
        "items = iter(make_loader([numpy.zeros(10**6)] * 100, 1))\n"
        "next(items); time.sleep(1)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # This also waits for the worker, which holds the output.
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL


def _full(self: Tensor) -> Tensor:
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def test_missing_shared_memory_is_reported_in_one_sentence(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "share_memory_", _full)  # in the processes too, which are forked
    words = r"has no shared memory for a batch of 0\.0 MB \(unable .*docker run --shm-size=8g.* data\.workers=0"
    with pytest.raises(LoaderError, match=words):
        next(batches(source, PLAN, VIEWS, CPU, workers=1))
    with pytest.raises(LoaderError, match=words):
        extract(torch.nn.Flatten(), source, EvalTransform(8), Inference(CPU, 4, workers=1))
    assert multiprocessing.active_children() == []
    assert len(next(batches(source, PLAN, VIEWS, CPU, workers=0)).index) == 4


SCRIPT = """
import sys, torch
from moco.config import DataConfig
from moco.data.loader import batches
from moco.data.plan import Plan
from moco.data.sources import load_source
from moco.data.view import View
source, view = load_source(DataConfig("folder", sys.argv[1])).train, View(96, (0.2, 1.0))
held = batches(source, Plan(40, 40, 9, 0), (view,), torch.device("cpu"), 2)
next(held)
"""
_unshare = shutil.which("unshare")
_may = (
    _unshare is not None and subprocess.run([_unshare, "-m", "true"], capture_output=True, check=False).returncode == 0
)


@pytest.mark.slow
@pytest.mark.skipif(not _may, reason="a separate /dev/shm needs root and unshare")
def test_a_small_dev_shm_in_a_separate_process(source: Source, tmp_path: Path) -> None:
    """1 MB for batches of 1.1 MB. The process ends although a variable holds the loader until its exit."""
    small = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    assert _unshare is not None
    done = subprocess.run(
        [_unshare, "-m", "sh", "-c", small, "sh", sys.executable, "-c", SCRIPT, str(tmp_path / "images")],
        env=os.environ | {"PYTHONPATH": str(Path(config_dir()).parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "LoaderError: a loader process has no shared memory for a batch of 1.1 MB" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("cores", "ranks", "expected"),
    [(1, None, 1), (16, None, 16), (16, "8", 2), (112, "8", 14), (4, "8", 1), (256, "1", 16)],
)
def test_the_default_number_of_processes_divides_the_cores_among_the_ranks(
    cores: int, ranks: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert count_processes(None) == expected
    assert count_processes(0) == 0
    assert count_processes(40) == 40
