"""A file's word neither downloads, creates nor fetches anything, and a bare file does not choose a folder (S1)."""

from pathlib import Path
from typing import Any

import pytest

from moco.config import ConfigError, DataConfig
from moco.data.recorded import in_run_directory, recorded_data


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("name", ["digits", "cifar10", "folder"])
def test_a_download_is_never_taken_from_a_file(name: str, trusted: bool) -> None:
    kept = recorded_data({"name": name, "root": "", "download": True}, {}, "x.pt", trusted)
    assert not DataConfig(**kept).download


@pytest.mark.parametrize(
    ("recorded", "given", "trusted", "fine"),
    [
        ({"name": "folder", "root": "/home"}, {}, False, False),
        ({"name": "folder", "root": "/home"}, {}, True, True),
        ({"name": "digits", "root": "data"}, {}, False, True),
        ({"name": "folder", "root": "/home"}, {"root": "/home"}, False, True),
        ({"name": "folder", "root": "/home"}, {"name": "digits"}, False, True),
        ({"name": "cifar10", "root": "/data", "download": True}, {}, False, False),
        ({"name": "huggingface", "root": "user/images"}, {}, True, False),
        ({"name": "huggingface", "root": "user/images"}, {"root": "user/images"}, True, True),
        ({"name": "huggingface", "root": "/tmp"}, {}, True, True),  # a local folder
        ({"name": "webdataset", "root": "https://host/a.tar"}, {}, True, False),
    ],
)
def test_which_images_are_used_without_being_named(
    recorded: dict[str, Any], given: dict[str, Any], trusted: bool, fine: bool
) -> None:
    if fine:
        assert "download" not in recorded_data(recorded, given, "x.pt", trusted)
        return
    with pytest.raises(ConfigError, match=rf"x.pt names .*data\.root={recorded['root']}.*add data\.root="):
        recorded_data(recorded, given, "x.pt", trusted)


def test_a_file_of_a_run_directory_is_known_by_the_configuration_above(tmp_path: Path) -> None:
    file = tmp_path / "run" / "finetune" / "all" / "encoder.safetensors"
    assert not in_run_directory(file)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 0\n")
    assert in_run_directory(file)
    assert in_run_directory(tmp_path / "run" / "checkpoints" / "step_1.pt")
