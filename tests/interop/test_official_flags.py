"""The official flags: the configuration that they stand for, how processes start, and refusals."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moco.composition import field_types
from moco.config import TrainConfig
from moco.config.linear import LinearConfig
from moco.interop.official_flags import main

V2 = "-a resnet18 --lr 0.015 --batch-size 128 --mlp --moco-t 0.2 --aug-plus --cos --moco-k 4096 --epochs 100 -j 16"
NODE = "--multiprocessing-distributed --world-size 1 --rank 0 --dist-url tcp://localhost:10001"


def printed(capsys: pytest.CaptureFixture[str], script: str, line: str) -> list[str]:
    assert main(script, [*shlex.split(line), "--print-command"]) == 0
    return shlex.split(capsys.readouterr().out.removeprefix("next: "))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


@pytest.mark.usefixtures("gpus")
def test_the_flags_of_moco_v2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    words = printed(capsys, "main_moco", f"{V2} {NODE} {tmp_path}")
    assert words[:6] == ["torchrun", "--standalone", "--nproc-per-node", "4", "-m", "moco.train"]
    expected = "data=imagenet augment=moco_v2 optim=sgd_cosine model.backbone=resnet18 model.head_layers=2 epochs=100 "
    expected += "model.bn_group_size=32 method.queue_size=4096 method.temperature=0.2 optim.lr=0.015 batch_size=128"
    assert set(expected.split()) | {"data.workers=4", "precision=fp32"} <= set(words)


def test_without_flags_it_is_moco_v1_and_pretraining_needs_no_validation_images(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "train").mkdir()
    words = printed(capsys, "main_moco", f"{tmp_path} run=runs/mine")
    assert words[0] == "python"
    expected = {
        "augment=moco_v1",
        "optim=sgd_step",
        "optim.milestones=[120,160]",
        "model.head_layers=1",
        "method.temperature=0.07",
    }
    assert expected | {"data=folder", f"data.root={tmp_path}/train", "batch_size=256", "model.bn_group_size=32"} <= set(
        words
    )
    assert words[-1] == "run=runs/mine"


@pytest.mark.usefixtures("gpus")
def test_the_official_batch_is_that_of_a_node(capsys: pytest.CaptureFixture[str]) -> None:
    line = "--multiprocessing-distributed --world-size 2 --rank 1 --dist-url tcp://10.0.0.1:23456 /data"
    words = printed(capsys, "main_moco", line)
    assert " ".join(words).startswith("torchrun --nnodes 2 --node-rank 1 --master-addr 10.0.0.1 --master-port 23456 ")
    assert {"batch_size=512", "model.bn_group_size=64"} <= set(words)


def test_the_flags_of_main_lincls(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = printed(capsys, "main_lincls", f"-a resnet50 --pretrained a.pth.tar --gpu 2 {tmp_path}")
    assert words[:4] == ["CUDA_VISIBLE_DEVICES=2", "python", "-m", "moco.linear"]
    expected = {"checkpoint=a.pth.tar", "backbone=resnet50", "protocol=moco_v2", "official.lr=30.0", "epochs=100"}
    assert expected | {"official.milestones=[60,80]", "official.weight_decay=0.0"} <= set(words)
    for arch in ([], ["-a", "resnet18"]):  # without -a, the checkpoint names its network
        words = printed(capsys, "main_lincls", shlex.join([*arch, "--pretrained", str(tmp_path), "/data"]))
        assert f"run={tmp_path}" in words
        assert [each for each in words if "backbone=" in each] == [f"backbone={each}" for each in arch[1:]]


@pytest.mark.parametrize(
    ("script", "line", "named"),
    [
        ("main_moco", "--resume a.pth /data", "--resume a.pth"),
        ("main_moco", "--start-epoch 3 /data", "--start-epoch 3"),
        ("main_moco", "--world-size 2 --rank 0 /data", "--dist-url"),
        ("main_moco", "--world-size 2 --rank 2 --dist-url tcp://a:1 /data", "--rank 2"),
        ("main_moco", "-b 130 --multiprocessing-distributed /data", "--batch-size 130"),
        ("main_lincls", "/data", "--pretrained"),
        ("main_lincls", "--resume a.pth --pretrained b.pth /data", "--resume a.pth: moco.linear does not resume"),
        ("main_moco", "", "required: DIR\n"),
        ("main_lincls", "-e --pretrained a.pth /data", "--evaluate"),
    ],
)
@pytest.mark.usefixtures("gpus")
def test_refusals_name_the_flag(script: str, line: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(script, line.split())
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err.rpartition("error: ")[2]


def test_fields_may_stand_before_and_after_flags(capsys: pytest.CaptureFixture[str]) -> None:
    words = printed(capsys, "main_moco", "/data run=x -p 5 epochs=3 -j 6")
    assert words[-2:] == ["run=x", "epochs=3"]
    assert {"log_every=5", "data.workers=6"} <= set(words)
    assert "data.workers=7" in printed(capsys, "main_lincls", "-j 7 --pretrained a.pth /data")


def test_without_a_gpu_bn_groups_do_not_depend_on_the_number_of_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    nodes = "--multiprocessing-distributed --world-size 2 --rank 1 --dist-url tcp://a:1 /data --print-command"
    assert main("main_moco", nodes.split()) == 0
    assert {"model.bn_group_size=32", "batch_size=512"} <= set(capsys.readouterr().out.split())


def test_without_a_gpu_one_process_starts_and_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("main_moco", [*NODE.split(), "/data", "--print-command"]) == 0
    note, command = capsys.readouterr().out.splitlines()
    assert "no GPU: one process" in note
    assert command.startswith("next: python -m moco.train ")


def test_the_command_takes_the_place_of_the_script(tmp_path: Path) -> None:
    """So it gets the script's signals, and its exit status is the script's."""
    package = tmp_path / "moco"  # takes the place of the real one, too
    package.mkdir()
    (package / "__init__.py").touch()
    shown = "os.getpid(), os.environ['CUDA_VISIBLE_DEVICES'], *sys.argv[1:3]"
    (package / "train.py").write_text(f"import os, sys; print({shown}); sys.exit(7)")
    set_path = f"import os; os.environ['PYTHONPATH'] = {str(tmp_path)!r}"
    code = f"from moco.interop.official_flags import main; {set_path}; main('main_moco', ['/data', '--gpu', '0'])"
    process = subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 7
    assert output.splitlines()[-1] == f"{process.pid} 0 experiment=moco_v1_imagenet data=imagenet"


def test_the_overrides_are_fields_of_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for script, line, schema in (
        ("main_moco", "/data", TrainConfig),
        ("main_lincls", "--pretrained a /data", LinearConfig),
    ):
        groups = {"experiment", "data", "augment", "optim", "protocol"}
        fields = {word.partition("=")[0] for word in printed(capsys, script, line) if "=" in word}
        assert fields - groups <= set(field_types(schema))
