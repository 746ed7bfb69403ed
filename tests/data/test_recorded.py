"""A file's word neither downloads, creates nor fetches anything, and a bare file does not choose a folder (S1)."""

from typing import Any

import pytest

from moco.config import ConfigError, DataConfig
from moco.data.recorded import fields_to_repeat, recorded_data


@pytest.mark.parametrize("given", [{}, {"root": "https://host/a.tar"}, {"name": "webdataset", "root": "b.tar"}])
@pytest.mark.parametrize("trusted", [True, False])
def test_a_stream_is_refused_before_its_address_is_asked_for(given: dict[str, Any], trusted: bool) -> None:
    recorded = {"name": "webdataset", "root": "https://host/a.tar"}
    with pytest.raises(ConfigError, match=r"^data\.name=webdataset can be read from start to end only: set data"):
        recorded_data(recorded, given, "x.pt", trusted)
    assert recorded_data(recorded, {"name": "folder", "root": "IMAGES"}, "x.pt", trusted)


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("name", ["digits", "cifar10", "folder"])
def test_a_download_or_a_command_is_never_taken_from_a_file(name: str, trusted: bool) -> None:
    kept = recorded_data({"name": name, "root": "", "download": True, "allow_pipe": True}, {}, "x.pt", trusted)
    assert not DataConfig(**kept).download
    assert not DataConfig(**kept).allow_pipe


@pytest.mark.parametrize(("trusted", "eval_root"), [(True, "/test"), (False, "")])
def test_held_out_images_of_a_bare_file_are_used_only_if_named(trusted: bool, eval_root: str) -> None:
    recorded: dict[str, Any] = {"name": "folder", "root": "/train", "eval_root": "/test", "labels": "folder"}
    repeated = fields_to_repeat(recorded, trusted)
    assert repeated == ({} if trusted else {"root": "/train", "eval_root": "/test"})
    assert DataConfig(**recorded_data(recorded, repeated, "x.pt", trusted) | repeated) == DataConfig(**recorded)
    kept = DataConfig(**recorded_data(recorded, {"root": "/train"}, "x.pt", trusted))
    assert (kept.root, kept.eval_root, kept.labels) == ("/train", eval_root, "folder")
    with pytest.raises(ConfigError, match=r"to use them, add data\.root=/train data\.eval_root=/test; for"):
        recorded_data(recorded, {}, "x.pt", trusted=False)


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
    ],
)
def test_which_images_are_used_without_being_named(
    recorded: dict[str, Any], given: dict[str, Any], trusted: bool, fine: bool
) -> None:
    if fine:
        assert given or not fields_to_repeat(recorded, trusted)
        assert "download" not in recorded_data(recorded, given, "x.pt", trusted)
        return
    assert fields_to_repeat(recorded, trusted) == {"root": recorded["root"]}
    with pytest.raises(ConfigError, match=rf"x.pt names .*data\.root={recorded['root']}.*add data\.root="):
        recorded_data(recorded, given, "x.pt", trusted)
