"""The commands: their functions, their refusals and what --multirun, --cfg and Ctrl-C do. Processes are not needed."""

import importlib
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from moco.__main__ import main as list_commands
from moco.__main__ import refuse
from moco.cli import Command, run_command
from moco.config import RunWarning, TrainConfig, config_dir
from moco.config.knn import KnnConfig
from moco.config.pack import PackConfig
from moco.config.search import SearchConfig
from moco.data.decode import ImageError, read_bytes
from tests.cli.conftest import Run

COMMANDS = sorted({path.stem for path in Path(config_dir()).glob("*.yaml")} - {"train"})


def command(name: str) -> Command[Any]:
    found = getattr(importlib.import_module(f"moco.{name}"), name)
    assert isinstance(found, Command)
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_names_a_function_that_takes_its_configuration(name: str) -> None:
    assert command(name).name == name
    module, _, function = command(name).work.partition(":")
    hints = get_type_hints(getattr(importlib.import_module(module), function))
    assert hints["config"] is command(name).schema


def test_the_commands_do_not_import_torch() -> None:
    modules = ", ".join(f"moco.{name}" for name in [*COMMANDS, "train"])
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_builder_does_not_import_the_compiler() -> None:
    """`import torch._dynamo` takes a second and 150 MiB."""
    code = "import sys, moco.builder; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("knn", ["k=[0]", "run=nowhere"], "k=[0]: 0 must be at least 1"),
        ("knn", ["k=5", "run=nowhere"], "k=5 must be a list: 'k=[5]'"),
        ("knn", ["k=5,6", "run=nowhere"], "k=5,6 is ambiguous: write a list as 'k=[5,6]'"),
        ("knn", ["half=maybe", "run=nowhere"], "half=maybe must be true or false"),
        ("knn", ["run=nowhere", "data=cifar10"], "run=nowhere does not exist"),
        ("knn", ["run=nowhere", "k=ü"], "k=ü must be a list"),
        ("knn", ["run=nowhere", "k=[5,6;]"], "k[1]='6;' must be an integer"),
        ("knn", ["run", "=", "nowhere"], "= cannot be read: write field=value, without spaces around the ="),
        (
            "knn",
            ["/"],
            "/ cannot be read: write field=value, without spaces around the =. A path needs its field",
        ),
        ("knn", ["run=null"], "run=null must be text: leave it out, or write 'run=\"null\"' for this text"),
        ("knn", ["run=[a,b]"], "run=[a,b] must be text: write 'run=\"[a,b]\"' for this text"),
        ("knn", ["run=x", "k=null"], "k=null must be a list"),
        ("knn", ["run=x", "images.mean=[1,[2],3]"], "images.mean[1]=[2] must be a number"),
        ("knn", ["run=x", "images=3"], "images=3 must hold named values: write images.size=VALUE"),
        ("knn", ["run=x", "data=null"], "data=null must be text"),
        ("knn", ["run=${nope}"], "run: Interpolation key 'nope' not found"),
        ("knn", ["checkpoint=https://host/a.pth"], "checkpoint=https://host/a.pth is an address: download the file"),
        ("knn", ["run=~nobody_has_this_name/x"], "run=~nobody_has_this_name/x: there is no user"),
        ("linear", ["run=x", "augment=3"], "augment=3 must hold named values: write +augment.NAME=VALUE"),
        ("knn", ["--multirun", "run=nowhere", "seed=1,2"], "--multirun has 2 jobs with run=nowhere: give"),
        ("finetune", ["run=x", "fraction=2"], "fraction=2.0 must be above 0 and at most 1"),
        ("finetune", ["run=x", "learning_rate=2"], "there is no field 'learning_rate'"),
        ("finetune", ["run=x", "+view.flip_p=2", "lr=0"], "lr=0.0 must be above 0"),
        (
            "train",
            ["experiment=moco_v2_small", "model=resnet50", "model.bn_group_size=32"],
            "model=resnet50 has model.backbone=resnet50, but the recipe moco_v2_small has model.backbone=resnet18: add",
        ),
        ("train", ["optim=adamw_cosine"], "optim=adamw_cosine has optim.lr=0.00015 optim.base_batch=256 "),
        ("finetune", ["run=x", "data=[]"], "data=[]: a group takes one name, data=NAME"),
        ("train", ["method=[moco,simclr]"], "method=[moco,simclr]: a group takes one name, method=NAME"),
        ("linear", ["run=x", "+protocol=[1,2]"], "+protocol=[1,2]: a group takes one name, protocol=NAME"),
        ("finetune", ["run=x", "data=cifar"], "there is no 'data/cifar'; did you mean 'cifar10'?"),
        ("linear", ["run=x", "protocol=moco_v4"], "there is no 'protocol/moco_v4'; did you mean 'moco_v2'?; "),
        ("search", ["index=out", "threshold=1.5"], "threshold=1.5 must be above -1 and at most 1, e.g. threshold=0.97"),
        ("embed", ["data=folder"], "no encoder: set run=DIR (a run of moco.train) or checkpoint=FILE"),
        ("report", ["run=nowhere", "perplexity=0.5"], "perplexity=0.5 must be at least 1"),
        ("report", ["run=nowhere"], "run=nowhere does not exist (in the folder"),
        ("transfer", ["run=x", "sets=[]"], "sets=[] must hold at least 1 value, e.g. 'sets=[pets,dtd,IMAGES]'"),
        (
            "transfer",
            ["run=x", "sets=[petz]"],
            "sets=petz is neither a folder nor a known data set: did you mean pets? use a folder or one of cifar10, ",
        ),
        ("transfer", ["run=x", "mode=svm"], "mode='svm' must be one of linear, few_shot, finetune"),
        ("transfer", ["run=x", "sets=[pets]", "data.hold_out=0.2"], "data.hold_out has no effect without"),
        (
            "report",
            ["run=x", "data.workers=0", "+experiment=digits"],
            "+experiment=digits: only moco.train has recipes",
        ),
        ("temperature", ["experiment=digits"], "there is no field 'experiment'; did you mean 'recipe'?"),
        # a file or folder that does not exist
        ("knn", ["checkpoint=nowhere.pt"], "checkpoint=nowhere.pt does not exist"),
        ("convert", ["checkpoint=nowhere.pt", "to=timm", "output=a.pth"], "checkpoint=nowhere.pt does not exist"),
        ("check_data", ["data.root=nowhere"], "data.root=nowhere "),
        ("train", ["experiment=moco_v2_small", "data.root=nowhere"], "data.root=nowhere "),
        ("train", ["init_from=nowhere.pt", "threads=1"], "init_from=nowhere.pt does not exist"),
        ("search", ["index=nowhere", "query=[a.png]"], "index=nowhere does not exist"),
        ("choose", ["runs=[nowhere]"], "runs: nowhere matches no directory"),
    ],
)
def test_a_refusal_is_one_line_with_status_2(
    name: str, arguments: list[str], error: str, run: Run, tmp_path: Path
) -> None:
    status, printed, errors = run(name, *arguments)
    assert (status, printed) == (2, "")
    (line,) = errors.splitlines()
    assert line.startswith(f"moco: {error}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        *[("WORLD_SIZE", each) for each in ("0", "-1", "", "two", "1.5")],
        *[("RANK", each) for each in ("-1", "one", "3")],
        *[("LOCAL_RANK", each) for each in ("-1", "one", "")],
        *[("MASTER_PORT", each) for each in ("-1", "port", "70000")],
    ],
)
def test_an_invalid_variable_of_a_launcher_is_refused(
    variable: str, value: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr("moco.cli.time.sleep", lambda seconds: None)
    status, _, errors = run("train", main=lambda: run_command("train", TrainConfig, print))
    assert status == 2
    assert f"the environment variable {variable}={value}" in errors.replace("'", "")


@pytest.mark.parametrize(("name", "schema", "resumes"), [("knn", KnnConfig, False), ("train", TrainConfig, True)])
def test_ctrl_c_mentions_the_same_command_only_if_it_resumes(name: str, schema: type, resumes: bool, run: Run) -> None:
    def interrupted(config: object) -> None:
        raise KeyboardInterrupt

    status, _, errors = run(name, "run=x", main=lambda: run_command(name, schema, interrupted))
    assert status == 130
    assert errors.startswith("moco: interrupted")
    assert ("run the same command again" in errors) == resumes


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (PermissionError(13, "Permission denied", "out/results.json"), "output=out/results.json: Permission denied"),
        (IsADirectoryError(21, "Is a directory", "out"), "output=out: Is a directory"),
        (FileNotFoundError(2, "No such file or directory", "out/x"), "output=out/x: No such file or directory"),
        (ValueError("a/b.png cannot be read"), "query=a/b.png cannot be read"),
        (ValueError("images/train has no images"), "data.root=images/train has no images"),
        (ValueError("images/f/x cannot be written"), "index=images/f/x cannot be written"),  # the longest match
        (ValueError("output=out is full"), "output=out is full"),
        (ValueError("outer: not a path of a field"), "outer: not a path of a field"),
        (ValueError("the network out of a/b.png"), "the network out of a/b.png"),
    ],
)
def test_an_error_that_begins_with_a_path_names_its_field(error: Exception, sentence: str, run: Run) -> None:
    def fails(config: object) -> None:
        raise error

    fields = ["output=out/", "query=[a/a.png,a/b.png]", "data.root=./images", "index=images/f", "split=the"]
    status, _, errors = run("search", *fields, main=lambda: run_command("search", SearchConfig, fails))
    assert status == 1
    assert errors.startswith(f"moco: {sentence} (")


