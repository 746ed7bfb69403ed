"""The run directory: one run, one process, one configuration."""

import errno
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from moco.config import ConfigError, TrainConfig
from moco.files import WriteError
from moco.methods.moco_config import MoCoConfig
from moco.runs.directory import folder_message, in_run_directory, no_checkpoint_message, open_run
from moco.runs.metrics import MetricsLogger


def values(**changes: object) -> dict[str, object]:
    return asdict(TrainConfig(method=MoCoConfig())) | changes


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
        holder.kill()  # SIGKILL: the kernel releases the lock
        holder.communicate()
    open_run(tmp_path / "run", {"seed": 0}).close()


@pytest.mark.parametrize(("kind", "named"), [("file", "is a file"), ("link", "is a link whose target does not exist")])
def test_a_run_needs_a_directory(kind: str, named: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.touch() if kind == "file" else run.symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match=rf"run=.*{named}"):
        open_run(run, {"seed": 0})


def test_a_folder_of_a_run_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    assert no_checkpoint_message(tmp_path / "run" / "checkpoints").endswith(f"set run={tmp_path / 'run'}")
    assert no_checkpoint_message(tmp_path / "run" / "checkpoints", "compare").endswith(
        f"set 'compare=[{tmp_path / 'run'}]'"
    )
    (tmp_path / "My runs" / "checkpoints").mkdir(parents=True)
    message = no_checkpoint_message(tmp_path / "My runs" / "checkpoints")
    assert message.endswith(f"""set 'run="{tmp_path / "My runs"}"'""")
    assert str(tmp_path / "run") not in no_checkpoint_message(tmp_path / "other")


def test_a_folder_in_place_of_weights_is_answered_with_a_file_that_is_there(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    checkpoint, encoder = run / "checkpoints" / "step_00000001.pt", run / "encoder.safetensors"
    for file in (checkpoint, encoder):
        file.touch()
        for folder in (run, run / "checkpoints"):
            assert folder_message(folder, "init_from").endswith(f"is a folder: name a file, such as init_from={file}")
    assert folder_message(tmp_path, "init_from") == f"init_from={tmp_path} is a folder: name a file"
    (tmp_path / "model.safetensors").touch()
    assert folder_message(tmp_path, "x").endswith(f": name a file, x={tmp_path / 'model.safetensors'}")


def test_only_a_run_that_could_begin_gets_a_training_command(tmp_path: Path) -> None:
    message = no_checkpoint_message(tmp_path, "runs")
    assert message == f"runs={tmp_path} has no checkpoint: train it first, python -m moco.train run={tmp_path}"
    (tmp_path / "photo.jpg").touch()  # moco.train refuses this directory
    assert no_checkpoint_message(tmp_path) == f"run={tmp_path} holds no run of moco.train (no config.yaml): " + (
        "name the directory of a run"
    )


def test_a_renamed_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step_1 (1).pt").touch()
    assert "step_1 (1).pt: rename it to step_NUMBER.pt" in no_checkpoint_message(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"step_1 \(1\)\.pt: rename it to step_NUMBER\.pt.* to resume .* run=DIR"):
        open_run(tmp_path / "run", values(seed=0))


def test_a_run_without_checkpoint_does_not_block_the_directory(tmp_path: Path) -> None:
    open_run(tmp_path / "run", values(seed=0)).close()
    open_run(tmp_path / "run", values(seed=1)).close()
    pretend_checkpoint(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"seed \(there 1, now 2\)"):
        open_run(tmp_path / "run", values(seed=2))


def test_a_run_of_another_recipe_is_refused_with_its_name_and_three_fields(tmp_path: Path) -> None:
    made = {"recipe": "moco_v2_folder"} | dict.fromkeys("abcde", 0)
    open_run(tmp_path / "run", made).close()
    pretend_checkpoint(tmp_path / "run")
    with pytest.raises(ConfigError) as error:
        open_run(tmp_path / "run", {"recipe": "digits"} | dict.fromkeys("abcde", 1))
    sentence = str(error.value)
    assert sentence.startswith(f"run={tmp_path}/run was made with experiment=moco_v2_folder: a (there 0, now 1); b (")
    assert (
        "c (there 0, now 1); and 2 more fields. To resume it, add experiment=moco_v2_folder and the other fields"
        in sentence
    )
    open_run(tmp_path / "run", made | {"recipe": "copy_of_it"}).close()  # the name alone makes no difference


def test_a_finished_run_with_more_epochs_names_how_to_train_longer(tmp_path: Path) -> None:
    open_run(tmp_path / "run", values(epochs=2)).close()
    pretend_checkpoint(tmp_path / "run")
    with pytest.raises(ConfigError) as unfinished:
        open_run(tmp_path / "run", values(epochs=4))
    (tmp_path / "run" / "encoder.safetensors").touch()
    with pytest.raises(ConfigError) as finished:
        open_run(tmp_path / "run", values(epochs=4))
    longer = f" (to train longer, add init_from={tmp_path}/run/checkpoints/step_00000001.pt)"
    assert str(finished.value) == f"{unfinished.value}{longer}"


def test_a_run_that_has_steps_but_no_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    open_run(tmp_path / "run", values(seed=1)).close()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match=r"seed \(there 1, now 2\)"):
        open_run(tmp_path / "run", values(seed=2))
    open_run(tmp_path / "run", values(seed=1)).close()
    assert "has no checkpoint yet: run its command of moco.train again" in no_checkpoint_message(tmp_path / "run")


