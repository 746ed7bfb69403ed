"""The run directory: one run, one process, one configuration."""

import errno
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from moco.config import ConfigError, TrainConfig
from moco.files import WriteError
from moco.runs.directory import Journal, open_run


def values(**changes: object) -> dict[str, object]:
    return asdict(TrainConfig()) | changes


def pretend_checkpoint(run: Path) -> None:
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step_00000001.pt").write_bytes(b"")


def test_two_processes_cannot_train_in_one_directory(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from moco.runs.directory import open_run;"
            "lock = open_run(Path(sys.argv[1]), {'seed': 0}); print('held', flush=True); sys.stdin.read()",
            str(tmp_path / "run"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(ConfigError, match=rf"is in use by process {holder.pid} on "):
            open_run(tmp_path / "run", {"seed": 0})
    finally:
        holder.kill()  # SIGKILL: the kernel takes the lock back
        holder.communicate()
    open_run(tmp_path / "run", {"seed": 0}).close()


def test_a_start_that_failed_before_its_first_checkpoint_does_not_block_the_directory(tmp_path: Path) -> None:
    open_run(tmp_path / "run", values(seed=0)).close()
    open_run(tmp_path / "run", values(seed=1)).close()
    pretend_checkpoint(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"seed \(there 1, now 2\)"):
        open_run(tmp_path / "run", values(seed=2))


def test_a_field_newer_than_the_run_had_its_default_value(tmp_path: Path) -> None:
    older = values()
    del older["seed"]
    open_run(tmp_path / "run", older).close()
    pretend_checkpoint(tmp_path / "run")
    usual = asdict(TrainConfig())
    open_run(tmp_path / "run", values(seed=usual["seed"]), usual).close()
    with pytest.raises(ConfigError, match=r"seed \(there 0, now 2\)"):
        open_run(tmp_path / "run", values(seed=2), usual)


def test_what_is_not_computed_may_change(tmp_path: Path) -> None:
    open_run(tmp_path / "run", values()).close()
    pretend_checkpoint(tmp_path / "run")
    open_run(tmp_path / "run", values(threads=3, device="cpu", accumulate=2)).close()


def test_micro_batches_may_change_only_where_bn_works_in_groups(tmp_path: Path) -> None:
    plain = values(model=asdict(TrainConfig().model) | {"bn": "batch"})
    open_run(tmp_path / "run", plain).close()
    pretend_checkpoint(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"accumulate \(there 1, now 2\)"):
        open_run(tmp_path / "run", plain | {"accumulate": 2})


@pytest.mark.parametrize("text", ["", "a: [1", "\x00"])
def test_a_damaged_config_is_one_sentence(tmp_path: Path, text: str) -> None:
    open_run(tmp_path / "run", values()).close()
    pretend_checkpoint(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml is damaged"):
        open_run(tmp_path / "run", values())


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("words")
    with pytest.raises(ConfigError, match="holds no run"):
        open_run(tmp_path, values())
    assert [each.name for each in tmp_path.iterdir()] == ["thesis.txt"]


def test_half_written_checkpoints_are_swept_up(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step_00000001.pt.tmp").write_bytes(b"half")
    open_run(tmp_path / "run", values()).close()
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_what_cannot_be_swept_up_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step_00000001.pt.tmp").write_bytes(b"half")

    def read_only(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "unlink", read_only)  # a test that runs as root may write everywhere
    with pytest.raises(WriteError, match=r"run/checkpoints cannot be written \(Read-only file system\)"):
        open_run(tmp_path / "run", values())


def test_the_journal_takes_back_what_comes_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0)
    for step in (1, 2, 3):
        journal.record(step, {"train/loss": float(step)})
    journal.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('5\nnull\n[1]\n{"step": null}\n{"step": "1"}\n{"step": 4, "tra')  # by hand; a kill within a line
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n{"step": 1, "\xff')
    journal = Journal(tmp_path, 2)
    journal.record(3, {"train/loss": float("inf")})
    journal.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 2.0}, {"step": 3, "train/loss": None}]


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    journal = Journal(tmp_path, 0)
    with pytest.raises(
        WriteError, match=r"metrics\.jsonl cannot be written \(No space left on device\): make room there"
    ):
        journal.record(1, {"train/loss": 1.0})
    with suppress(WriteError):
        journal.close()
    open_run(tmp_path / "run", values()).close()
    (tmp_path / "run" / "config.yaml.tmp").symlink_to("/dev/full")
    with pytest.raises(WriteError, match=r"config\.yaml cannot be written \(No space left on device\)"):
        open_run(tmp_path / "run", values())


def record_for(seconds: float, journal: Journal) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        journal.record(1, {"train/loss": 1.0})
        time.sleep(0.01)


def test_the_error_of_tensorboards_thread_is_raised_by_a_record_and_prints_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    journal = Journal(tmp_path, 0)
    with monkeypatch.context() as patch:
        patch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
        with pytest.raises(WriteError, match="No space left on device"):
            record_for(20, journal)
        with suppress(WriteError):
            journal.close()
    assert "Traceback" not in capfd.readouterr().err


def test_a_histogram_reaches_tensorboard_with_its_counts_and_moments(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    journal = Journal(tmp_path, 0)
    journal.histogram("similarity/positives", torch.tensor([3, 0, 0, 5]), 7)
    journal.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    events.Reload()
    (found,) = events.Histograms("similarity/positives")
    value = found.histogram_value
    assert found.step == 7
    assert (value.min, value.max, value.num) == (-1, 1, 8)
    assert value.bucket_limit == [-0.5, 0, 0.5, 1]  # the upper ends: TensorBoard's lower end is the limit before
    assert value.bucket == [3, 0, 0, 5]
    assert value.sum == pytest.approx(3 * -0.75 + 5 * 0.75)
    assert value.sum_squares == pytest.approx(8 * 0.75**2)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
