"""metrics.jsonl and TensorBoard's events."""

import json
import math
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from moco.config import RunWarning
from moco.files import WriteError
from moco.runs.metrics import MetricsLogger, read_metrics


def test_read_metrics_skips_invalid_lines(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_metrics(file) == {}
    file.write_text('{"step": 1, "a": 2}\n[1]\n{"step": 2, "a": "x"}\n{"step": 3, "a": null, "b": 1}\n{"step": 4, "a')
    metrics = read_metrics(file)
    assert metrics["b"] == ([3], [1])
    assert metrics["a"][0] == [1, 3]
    assert metrics["a"][1][0] == 2
    assert math.isnan(metrics["a"][1][1])


def test_records_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path, 0)
    for step in (1, 2, 3):
        logger.log(step, {"train/loss": float(step)})
    logger.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('5\nnull\n[1]\n{"step": null}\n{"step": "1"}\n{"step": 4, "tra')  # invalid; cut off by a kill
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n{"step": 1, "\xff')
    logger = MetricsLogger(tmp_path, 2)
    logger.log(3, {"train/loss": float("inf")})
    logger.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 2.0}, {"step": 3, "train/loss": None}]


def test_a_file_that_is_removed_during_a_run_is_written_again(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path, 0)
    logger.log(1, {"train/loss": 1.0})
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.warns(RunWarning, match=r"metrics\.jsonl was removed"):
        logger.log(2, {"train/loss": 2.0})
    logger.log(3, {"train/loss": 3.0})  # without a warning
    (tmp_path / "new").write_text('{"step": 1, "train/loss": 9.0}\n')
    (tmp_path / "new").replace(tmp_path / "metrics.jsonl")
    with pytest.warns(RunWarning, match=r"metrics\.jsonl was replaced"):
        logger.log(4, {"train/loss": 4.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == {"train/loss": ([1.0, 4.0], [9.0, 4.0])}
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.warns(RunWarning):
        logger.log(5, {"train/loss": 5.0})
    assert read_metrics(tmp_path / "metrics.jsonl")["train/loss"][0] == [1.0, 4.0, 5.0]
    logger.close()


def test_a_full_disk_is_reported_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    logger = MetricsLogger(tmp_path, 0)
    with pytest.raises(WriteError, match=r"metrics\.jsonl cannot be written \(No space left on device\)"):
        logger.log(1, {"train/loss": 1.0})
    with suppress(WriteError):
        logger.close()


def log_for(seconds: float, logger: MetricsLogger) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        logger.log(1, {"train/loss": 1.0})
        time.sleep(0.01)


def test_an_error_of_tensorboards_thread_is_raised_by_the_next_record_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    logger = MetricsLogger(tmp_path, 0)
    with monkeypatch.context() as patch:
        patch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
        with pytest.raises(WriteError, match="No space left on device"):
            log_for(20, logger)
        with suppress(WriteError):
            logger.close()
    assert "Traceback" not in capfd.readouterr().err


def test_a_histogram_in_tensorboard_has_its_counts_and_moments(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = MetricsLogger(tmp_path, 0)
    logger.log_histogram("similarity/positives", torch.tensor([3, 0, 0, 5]), 7)
    logger.close()
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


def test_tensorboard_gets_hyperparameters_and_no_measure_without_a_value(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    (tmp_path / "config.yaml").write_text(
        "epochs: 3\nrun: here\noptim: {lr: 0.06, clip_grad: null}\nmethod: {name: moco}\n"
    )
    logger = MetricsLogger(tmp_path, 0)
    logger.log(1, {"train/loss": math.nan, "analysis/key_drift": math.nan, "analysis/spread": 0.5})
    logger.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "analysis/spread"}
    shown = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    start = metadata.parse_session_start_info_plugin_data(shown)
    found = {name: value.number_value or value.string_value for name, value in start.hparams.items()}
    assert found == {"epochs": 3, "optim.lr": 0.06, "method.name": "moco"}
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_tensorboard_shows_the_configuration_and_one_chart_per_kind_of_accuracy(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("epochs: 3\n")
    MetricsLogger(tmp_path, 0).close()
    (file,) = tmp_path.glob("events.out.tfevents.*")
    content = file.read_bytes()
    assert b"    epochs: 3" in content
    assert b"accuracy/.*" in content
    assert b"retrieval/.*" in content