@pytest.mark.parametrize(("local_rank", "count"), [("0", 1), ("1", 0)])
def test_a_warning_is_printed_once_per_machine(
    local_rank: str, count: int, run: Run, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", local_rank)):
        monkeypatch.setenv(name, value)

    def warns(config: object) -> None:
        warnings.warn("a setting is a mistake", RunWarning, stacklevel=2)

    assert run("search", main=lambda: run_command("search", SearchConfig, warns))[0] == 0
    assert len(recwarn) == count


def test_an_error_with_an_absolute_path_names_the_field_of_a_relative_one(run: Run) -> None:
    def fails(config: object) -> None:
        raise OSError(36, "File name too long", str(Path("out").absolute()))

    _, _, errors = run("search", "output=out", main=lambda: run_command("search", SearchConfig, fails))
    assert errors.startswith(f"moco: output={Path('out').absolute()}: File name too long (")


def test_a_preset_and_another_data_set_compose(run: Run) -> None:
    status, printed, errors = run("knn", "run=r", "preset=notebook", "data=cifar10", "data.root=there", "--cfg", "job")
    assert status == 0, errors
    composed = yaml.safe_load(printed)
    assert (composed["k"], composed["temperature"], composed["features"]) == ([200], [0.1], "projection")
    assert [composed["data"][name] for name in ("name", "root", "labels")] == ["cifar10", "there", None]


def test_without_a_data_group_the_fields_are_null(run: Run) -> None:
    _, printed, _ = run("finetune", "run=x", "--cfg", "job")
    assert set(yaml.safe_load(printed)["data"].values()) == {None, 0.0}


def test_help_shows_the_fields_and_the_groups(run: Run) -> None:
    status, printed, _ = run("embed", "--help")
    assert status == 0
    assert "on_bad_image: stop" in printed
    assert "data: cifar10, cifar100, digits, folder" in printed
    assert "docs/config/embed.md" in printed
    assert not re.search(r"^(protocol|preset|experiment|optim): ", printed, flags=re.MULTILINE)  # of other commands
    assert "protocol: moco_v1" in run("linear", "--help")[1]
    assert "experiment: canvases, cifar10_cpu" in run("train", "--help")[1]


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("train", "set data.on_bad_image=replace"),
        ("embed", "set on_bad_image=skip"),
        ("search", "set on_bad_image=skip"),
        ("knn", "set on_bad_image=skip"),
        ("pack", "python -m moco.check_data finds all"),
    ],
)
def test_an_unreadable_image_is_reported_with_what_works_in_this_command(name: str, fix: str, run: Run) -> None:
    def fails(config: object) -> None:
        raise ImageError("cannot read image a.jpg: the JPEG is truncated", "truncated", "the JPEG is truncated")

    schema: type = {"train": TrainConfig, "pack": PackConfig}.get(name, KnnConfig)
    status, _, errors = run(name, main=lambda: run_command(name, schema, fails))
    assert status == 1
    assert errors.startswith("moco: cannot read image a.jpg: the JPEG is truncated; ")
    assert fix in errors


