"""Every command that another command names as the next one runs, in the situation that printed it."""

import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moco.models.backbones import build_backbone
from moco.training import throughput
from scripts.canvases import write_canvases
from tests.data.images import gradient
from tests.docs.stand_ins import small, tree

# By situation: the command, and the modules of the next commands that it prints.
RARE = (
    *("choose", "choose, unlabeled", "hub", "hub, embed", "stream", "shards", "pack", "finetune", "transfer"),
    "transfer, few shots",
    *("linear, compared", "linear, published", "knn, few labels", "report, unlabeled", "report, not finished"),
)
SITUATIONS = {
    "labeled": ("train run=runs/labeled", ["linear", "report", "check_data"]),
    "unlabeled": ("train experiment=moco_v2_folder data.root=MANY run=runs/unlabeled", ["embed", "search", "report"]),
    "unreadable": (
        "train experiment=moco_v2_folder data.root=BAD data.on_bad_image=replace run=runs/bad",
        ["embed", "search", "report"],
    ),
    "knn": ("knn run=runs/labeled", ["knn", "linear", "tensorboard"]),
    "knn, few labels": ("knn run=runs/labeled labels_per_class=1 k=[1] temperature=[0.1]", ["linear", "tensorboard"]),
    "linear": ("linear run=runs/labeled", ["linear"]),
    "linear, compared": ("linear run=runs/labeled compare=[untrained]", ["linear"]),
    "linear, published": ("linear run=runs/labeled protocol=moco_v2_digits compare=[untrained]", ["linear"]),
    "finetune": ("finetune run=runs/labeled fraction=0.1 encoders=[pretrained]", ["knn"]),
    "finetune, elsewhere": (
        "finetune run=runs/labeled data=folder data.root=YOUR_IMAGES data.label_file=labels.csv output=x/l1 "
        "fraction=0.1 encoders=[pretrained]",
        ["knn"],
    ),
    "transfer": ("transfer run=runs/labeled", ["transfer"]),
    "transfer, few shots": ("transfer run=runs/labeled mode=few_shot", ["transfer"]),
    "report": ("report run=runs/labeled_too", ["tensorboard", "linear"]),
    "report, unlabeled": ("report run=runs/unlabeled_too projector=false", ["embed", "search"]),
    "report, not finished": ("report run=runs/stopped projector=false", []),
    "embed": ("embed run=runs/unlabeled output=features", ["search", "search"]),
    "search": ("search run=runs/unlabeled output=found sample=2", []),
    "choose": ("choose runs=[runs/labeled,runs/labeled_too] output=chosen", ["linear"]),
    "choose, unlabeled": ("choose runs=[runs/unlabeled,runs/unlabeled_too] output=chosen_too", ["embed"]),
    "pack": ("pack data.root=CROWD output=packed", ["train"]),
    "pack, few images": ("pack data.root=FEW output=packed_few", []),
    "shards": (
        "train experiment=moco_v2_folder data=shards data.root=PACKED run=runs/shards",
        ["embed", "search", "report"],
    ),
    "hub": (
        "train experiment=moco_v2_folder data=huggingface data.root=user/images run=runs/hub",
        ["embed", "search", "report"],
    ),
    "hub, embed": ("embed run=runs/hub data.root=user/images output=features_hub", ["search", "search"]),
    "stream": (
        "train experiment=moco_v2_folder data=webdataset data.root=PACKED/train-000000.tar data.length=99 run=runs/tar",
        ["embed", "search", "report"],
    ),
    "convert": ("convert run=runs/labeled to=safetensors output=a.safetensors", []),
    "segment": ("segment run=runs/unlabeled masks.root=CANVASES/train masks.eval_root=CANVASES/test", ["segment"]),
    "detect": (
        "detect run=runs/unlabeled boxes.root=CANVASES/train/images boxes.file=CANVASES/train/boxes.json "
        "boxes.hold_out=0.5 detector=retinanet",
        ["detect"],
    ),
    "check_data": ("check_data data.root=CROWD", ["train"]),
    "check_data, few images": ("check_data data.root=FEW", ["embed"]),
}
BEFORE = {"hub, embed": "hub"}  # the situation whose command makes the run


def hub_table(folder: Path, root: str) -> Any:
    """Return the images of a folder as the data set user/images of a hub."""
    assert root == "user/images"
    datasets = pytest.importorskip("datasets", reason="data=huggingface needs the extra `huggingface`")
    features = datasets.Features({"image": datasets.Image()})
    return datasets.Dataset.from_dict({"image": sorted(map(str, folder.iterdir()))}, features=features)


