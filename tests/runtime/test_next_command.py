"""The next command has the settings of the current one, as the shell and Hydra read them."""

import shlex
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from moco.config import TrainConfig
from moco.config.data import DataConfig
from moco.config.knn import KnnConfig
from moco.config.quoting import quoted
from moco.config.subject import SubjectConfig
from moco.runtime.next_command import command, free_run, next_commands, stats_command


def read(line: str) -> dict[str, Any]:
    """The overrides of a command, as the shell and Hydra read them."""
    words = shlex.split(line)
    assert words[:2] == ["python", "-m"]
    found = [OverridesParser.create().parse_override(word) for word in words[3:]]
    return {("+" * bool(each.is_add())) + each.key_or_group: each.value() for each in found}


def test_defaults_and_fields_of_other_commands_are_left_out() -> None:
    assert command("moco.linear", KnnConfig(run="runs/digits", k=[7], half=True)) == (
        "python -m moco.linear run=runs/digits"
    )


def test_the_next_commands_repeat_the_images_that_the_command_line_names() -> None:
    stream = ("runs/tar", "webdataset", "https://host/a.tar")
    embed, search = next_commands(*stream, labeled=False)
    assert read(embed)["data.root"] == "YOUR_IMAGES"
    embed, search = next_commands(*stream, labeled=False, given={"name": "folder", "root": "my images"})
    assert read(embed) == {
        "run": "runs/tar",
        "data.name": "folder",
        "data.root": "my images",
        "output": "runs/tar/features",
    }
    assert read(search) == {"index": "runs/tar/features", "sample": 8}
    embed, search = next_commands("runs/hub", "folder", "IMAGES", False, given={"name": "huggingface", "root": "a/b"})
    assert (read(embed)["data.name"], read(embed)["data.root"]) == ("huggingface", "a/b")
    assert read(search)["data.root"] == "a/b"


def test_the_next_commands_compute_on_the_same_device_with_as_many_threads() -> None:
    compute = TrainConfig(device="cpu", threads=1)
    for labeled in (True, False):
        for line in next_commands("runs/a", "folder", "images", labeled, compute=compute):
            assert {"device": "cpu", "threads": 1}.items() <= read(line).items()


def test_only_commands_whose_output_is_missing_are_proposed(tmp_path: Path) -> None:
    def modules(step: int) -> list[str]:
        return [each.split()[2] for each in next_commands(str(tmp_path), "folder", "images", False, step=step)]

    features = tmp_path / "features"
    features.mkdir()
    assert modules(7) == ["moco.embed", "moco.search"]  # not complete: the command resumes
    (features / "features.npy").touch()
    (features / "features.json").write_text('{"encoder": {"step": 7}}')
    assert modules(7) == ["moco.search"]
    (features / "search").mkdir()
    (features / "search" / "nearest.json").touch()
    assert modules(7) == []
    embed, search = next_commands(str(tmp_path), "folder", "images", False, step=8)  # moco.embed refuses that folder
    assert (read(embed)["output"], read(search)["index"]) == (f"{features}_2", f"{features}_2")


def test_all_changed_fields_are_kept() -> None:
    config = SubjectConfig(checkpoint="a b/Bücher (1)=[x].pth", backbone="convnet", seed=3, device="cpu")
    config.options = {"width": 2, "stem": {"kind": "null", "on": True}}
    config.data.name, config.data.root, config.data.hold_out = "folder", "it's \\", 0.2
    config.data.download, config.images.std = False, [0.5, 1e-7, 2.0]
    line = command("moco.knn", config, k=[20], compare=["untrained", "pixels"])
    assert read(line) == {
        "checkpoint": "a b/Bücher (1)=[x].pth",
        "backbone": "convnet",
        "seed": 3,
        "device": "cpu",
        "+options.width": 2,
        "+options.stem.kind": "null",
        "+options.stem.on": True,
        "data.name": "folder",
        "data.root": "it's \\",
        "data.hold_out": 0.2,
        "data.download": False,
        "images.std": [0.5, 1e-7, 2.0],
        "k": [20],
        "compare": ["untrained", "pixels"],
    }


def test_the_command_for_mean_and_std_names_the_images() -> None:
    videos = DataConfig("video", "my clips", labels="folder", channels=3, dtype="float32")
    given: dict[str, Any] = {"data": "video", "data.root": "my clips", "data.labels": "folder", "data.dtype": "float32"}
    assert read(stats_command(videos)) == given | {"stats": True}
    shards = DataConfig("shards", "packed", channels=4, dtype="uint16", bits=None, labels="folder")
    given = {"data.root": "YOUR_IMAGES", "data.channels": 4, "data.dtype": "uint16"}
    assert read(stats_command(shards)) == given | {"stats": True}


def test_the_next_run_directory_is_free(tmp_path: Path) -> None:
    first = str(tmp_path / "mine")
    for expected in (first, f"{first}_2", f"{first}_3"):
        assert free_run(first) == expected
        Path(expected).mkdir()


def test_changes_replace_fields_and_defaults_are_left_out() -> None:
    config = SubjectConfig(run="run", seed=4, output="there")
    assert read(command("moco.knn", config, run="", checkpoint="file", seed=0)) == {
        "checkpoint": "file",
        "output": "there",
    }


@pytest.mark.parametrize("text", ["", "007", "true", 'a"b', 'a\\"b', "a\\\\", "~/x", "a,b", "{x", "a b "])
def test_quoted_text_is_read_unchanged(text: str) -> None:
    assert OverridesParser.create().parse_override(f"a={quoted(text)}").value() == text
