"""Training runs in real processes that tests can kill or stop.

To save the time of imports, the processes are forked from Python's fork server, which has imported everything. They run
the same code as `python -m moco.train`, with the same arguments.

MOCO_FAULTS=long python -m pytest tests/faults -m 'slow or not slow' runs the long form of every scenario, see
docs/reliability.md.
"""

import json
import multiprocessing
import os
import random
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

from moco.config import config_dir
from moco.digest import digest
from moco.runs import checkpoint
from moco.runs.checkpoint import Checkpoint

LONG = os.environ.get("MOCO_FAULTS") == "long"
REPOSITORY = Path(config_dir()).parent

# 40 steps of a few milliseconds; each is logged and saved. No evaluation.
TINY = [
    "epochs=2",
    "batch_size=64",
    "model.bn_group_size=16",
    "threads=1",
    "model.options.width=4",
    "model.head_hidden=1000",  # a checkpoint of a few megabytes takes as long to write as a step
    "model.dim=16",
    "method.queue_size=200",
    "optim.warmup_epochs=0.5",
    "evaluate.every_epochs=0",
    "checkpoint.every_steps=1",
    "log_every=1",
]
STEPS = 40

_started: list[ForkServerProcess] = []
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["moco.training.trainer", "moco.cli", "torch.utils.tensorboard", "sklearn.datasets"])


def _train(arguments: list[str], environment: dict[str, str], log: str, prepare: Callable[[], None] | None) -> None:
    """Run `python -m moco.train ARGUMENTS` in a child, with its output in a file."""
    from moco.cli import run_command
    from moco.config import TrainConfig
    from moco.train import train

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment, COLUMNS="200")
    if prepare is not None:
        prepare()
    sys.argv = ["train", *arguments]
    run_command("train", TrainConfig, train)


def start(
    run: Path, *arguments: str, world: int = 1, prepare: Callable[[], None] | None = None
) -> list[ForkServerProcess]:
    """Start a run on `world` processes; their output is appended to `run`.log (rank 0) and `run`.R.log (rank R)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
        log = run.with_name(f"{run.name}{f'.{rank}' * (rank > 0)}.log")
        given = ([*TINY, f"run='{run}'", *arguments], place if world > 1 else {}, str(log), prepare)
        processes.append(_server.Process(target=_train, args=given))
        processes[-1].start()
    _started.extend(processes)
    return processes


def wait(processes: list[ForkServerProcess], seconds: float = 600) -> list[int | None]:
    """Return the exit statuses; processes that are still running after that time are killed and count as None."""
    until = time.monotonic() + seconds
    statuses = []
    for each in processes:
        each.join(max(0.0, until - time.monotonic()))
        statuses.append(each.exitcode)
    kill(processes)
    return statuses


def kill(processes: list[ForkServerProcess]) -> None:
    for each in processes:
        each.kill()
    for each in processes:
        each.join()


def clean_up() -> None:
    """Kill what a failed test has left: the interpreter would wait for it."""
    kill(_started)
    _started.clear()


def to_the_end(run: Path, *arguments: str, world: int = 1) -> None:
    """Run the same command to its end."""
    assert wait(start(run, *arguments, world=world)) == [0] * world, output(run)


def output(run: Path) -> str:
    log = run.with_name(f"{run.name}.log")
    return log.read_text() if log.is_file() else ""


def saved(run: Path) -> int:
    """Return the step in the name of the newest checkpoint; 0: none."""
    return max((checkpoint.step_of(path) for path in checkpoint.list_checkpoints(run / "checkpoints")), default=0)


def until_saved(run: Path, step: int, processes: list[ForkServerProcess], seconds: float = 600) -> bool:
    """Wait for a checkpoint of that step or later; return False if a process ended before."""
    until = time.monotonic() + seconds
    while saved(run) < step:
        if any(each.exitcode is not None for each in processes):
            return False
        assert time.monotonic() < until, output(run)
        time.sleep(0.002)
    return True


def newest(run: Path) -> Checkpoint:
    found = checkpoint.load_newest(run / "checkpoints")
    assert found is not None
    return found


def records(run: Path) -> list[tuple[int, float]]:
    """Return (step, loss) of every record."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(each["step"], each["train/loss"]) for each in lines if "train/loss" in each]


def same_end(run: Path, reference: Path) -> None:
    """Assert that both runs have the same weights, queue and optimizer, bit for bit, and the same records."""
    one, other = newest(run), newest(reference)
    assert one["step"] == other["step"]
    for part in ("method", "optimizer"):
        assert digest(one[part]) == digest(other[part]), part
    assert records(run) == records(reference)


def close_end(run: Path, reference: Path, tolerance: float) -> float:
    """Assert that both runs have the same weights within a tolerance, and the same samples in the queue.

    Returns:
        The largest difference in any tensor, as a fraction of the tensor's largest value, or of 0.1.
    """
    one, other, furthest = newest(run)["method"], newest(reference)["method"], 0.0
    for name, value in other.items():
        if value.is_floating_point():
            distance = float((one[name] - value).abs().max() / value.abs().max().clamp(min=0.1))
            furthest = max(furthest, distance)
            assert distance < tolerance, (name, distance)
        else:
            assert torch.equal(one[name], value), name
    return furthest


def generator(seed: int) -> random.Random:
    return random.Random(seed)
