"""A run that receives a signal saves and exits; the same command then resumes it bit for bit."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

import moco
from moco import cli
from moco.composition import register, to_dataclass
from moco.config import ConfigError, TrainConfig, check, config_dir
from moco.data.decode import ImageError
from moco.digest import digest
from moco.distributed import PeerLost
from moco.evaluation.features import EvalTransform, Inference, stream
from moco.evaluation.knn_classifier import Accuracy
from moco.interop.encoder_file import read_encoder
from moco.runs import checkpoint
from moco.runs.checkpoint import Checkpoint, CheckpointError
from moco.runtime.errors import NonFiniteLoss
from moco.runtime.preemption import STOP_SIGNALS, Preempted
from moco.runtime.provenance import commit
from moco.training import live_evaluation as live
from moco.training import trainer
from moco.training.step import train_step
from moco.training.trainer import pretrain
from tests.evaluation.runs import write_images

REPOSITORY = Path(config_dir()).parent
SIGNALS = STOP_SIGNALS
# A run of 15 steps that takes seconds: it saves only after the last step and does not evaluate.
TINY = [
    "epochs=3",
    "batch_size=256",
    "threads=1",
    "model.options.width=4",
    "model.dim=16",
    "method.queue_size=300",
    "optim.warmup_epochs=0.5",
    "evaluate.draws=2",
    "evaluate.every_epochs=0",
    "checkpoint.every_epochs=0",
    "log_every=5",
]

DRIVER = """
import os, signal
from moco.cli import run_command
from moco.config import TrainConfig
from moco.training import trainer as pretrain
from moco.train import train

step, *names = os.environ["SIGNALS"].split()
steps, train_step = 0, pretrain.train_step

def signaled(*arguments, **options):
    global steps
    steps += 1
    if steps == int(step) and os.environ.get("RANK", "0") == os.environ.get("SIGNALED_RANK", "0"):
        for name in names:
            os.kill(os.getpid(), getattr(signal, name))
    return train_step(*arguments, **options)

pretrain.train_step = signaled
run_command("train", TrainConfig, train)
"""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Restore the signal handlers of this process."""
    before = [signal.getsignal(each) for each in SIGNALS]
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def config(run: Path, *overrides: str) -> TrainConfig:
    register("train", TrainConfig)
    with initialize_config_dir(config_dir(), version_base="1.3"):
        composed = compose("train", overrides=[*TINY, f"run={run}", *overrides])
    made = to_dataclass(composed, TrainConfig)
    check(made)
    return made


def send_in_step(monkeypatch: pytest.MonkeyPatch, step: int, *signals: signal.Signals) -> None:
    """Send signals in the `step`-th step from now, to loader processes first, as Slurm and Ctrl-C do."""
    count = 0

    def signaled(*arguments: Any, **options: Any) -> dict[str, torch.Tensor]:
        nonlocal count
        count += 1
        if count == step:
            for number in signals:
                processes = [*multiprocessing.active_children(), multiprocessing.current_process()]
                # Sent by another process: torch does not report a loader process that its parent ends.
                subprocess.run(["kill", f"-{int(number)}", *(str(each.pid) for each in processes)], check=True)
                time.sleep(0.2 * (len(processes) > 1))
        return train_step(*arguments, **options)

    monkeypatch.setattr(trainer, "train_step", signaled)


def newest(run: Path) -> Checkpoint:
    found = checkpoint.load_newest(run / "checkpoints")
    assert found is not None
    return found


