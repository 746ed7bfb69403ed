"""The files of moco.linear: their names, and what states their settings."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

import moco.evaluation.linear as linear_module
from moco.config.linear import LinearConfig, check_linear
from moco.evaluation.linear_probe import load_head
from tests.evaluation.test_linear import encoder_file, official, on_folders, run, swept, write_images


def test_each_protocol_has_files_of_its_own(tmp_path: Path) -> None:
    config = official(tmp_path)
    run(config)
    names = {each.name for each in tmp_path.iterdir()}
    assert {f"linear_{config.protocol}.safetensors", f"confusion_linear_{config.protocol}.png"} <= names


def test_other_data_does_not_replace_the_classifier_of_the_runs_data(tmp_path: Path) -> None:
    config = swept(tmp_path / "run")
    images = write_images(tmp_path / "birds", {"a": 8, "b": 8})
    on_folders(config, images, write_images(tmp_path / "test", {"a": 4, "b": 4}, shade=1)).output = ""
    check_linear(config, 1)
    with contextlib.redirect_stdout(io.StringIO()):
        linear_module.evaluate_linear(config)
    written = {each.name for each in (tmp_path / "run").iterdir()}
    assert {"linear_on_birds.safetensors", "confusion_linear_on_birds.png"} <= written
    assert "linear.safetensors" not in written


@pytest.mark.parametrize("recorded", ["test", ""])
def test_other_held_out_images_do_not_replace_the_files_of_the_runs(recorded: str, tmp_path: Path) -> None:
    images = write_images(tmp_path / "birds", {"a": 8, "b": 8})
    tests = [write_images(tmp_path / name, {"a": 4, "b": 4}, shade) for shade, name in enumerate(("test", "other"), 1)]
    own = {"name": "folder", "root": str(images), "labels": "folder", "eval_root": recorded and str(tests[0])}
    config = LinearConfig(checkpoint=str(encoder_file(tmp_path / "run", own)), epochs=1)
    config.sweep.lrs, config.sweep.weight_decays = [0.1], [0.0]
    for test in tests:
        on_folders(config, images, test)
        check_linear(config, 1)
        with contextlib.redirect_stdout(io.StringIO()):
            linear_module.evaluate_linear(config)
    name = "linear" if recorded else "linear_on_test"
    written = {each.name for each in (tmp_path / "run").iterdir()}
    assert written >= {f"{name}.safetensors", f"confusion_{name}.png"}
    assert written >= {"linear_on_other.safetensors", "confusion_linear_on_other.png"}
    first, second = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [Path(each["saved"]).name for each in (first, second)] == [
        f"{name}.safetensors",
        "linear_on_other.safetensors",
    ]
    about = load_head(Path(second["saved"])).about
    assert about["data"]["eval_root"] == str(tests[1])
    assert about["settings"] | {"batch_size": second["settings"]["batch_size"]} == second["settings"]
    assert about["changed"] == {key: value for key, value in second["changed"].items() if key in about["changed"]}
    assert about["changed"]["epochs"] == 1


def test_the_highest_learning_rate_is_that_of_a_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seeds, name in ((1, "pretrained"), (2, "pretrained, seed 1")):
        config = swept(tmp_path, seeds=seeds)
        config.sweep.lrs, config.sweep.weight_decays = [1e-9, 0.1], [0.0]
        linear_module.evaluate_linear(config)
        assert re.search(rf"{name}: the best\s+learning\s+rate,\s+0.1,\s+is", capsys.readouterr().out)
