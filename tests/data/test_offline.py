"""Data sets on this machine are opened and read without a network connection (S1)."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moco.config import DataConfig
from moco.data.recorded import recorded_data
from moco.data.sources import load_source
from tests.data.packed import class_folders, packed


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let every network call fail, and the test with it, even if a library catches the error."""
    calls: list[str] = []
    for owner, name in (
        (socket.socket, "connect"),
        (socket.socket, "connect_ex"),
        (socket.socket, "sendto"),
        (socket, "create_connection"),
        (socket, "getaddrinfo"),
    ):

        def refuse(*arguments: Any, name: str = name, **_: Any) -> None:
            calls.append(f"{name}{arguments}")
            raise OSError(f"{name} was called")

        monkeypatch.setattr(owner, name, refuse)
    yield
    assert calls == []


def shards(folder: Path) -> DataConfig:
    return DataConfig(name="shards", root=str(packed(folder / "packed", class_folders(folder / "images"))))


def hugging_face(folder: Path) -> DataConfig:
    datasets = pytest.importorskip("datasets", reason="data=huggingface needs the extra `huggingface`")
    paths = [str(path) for path in sorted(class_folders(folder / "images").rglob("*.*"))]
    table = datasets.Dataset.from_dict({"image": paths}, features=datasets.Features({"image": datasets.Image()}))
    table.save_to_disk(str(folder / "saved"))
    return DataConfig(name="huggingface", root=str(folder / "saved"))


CONFIGS = {
    "digits": lambda folder: DataConfig(),
    "folder": lambda folder: DataConfig(name="folder", root=str(class_folders(folder)), labels="folder"),
    "shards": shards,
    "huggingface": hugging_face,
}


@pytest.mark.parametrize("recorded", [False, True], ids=["own", "recorded"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_local_images_are_read_without_network(kind: str, recorded: bool, tmp_path: Path) -> None:
    config = CONFIGS[kind](tmp_path)
    if recorded:  # a run directory holds the fields, and asks for a download
        config = DataConfig(**recorded_data(vars(config) | {"download": True}, {}, "run", trusted=True))
    train = load_source(config).train
    assert len(train) >= 12
    assert train.image(len(train) - 1).shape[0] == 3