def equal(one: Checkpoint, other: Checkpoint) -> bool:
    return all(digest(one[name]) == digest(other[name]) for name in ("method", "optimizer"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The final checkpoint of an uninterrupted run."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    pretrain(config(run))
    return newest(run)


OTHERS_LONG = [pytest.param(each, marks=[pytest.mark.long] * (each != signal.SIGTERM)) for each in SIGNALS]


@pytest.mark.parametrize("number", OTHERS_LONG)
def test_after_a_signal_the_step_is_saved_and_the_run_resumes_bit_for_bit(
    number: signal.Signals, uninterrupted: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        send_in_step(patch, 7, number)
        with pytest.raises(Preempted, match=rf"stopped by {number.name} after step 7 of 15") as stopped:
            pretrain(config(run))
    assert stopped.value.status == (130 if number == signal.SIGINT else 75)
    assert newest(run)["step"] == 7
    assert not (run / "encoder.safetensors").exists()
    pretrain(config(run))
    assert newest(run)["step"] == 15
    assert equal(newest(run), uninterrupted)


def test_the_time_limit_stops_each_attempt_and_may_change_between_them(
    uninterrupted: Checkpoint, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for attempt in (1, 2):  # the limit has passed before the first step: each attempt takes one step
        with pytest.raises(Preempted, match=rf"by the time limit stop_after after step {attempt} of 15") as stopped:
            pretrain(config(run, "stop_after=1e-6"))
        assert stopped.value.status == 75
    pretrain(config(run, "stop_after=60"))
    assert equal(newest(run), uninterrupted)


def test_a_signal_in_the_last_step_does_not_stop_the_run(
    uninterrupted: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_in_step(monkeypatch, 15, signal.SIGTERM)
    pretrain(config(tmp_path / "run"))
    assert equal(newest(tmp_path / "run"), uninterrupted)
    assert (tmp_path / "run" / "encoder.safetensors").exists()


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("number", OTHERS_LONG)
def test_the_step_ends_even_if_loader_processes_get_the_signal_too(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "images", {"cat": 40, "dog": 40})
    streamed = ["data=folder", f"data.root={tmp_path / 'images'}", "batch_size=16", "model.bn_group_size=8"]
    made = config(tmp_path / "run", *streamed, "method.queue_size=32", "data.workers=2", "epochs=4")
    send_in_step(monkeypatch, 3, number)
    with pytest.raises(Preempted, match="after step 3 of 20"):
        pretrain(made)
    assert newest(tmp_path / "run")["step"] == 3
    assert multiprocessing.active_children() == []


class Signaling:
    """A source that sends a signal to the process that reads it."""

    images = None

    def __init__(self, number: signal.Signals) -> None:
        self.number, self.parent = number, os.getpid()

    def __len__(self) -> int:
        return 4

    def image(self, i: int) -> torch.Tensor:
        assert os.getpid() != self.parent
        os.kill(os.getpid(), self.number)
        return torch.full((3, 4, 4), i, dtype=torch.uint8)


@pytest.mark.parametrize("number", SIGNALS)
def test_loader_processes_of_the_live_evaluation_ignore_signals(number: signal.Signals) -> None:
    source: Any = Signaling(number)
    parts = list(
        stream(torch.nn.Flatten(), source, range(4), EvalTransform(4), Inference(torch.device("cpu"), 2, workers=1))
    )
    features = torch.cat(parts)[:, 0] * 255
    torch.testing.assert_close(features, torch.arange(4.0))


def test_a_step_whose_checkpoint_is_due_is_saved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    real = checkpoint.Saver.save

    def count(saver: checkpoint.Saver, step: int, *arguments: Any) -> None:
        saved.append(step)
        real(saver, step, *arguments)

    monkeypatch.setattr(checkpoint.Saver, "save", count)
    send_in_step(monkeypatch, 4, signal.SIGUSR1)
    with pytest.raises(Preempted):
        pretrain(config(tmp_path / "run", "checkpoint.every_steps=2"))
    assert saved == [2, 4]


def test_a_full_disk_ends_the_run_and_it_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, real = tmp_path / "run", torch.save

    def full(what: Any, file: Any) -> None:
        if what["step"] > 4:
            raise OSError(28, "No space left on device")
        real(what, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(CheckpointError, match=r"no checkpoint could be written .*No space left on device"):
            pretrain(config(run, "checkpoint.every_steps=2"))
    assert newest(run)["step"] == 4
    assert sorted(each.name for each in (run / "checkpoints").iterdir()) == ["step_00000002.pt", "step_00000004.pt"]
    pretrain(config(run))
    assert newest(run)["step"] == 15


def test_a_full_disk_while_stopping_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    send_in_step(monkeypatch, 2, signal.SIGTERM)
    with pytest.raises(CheckpointError, match="No space left on device"):
        pretrain(config(tmp_path / "run"))


def test_a_checkpoint_states_the_versions_that_wrote_it(uninterrupted: Checkpoint) -> None:
    assert uninterrupted["versions"] == {"moco": moco.__version__, "torch": torch.__version__, "commit": commit()}
    assert all(isinstance(each, str | None) for each in uninterrupted["versions"].values())  # None: not in a checkout
    assert uninterrupted["world_size"] == 1


def test_the_checkpoint_with_the_best_live_knn_accuracy_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, scores = tmp_path / "run", iter([90.0, 40.0, 60.0, 50.0])  # before the first epoch, then after each
    monkeypatch.setattr(live, "live_knn", lambda *_, **__: {"knn": Accuracy(next(scores), 0.0, 1)})
    pretrain(config(run, "evaluate.every_epochs=1", "checkpoint.keep_best=true", "checkpoint.keep_last=1"))
    assert sorted(each.name for each in (run / "checkpoints").iterdir()) == ["best.pt", "step_00000015.pt"]
    best = checkpoint.load(run / "checkpoints" / "best.pt")
    assert best["step"] == 10
    assert newest(run)["step"] == 15
    encoder = read_encoder(run / "checkpoints" / "best.pt")
    assert encoder.step == 10


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["checkpoint.keep_best=true"], r"checkpoint\.keep_best=true .* evaluate\.every_epochs=0"),
        (["stop_after=-1"], r"stop_after=-1\.0"),
        (["stop_after=nan"], "stop_after=nan"),
    ],
)
def test_invalid_values_are_refused(overrides: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("status", "error", "final"),
    [
        (2, ConfigError("lr"), True),
        (1, ImageError("a.jpg"), True),
        (1, NonFiniteLoss("nan"), True),
        (1, CheckpointError("full"), False),  # space may be freed
        (1, PeerLost("gone"), False),
        (130, KeyboardInterrupt(), False),
    ],
)
def test_a_launcher_restarts_only_what_can_succeed(
    status: int, error: BaseException, final: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prevented: list[bool] = []
    monkeypatch.setattr(cli, "prevent_restart", lambda: prevented.append(True))
    with pytest.raises(SystemExit) as caught:
        cli._exit(status, "sentence", error)
    assert caught.value.code == status
    assert bool(prevented) == final


# ---- as processes ----


def start(
    folder: Path, signals: str, *arguments: str, launcher: tuple[str, ...] = ()
) -> "subprocess.CompletedProcess[str]":
    driver = folder / "driver.py"
    driver.write_text(DRIVER)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, sys.executable, str(driver), *TINY, *arguments],
        cwd=folder,
        env=environment | {"SIGNALS": signals, "SIGNALED_RANK": "1" if launcher else "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("signals", "status", "sentence"),
    [
        ("3 SIGTERM", 75, "moco: stopped by SIGTERM after step 3 of 15, which is saved"),
        pytest.param("3 SIGINT SIGINT", 130, "moco: interrupted", marks=pytest.mark.slow),
    ],
)
def test_the_exit_status_and_message_of_the_command(signals: str, status: int, sentence: str, tmp_path: Path) -> None:
    result = start(tmp_path, signals, "run=run")
    assert result.returncode == status, result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(sentence)
    saved = [path.name for path in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert saved == ([] if signals.count("SIGINT") == 2 else ["step_00000003.pt"])


@pytest.mark.long
def test_a_signal_to_one_of_two_processes_stops_both_together(tmp_path: Path) -> None:
    """Rank 1 gets it. Both exit with the status, although torchrun sends SIGTERM to the last one to exit."""
    keep_status = 'trap : TERM; "$@"; status=$?; echo $status > status_$RANK; exit $status'
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python")
    launcher = (sys.executable, *torchrun, "bash", "-c", keep_status, "bash")
    result = start(tmp_path, "6 SIGTERM", "run=stopped", launcher=launcher)
    assert [(tmp_path / f"status_{rank}").read_text() for rank in (0, 1)] == ["75\n", "75\n"], result.stderr
    assert "moco: stopped by SIGTERM after step 7 of 15" in result.stderr  # ranks agree one step later
    assert newest(tmp_path / "stopped")["step"] == 7
    assert newest(tmp_path / "stopped")["world_size"] == 2
    for run in ("stopped", "full"):
        result = start(tmp_path, "0", f"run={run}", launcher=launcher)
        assert result.returncode == 0, result.stderr
    one, other = (newest(tmp_path / run) for run in ("stopped", "full"))
    assert digest(one["optimizer"]) == digest(other["optimizer"])
    # Running statistics are averaged over ranks when they are saved, here once more often: they differ by rounding.
    for name, value in other["method"].items():
        if name.endswith(("running_mean", "running_var")):
            torch.testing.assert_close(one["method"][name], value, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(one["method"][name], value), name