def test_a_field_newer_than_the_run_has_its_default_value(tmp_path: Path) -> None:
    older = values()
    del older["seed"]
    open_run(tmp_path / "run", older).close()
    pretend_checkpoint(tmp_path / "run")
    default = asdict(TrainConfig(method=MoCoConfig()))
    open_run(tmp_path / "run", values(seed=default["seed"]), default).close()
    with pytest.raises(ConfigError, match=r"seed \(there 0, now 2\)"):
        open_run(tmp_path / "run", values(seed=2), default)


def test_fields_that_do_not_affect_results_may_change(tmp_path: Path) -> None:
    open_run(tmp_path / "run", values()).close()
    pretend_checkpoint(tmp_path / "run")
    open_run(tmp_path / "run", values(threads=3, device="cpu", accumulate=2)).close()


def test_accumulate_may_change_only_with_grouped_bn(tmp_path: Path) -> None:
    plain = values(model=asdict(TrainConfig(method=MoCoConfig()).model) | {"bn": "batch"})
    open_run(tmp_path / "run", plain).close()
    pretend_checkpoint(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"accumulate \(there 1, now 2\)"):
        open_run(tmp_path / "run", plain | {"accumulate": 2})


@pytest.mark.parametrize("text", ["", "a: [1", "\x00"])
def test_a_damaged_config_is_reported_in_one_sentence(tmp_path: Path, text: str) -> None:
    open_run(tmp_path / "run", values()).close()
    pretend_checkpoint(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml is damaged: remove it"):
        open_run(tmp_path / "run", values())


def test_nobody_is_told_to_remove_a_damaged_config_whose_settings_no_checkpoint_holds(tmp_path: Path) -> None:
    open_run(tmp_path / "run", values()).close()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"config\.yaml is damaged: choose another directory"):
        open_run(tmp_path / "run", values())


def test_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("words")
    with pytest.raises(ConfigError, match="holds no run"):
        open_run(tmp_path, values())
    assert [each.name for each in tmp_path.iterdir()] == ["thesis.txt"]


def test_unfinished_checkpoints_are_removed(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step_00000001.pt.tmp").write_bytes(b"half")
    open_run(tmp_path / "run", values()).close()
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_an_unremovable_unfinished_checkpoint_is_reported_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step_00000001.pt.tmp").write_bytes(b"half")

    def read_only(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "unlink", read_only)  # a test that runs as root may write everywhere
    with pytest.raises(WriteError, match=r"run/checkpoints cannot be written \(Read-only file system\)"):
        open_run(tmp_path / "run", values())


def test_a_full_disk_is_reported_in_one_sentence_and_does_not_block_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    with monkeypatch.context() as patched:
        patched.setattr("moco.files.temporary_name", lambda _: tmp_path / "full")
        with pytest.raises(WriteError, match=r"config\.yaml cannot be written \(No space left on device\)"):
            open_run(tmp_path / "run", values())
    assert [each.name for each in (tmp_path / "run").iterdir()] == [".lock"]
    open_run(tmp_path / "run", values()).close()


@pytest.mark.parametrize("name", ["config.yaml.tmp", "config.yaml.0123abcd.tmp", "metrics.jsonl.0123abcd.tmp"])
def test_the_rest_of_a_killed_start_does_not_block_the_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("half")
    open_run(tmp_path, values()).close()
    assert sorted(each.name for each in tmp_path.iterdir()) == [".lock", "config.yaml"]


def test_a_file_lies_in_a_run_directory_if_a_folder_above_is_one(tmp_path: Path) -> None:
    """A config.yaml alone, such as that of another program in the folder of downloads, makes no run directory."""
    run = tmp_path / "runs" / "digits"
    files = [run / "encoder.safetensors", run / "checkpoints" / "step_1.pt", run / "finetune" / "all" / "encoder.pt"]
    assert not any(map(in_run_directory, files))
    with open_run(run, values()):
        (tmp_path / "config.yaml").write_text("theme: dark\n")
        assert not any(map(in_run_directory, files))
        MetricsLogger(run, 0).close()
        assert all(map(in_run_directory, files))
        assert not in_run_directory(tmp_path / "runs" / "encoder.safetensors")
