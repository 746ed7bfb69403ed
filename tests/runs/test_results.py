"""results.json keeps every result; TensorBoard receives the metrics."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import moco
from moco.config import ConfigError
from moco.runs import results
from moco.runtime import console, provenance


def entry(top1: float) -> dict[str, Any]:
    return {
        "command": "knn",
        "protocol": "all labels",
        "encoder": "pretrained",
        "figures": {"top1": top1, "per_class": [1.0, None]},
    }


def test_results_accumulate_in_one_file_and_in_tensorboard(tmp_path: Path) -> None:
    results.record(tmp_path, [entry(50.0)], step=7)
    file = results.record(tmp_path, [entry(60.0), entry(70.0) | {"encoder": "untrained"}], step=7)
    written = json.loads(file.read_text())
    assert [each["figures"]["top1"] for each in written] == [50.0, 60.0, 70.0]
    for each in written:
        assert {"time", "moco", "commit", "torch", "machine", "processes"} <= each.keys()
    events = EventAccumulator(str(tmp_path)).Reload()
    points = events.Scalars("evaluation/knn_all labels/pretrained_top1")
    # Sorted: TensorBoard reads event files of one second in the order of their names, in which 10 precedes 9.
    assert sorted((point.step, point.value) for point in points) == [(7, 50.0), (7, 60.0)]


def test_a_damaged_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("[{")
    with pytest.raises(ConfigError, match=r"results\.json is damaged"):
        results.record(tmp_path, [entry(1.0)], step=0)
    assert (tmp_path / "results.json").read_text() == "[{"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written to"):
        results.record(tmp_path / "file" / "run", [entry(1.0)], step=0)


def test_prepare_refuses_what_record_could_not_write(tmp_path: Path) -> None:
    results.prepare(tmp_path / "new" / "run")
    assert (tmp_path / "new" / "run").is_dir()
    results.record(tmp_path, [entry(1.0)], step=0)
    results.prepare(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output=.* cannot be written to .*output=DIR"):
        results.prepare(tmp_path / "file" / "run")
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"results\.json is damaged \(not a list\)"):
        results.prepare(tmp_path)


def test_brackets_in_a_table_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console.table("of [a]", ["[b]"], [["[c] [/]"]], "[20] [i]")
    output = capsys.readouterr().out
    for text in ("of [a]", "[b]", "[c] [/]", "[20] [i]"):
        assert text in output


def test_the_commit_is_that_of_the_checkout_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "repository" / "moco"
    package.mkdir(parents=True)
    monkeypatch.setattr(moco, "__file__", str(package / "__init__.py"))
    assert provenance.commit() is None
    git = ["git", "-C", str(tmp_path / "repository"), "-c", "user.name=a", "-c", "user.email=a@b"]
    (package / "x").write_text("1")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert provenance.commit() == head[:12]
    (package / "x").write_text("2")
    assert provenance.commit() == f"{head[:12]}-dirty"


def test_percent() -> None:
    assert (console.percent(12.345), console.percent(12.345, 0.66), console.percent(None)) == (
        "12.3",
        "12.3 ± 0.7",
        "–",
    )