class Workplace:
    """A folder with images and runs, in which commands run in this process, small."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch

    def call(self, module: str, arguments: list[str]) -> int:
        self.patch.setattr(sys, "argv", [module, *arguments, *small(f"moco.{module}", tuple(arguments))])
        self.patch.delitem(sys.modules, f"moco.{module}", raising=False)  # runpy would warn
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # small settings raise warnings
                runpy.run_module(f"moco.{module}", run_name="__main__")
        except SystemExit as error:
            return int(error.code or 0)
        return 0


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    folder = tmp_path_factory.mktemp("next")
    for name, count in (("MANY", 140), ("FEW", 20), ("CROWD", 200), ("BAD", 140)):
        (folder / name).mkdir()
        for i in range(count):
            gradient(i).save(folder / name / f"{i:03}.jpg")
    write_canvases(folder / "CANVASES", 8, 3)
    (folder / "BAD" / "text.jpg").write_text("text")
    tree(folder / "YOUR_IMAGES", each=20, first=0)
    rows = [
        f"{path.relative_to(folder / 'YOUR_IMAGES')},{path.parent.name},{('train', 'test')[int(path.stem) % 2]}\n"
        for path in (folder / "YOUR_IMAGES").rglob("*.png")
    ]
    (folder / "labels.csv").write_text("".join(["path,label,split\n", *rows]))
    torch.save(build_backbone("resnet18", {}).state_dict(), folder / "FILE")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "60")  # narrow: a command must stay on its line
        patch.setattr(warnings, "formatwarning", warnings.formatwarning)
        patch.setattr("moco.data.hub._load", lambda root, _: {"train": hub_table(folder / "MANY", root)})
        patch.setattr(throughput, "step_flops", lambda *_: 1)
        patch.setattr(throughput, "matrix_rate", lambda *_: 1.0)
        made = Workplace(folder, patch)
        for run in ("labeled", "labeled_too"):
            assert made.call("train", [f"run=runs/{run}"]) == 0
        for run in ("unlabeled", "unlabeled_too"):
            assert made.call("train", ["experiment=moco_v2_folder", "data.root=MANY", f"run=runs/{run}"]) == 0
        assert made.call("train", ["run=runs/stopped", "stop_after=0.00001"]) == 75
        assert made.call("pack", ["data.root=MANY", "output=PACKED"]) == 0
        yield made


def next_commands(printed: str) -> list[list[str]]:
    """Return the words of each command after "next:", without the reason in parentheses."""
    return [shlex.split(re.sub(r"  \(.*\)$", "", line)) for line in re.findall(r"^next: (.*)$", printed, re.MULTILINE)]


@pytest.mark.parametrize(
    "situation", [pytest.param(each, marks=[pytest.mark.slow] if each in RARE else []) for each in SITUATIONS]
)
def test_the_next_commands_run(situation: str, workplace: Workplace, capfd: pytest.CaptureFixture[str]) -> None:
    if before := BEFORE.get(situation):
        module, *arguments = SITUATIONS[before][0].split()
        assert workplace.call(module, arguments) == 0, capfd.readouterr().err
        capfd.readouterr()
    (module, *arguments), expected = SITUATIONS[situation][0].split(), SITUATIONS[situation][1]
    assert workplace.call(module, arguments) == 0, capfd.readouterr().err
    found = next_commands(capfd.readouterr().out)
    assert [each[2].removeprefix("moco.") if each[0] == "python" else each[0] for each in found] == expected
    for words in found:
        if words[0] == "tensorboard":
            assert list(Path(words[2]).rglob("*tfevents*")) or list(Path(words[2]).rglob("projector_config.pbtxt"))
        else:
            assert words[:2] == ["python", "-m"]
            assert workplace.call(words[2].removeprefix("moco."), words[3:]) == 0, f"{words}\n{capfd.readouterr().err}"


def test_a_stopped_run_is_resumed_by_the_same_command(workplace: Workplace, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["run=runs/stopped_too", "stop_after=0.00001"]
    assert workplace.call("train", arguments) == 75
    printed = capfd.readouterr()
    assert "same command" in printed.err
    assert next_commands(printed.out) == []
    assert workplace.call("train", [*arguments, "stop_after=0"]) == 0
