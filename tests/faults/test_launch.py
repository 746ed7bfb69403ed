"""torchrun: a process is killed, a process receives a signal, one of two machines loses its network."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults import runs
from tests.faults.runs import LONG, REPOSITORY, TINY

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
Launch = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Return a function that starts a command with its output in `log`; its processes are killed at the end."""
    started = []

    def begin(log: str, *command: str, **environment: str) -> "subprocess.Popen[bytes]":
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        every = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PATH": path, "COLUMNS": "200"}
        every["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # as the scripts do
        with (tmp_path / log).open("ab") as file:
            process = subprocess.Popen(
                command, cwd=REPOSITORY, env=os.environ | every | environment, stdout=file, stderr=file
            )
        started.append(process)
        return process

    yield begin
    for process in started:
        for each in [*descendants(process.pid), process.pid] if process.poll() is None else []:
            os.kill(each, signal.SIGKILL)
        process.wait()


def descendants(pid: int) -> list[int]:
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        children += [int(each) for each in task.read_text().split()]
    return children + [each for child in children for each in descendants(child)]


def rank_of(pid: int) -> str:
    """RANK in a process's environment; "" without one."""
    given = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((each[5:].decode() for each in given if each.startswith(b"RANK=")), "")


def until(condition: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.01)


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_rank_was_killed(launch: Launch, tmp_path: Path) -> None:
    """SIGKILL rank 1, then rank 0, which holds the lock and writes."""
    run, log = tmp_path / "run", tmp_path / "log"
    command = [*TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "2", "-m", "moco.train", *TINY, f"run={run}"]
    torchrun = launch("log", *command)
    for rank, step in (("1", 8), ("0", 20)):
        until(lambda step=step: runs.saved(run) >= step, torchrun, log)  # type: ignore[misc]
        (victim,) = [each for each in descendants(torchrun.pid) if rank_of(each) == rank]
        os.kill(victim, signal.SIGKILL)
    assert torchrun.wait(900) == 0, log.read_text()
    assert log.read_text().count("resuming ") == 2
    runs.to_the_end(tmp_path / "reference", world=2)
    runs.same_end(run, tmp_path / "reference")


@pytest.mark.long
@pytest.mark.parametrize("more", [[], ["--standalone"]], ids=["static", "standalone"])
def test_a_restart_ignores_the_addresses_of_the_killed_processes(
    more: list[str], launch: Launch, tmp_path: Path
) -> None:
    """torchrun keeps its store for a restart, unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE is set, as the scripts do."""
    run, log = tmp_path / "run", tmp_path / "log"
    options = more or [f"--master-port={free_port()}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *options, "--nproc-per-node", "2", "--max-restarts", "1"]
    process = launch("log", *torchrun, "-m", "moco.train", *TINY, f"run={run}", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="0")
    until(lambda: runs.saved(run) >= 3, process, log)
    (victim,) = [each for each in descendants(process.pid) if rank_of(each) == "1"]
    os.kill(victim, signal.SIGKILL)
    assert process.wait(300) == 0, log.read_text()
    assert log.read_text().count("resuming ") == 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_a_stopped_run_is_not_restarted(launch: Launch, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    command = [*TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "3", "-m", "moco.train", *TINY, f"run={run}"]
    torchrun = launch("log", *command)
    until(lambda: runs.saved(run) >= 3, torchrun, log)
    (victim,) = [each for each in descendants(torchrun.pid) if rank_of(each) == "1"]
    os.kill(victim, signal.SIGTERM)
    assert torchrun.wait(300) != 0
    assert log.read_text().count("stopped by SIGTERM after step") == 1
    assert "resuming" not in log.read_text()
    runs.to_the_end(run, world=2)


# `python -m moco.train`; rank 1 sends itself SIGTERM when it begins to import torch.
SIGNAL_AT_IMPORT = """
import os, runpy, signal, sys

class Send:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGTERM)

if os.environ["RANK"] == "1":
    sys.meta_path.insert(0, Send())
runpy.run_module("moco.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.long
def test_a_run_stopped_during_imports_is_not_restarted(launch: Launch, tmp_path: Path) -> None:
    run, log, driver = tmp_path / "run", tmp_path / "log", tmp_path / "driver.py"
    driver.write_text(SIGNAL_AT_IMPORT)
    torchrun = launch(
        "log", *TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "3", str(driver), *TINY, f"run={run}"
    )
    assert torchrun.wait(300) != 0
    assert log.read_text().count("moco: stopped by SIGTERM before the first step") == 1, log.read_text()
    assert not run.exists()
    runs.to_the_end(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("optim.lr=abc", "moco: optim.lr=abc must be of type float"),
        ("optim.lr=1e30", "gave loss nan"),
    ][: 1 + LONG],
)
def test_a_run_that_cannot_succeed_is_not_restarted(wrong: str, sentence: str, launch: Launch, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    command = [*TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "3", "-m", "moco.train", *TINY, f"run={run}"]
    assert launch("log", *command, wrong).wait(300) != 0
    assert log.read_text().count(sentence) == (1 if "abc" in wrong else 2), log.read_text()  # otherwise by each rank


def host(number: int) -> str:
    return f"moco{os.getpid()}h{number}"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[None]:
    """Make two connected network namespaces: 10.77.0.1 and 10.77.0.2."""
    try:
        ip("netns", "add", host(1))
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("network namespaces need root and iproute2")
    try:
        ip("netns", "add", host(2))
        ip("link", "add", "cable", "netns", host(1), "type", "veth", "peer", "name", "cable", "netns", host(2))
        for number in (1, 2):
            ip("-n", host(number), "address", "add", f"10.77.0.{number}/24", "dev", "cable")
            ip("-n", host(number), "link", "set", "cable", "up")
            ip("-n", host(number), "link", "set", "lo", "up")
        yield
    finally:
        for number in (1, 2):
            subprocess.run(["ip", "netns", "delete", host(number)], check=False, capture_output=True)


@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="a minute and root: in the long form, MOCO_FAULTS=long")
def test_two_hosts_recover_from_a_lost_network_and_end_as_without_it(
    hosts: None, launch: Launch, tmp_path: Path
) -> None:
    """Use the script for several machines. Each side names the other within hang_after."""
    run = tmp_path / "run"
    script = [str(REPOSITORY / "scripts" / "train_multi_node.sh"), *TINY, f"run={run}", "hang_after=0.25", "epochs=4"]

    def start(number: int) -> "subprocess.Popen[bytes]":
        return launch(
            f"host{number}",
            *("ip", "netns", "exec", host(number), "bash", *script),
            NODES="2",
            NODE_RANK=str(number - 1),
            MASTER_ADDR="10.77.0.1",
            GPUS="1",
            RESTARTS="5",
            PET_LOCAL_ADDR=f"10.77.0.{number}",
            GLOO_SOCKET_IFNAME="cable",
        )

    torchruns = {number: start(number) for number in (1, 2)}
    until(lambda: runs.saved(run) >= 10, torchruns[1], tmp_path / "host1")
    ip("-n", host(2), "link", "set", "cable", "down")
    cut = runs.saved(run)
    until(lambda: "hang" in (tmp_path / "host1").read_text(), torchruns[1], tmp_path / "host1")
    time.sleep(5)
    ip("-n", host(2), "link", "set", "cable", "up")
    end, again = time.monotonic() + 900, 0
    while torchruns[1].poll() is None and time.monotonic() < end:
        for number, each in torchruns.items():
            if each.poll() not in (None, 0) and time.monotonic() < end:  # run it again
                torchruns[number], again = start(number), again + 1
        time.sleep(0.5)
    logs = [(tmp_path / f"host{number}").read_text() for number in (1, 2)]
    assert [each.wait(60) for each in torchruns.values()] == [0, 0], logs
    assert any(f"rank {other} hangs" in text and "silent for" in text for text in logs for other in (0, 1)), logs
    assert cut < runs.saved(run) == 80
    print(f"faults: cut off after step {cut}; torchrun was restarted {again} times")
    runs.to_the_end(tmp_path / "reference", "epochs=4", world=2)
    runs.same_end(run, tmp_path / "reference")