@pytest.mark.parametrize(
    ("fails", "hint"), [(lambda config: read_bytes("gone.jpg"), False), (lambda config: int("one"), True)]
)
def test_a_traceback_is_offered_only_for_errors_that_moco_does_not_raise(
    fails: Callable[[object], None], hint: bool, run: Run
) -> None:
    status, _, errors = run("knn", main=lambda: run_command("knn", KnnConfig, fails))
    assert status == 1
    assert ("MOCO_TRACEBACK" in errors) == hint


def test_a_folder_of_runs_is_reported_with_the_runs_in_it(run: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "runs" / name / "checkpoints").mkdir(parents=True)
    for command in ("linear", "embed", "report"):
        status, _, errors = run(command, "run=runs")
        assert (status, "choose one of them, run=runs/a, run=runs/b" in errors) == (2, True), errors
    assert """'runs=["runs/*"]'""" in run("choose", "runs=[runs]")[2]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_package_lists_all_commands_with_lines_that_fit(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    list_commands()
    lines = capsys.readouterr().out.splitlines()
    listed = [words[2] for line in lines if (words := line.split())[:2] == ["python", "-m"]]
    assert sorted(listed) == sorted(f"moco.{name}" for name in [*COMMANDS, "train"])
    assert all(len(line) <= max(width, 84) for line in lines)
    assert "Rank the checkpoints of runs without labels" in " ".join(lines)


def test_a_command_after_the_list_is_refused_with_the_way_to_call_it() -> None:
    ended = subprocess.run([sys.executable, "-m", "moco", "trian"], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "argument trian: run python -m moco.train, or" in ended.stderr


def test_a_word_like_no_command_is_refused_with_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        refuse("?")
    assert "argument ?: run python -m moco for" in capsys.readouterr().err
