"""The scripts: their help, and what they refuse."""

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from moco.config import ConfigError
from scripts import results_table

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
COMMANDS = sorted(path.stem for path in SCRIPTS.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


def call(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> int:
    """Do what `python scripts/NAME.py ARGUMENTS` does, and return its exit status."""
    monkeypatch.setattr(sys, "argv", [f"scripts/{name}.py", *arguments])
    try:
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 0


@pytest.mark.parametrize("name", COMMANDS)
def test_no_script_ends_in_a_traceback(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, name, "--help") == 0
    assert f"scripts.{name}" in (out := capsys.readouterr().out) or f"{name}.py" in out
    assert call(monkeypatch, name, "--nonsense") == 2
    assert capsys.readouterr().err
    if name != "config_pages":  # it needs no argument
        assert call(monkeypatch, name) == 2
        assert capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["results_table", "runs"], "runs has no results: .* such as runs/b"),
        (["results_table", "gone"], "gone has no results"),
        (["results_table", "runs/b/results.json"], "runs/b/results.json is a file: name its directory, runs/b$"),
        (["results_table", "runs/b", "runs/a"], "runs/b has no results"),
        (["readme_figure", "runs/b", "out.png"], "runs/b has no views.png and no metrics.jsonl"),
        (["release_version", "v0.1.0"], "v0.1.0 must begin with refs/tags/"),
        (["readme_figure", "runs/done", "/dev/null"], r"/dev/null cannot be written \(a device or pipe, not a file\)"),
        (["sweep", "file/lr", "seed=0", "--", "experiment=digits"], r"file/lr cannot be written \(Not a directory\)"),
    ],
)
def test_unsuitable_arguments_are_refused_in_one_sentence(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "b").mkdir(parents=True)
    (tmp_path / "runs" / "b" / "results.json").write_text("[]")
    (tmp_path / "runs" / "done").mkdir()
    for name in ("file", "runs/done/views.png", "runs/done/metrics.jsonl", "runs/done/encoder.safetensors"):
        (tmp_path / name).touch()
    assert call(monkeypatch, *arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, line), line


@pytest.mark.parametrize("name", ["canvases", "scenes"])
def test_a_folder_that_cannot_be_written_is_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert call(monkeypatch, name, str(tmp_path / "file" / "new")) == 1
    assert re.fullmatch(rf"{name}: .*/new cannot be written \(Not a directory\): .*\n", capsys.readouterr().err)


def test_the_table_names_other_measures_and_states_what_its_interval_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [
        {"command": command, "protocol": "p", "encoder": "pretrained", "figures": figures}
        for command, figures in (
            ("finetune", {"top1": 50.0, "top1_half_width95": 2.0}),
            ("segment", {"mIoU": 31.24, "mIoU_half_width95": None}),
            ("detect", {"AP": None}),
        )
    ]
    (tmp_path / "results.json").write_text(json.dumps(entries))
    assert call(monkeypatch, "results_table", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert [row.split("|")[2].strip() for row in out.splitlines()[2:5]] == ["50.0 ± 2.0", "mIoU 31.2", "–"]
    assert "95 % interval over seeds" in out
    (tmp_path / "results.json").write_text("{")
    assert call(monkeypatch, "results_table", str(tmp_path)) == 1


def evaluated(run: Path, top1: float, **config: Any) -> str:
    """Write a run with a result of kNN and, with seed 0, one of the linear probe. Return its path."""
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "step_00000001.pt").touch()
    (run / "config.yaml").write_text(json.dumps({"seed": 0, "optim": {"lr": 0.1}, "run": str(run)} | config))
    result = {"protocol": "p", "encoder": "pretrained", "figures": {"top1": top1}}
    commands = ["knn"] if config.get("seed") else ["knn", "linear"]
    (run / "results.json").write_text(json.dumps([{"command": each, **result} for each in commands]))
    return str(run)


def test_the_table_of_several_runs_has_the_mean_over_their_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [evaluated(tmp_path / str(seed), 50.0 + 3 * seed, seed=seed) for seed in (0, 1, 2)]
    assert call(monkeypatch, "results_table", *runs) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows[:2] == ["| knn, p | 53.0 ± 3.0 |", "| linear, p | 50.0 (1 of 3 runs) |"]
    assert rows[3].endswith("over 3 runs, whose seeds are 0, 1, 2.")


def test_only_runs_that_differ_in_the_seed_have_a_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, same = evaluated(tmp_path / "a", 50.0), evaluated(tmp_path / "b", 50.0)
    other = evaluated(tmp_path / "c", 50.0, seed=1, optim={"lr": 0.2})
    for run, message in (
        (same, f"two runs have the seed of {same}: name runs with different seeds"),
        (other, f"{first} and {other} differ in more than the seed: optim.lr (there 0.1, now 0.2)"),
    ):
        assert call(monkeypatch, "results_table", first, run) == 1
        with pytest.raises(ConfigError, match=re.escape(message)):
            results_table.main([Path(first), Path(run)])
    (tmp_path / "b" / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"b has no config\.yaml"):
        results_table.main([Path(first), Path(same)])


def test_the_results_page_states_the_seeds_of_the_commands() -> None:
    """scripts/evaluate.sh sets the seeds of fine-tuning on a part of the labels, configs/finetune.yaml the others."""
    repository = SCRIPTS.parent
    script = (SCRIPTS / "evaluate.sh").read_text(encoding="utf-8")
    given = set(re.findall(r'seeds="\$\{SEEDS:-(\d+)\}"', script))
    (default,) = re.findall(
        r"^seeds: (\d+)$", (repository / "configs" / "finetune.yaml").read_text("utf-8"), re.MULTILINE
    )
    (without,) = [line for line in script.splitlines() if "fraction=1.0" in line]
    assert "seeds" not in without
    page = (repository / "docs" / "results.md").read_text(encoding="utf-8")
    section = page.partition("### One run evaluated in every way")[2].partition("\n### ")[0]
    assert re.findall(r"mean of (\d+) seeds \(of (\d+) seeds in the last\srow\)", section) == [(*given, default)]
    rows = re.findall(r"^\| fine-tuning, (1 %|10 %|all labels).*, (\d+) seeds \|", section, re.MULTILINE)
    assert rows == [("1 %", *given), ("10 %", *given), ("all labels", default)]
