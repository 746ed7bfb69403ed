"""The run directory: one run, one process, one configuration."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from moco.config import ConfigError, TrainConfig
from moco.engine.run import Journal, open_run


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
            "import sys; from pathlib import Path; from moco.engine.run import open_run;"
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
    (tmp_path / "run" / "checkpoints" / "step_00000001.tmp").write_bytes(b"half")
    open_run(tmp_path / "run", values()).close()
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_the_journal_takes_back_what_comes_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0)
    for step in (1, 2, 3):
        journal.record(step, {"train/loss": float(step)})
    journal.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tra')  # a kill in the middle of a line
    journal = Journal(tmp_path, 2)
    journal.record(3, {"train/loss": float("inf")})
    journal.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 2.0}, {"step": 3, "train/loss": None}]
