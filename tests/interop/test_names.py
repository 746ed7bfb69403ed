"""Names in the place of encoder files: of networks, and of repositories of the Hub that cannot be reached."""

import importlib
import logging
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file

import moco
from moco.config import ConfigError
from moco.interop.hub import WEIGHTS, local_file
from tests.interop.networks import IMAGES


def test_attempts_to_reach_the_hub_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    logger = importlib.import_module("huggingface_hub.utils._http").logger
    caplog.set_level(logging.WARNING, logger.name)
    monkeypatch.setattr(logger, "disabled", False)  # Hydra disables the loggers that a process has before it
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", records.append)
    monkeypatch.setattr(logger, "handlers", [handler])

    def download(*_: Any, **__: Any) -> None:
        for i in range(1, 6):
            logger.warning("'[Errno -2] unknown' thrown while requesting HEAD https://huggingface.co/x")
            logger.warning(f"Retrying in 1s [Retry {i}/5].")
        logger.warning("another message")
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ConfigError, match=r"checkpoint=hf://nobody/nothing: .*download it on another machine"):
        local_file("hf://nobody/nothing", "checkpoint")
    out = capfd.readouterr().out
    assert (out.count("\n"), out.count("trying again")) == (1, 1)
    assert [each.getMessage() for each in records] == ["another message"]
    logger.warning("Retrying in 1s")  # afterwards, the library's messages are as before
    assert records[-1].getMessage() == "Retrying in 1s"


@pytest.mark.parametrize(
    ("name", "field", "message"),
    [
        ("timm/resnet18", "checkpoint", r"checkpoint=hf://timm/resnet18\.\w+ backbone=timm/resnet18, which downloads"),
        ("timm/resnet18", "init_from", r"init_from=hf://timm/resnet18\.\w+ model\.backbone=timm/resnet18, which"),
        ("resnet18", "init_from", r"init_from=hf://timm/resnet18\.\w+ model\.backbone=timm/resnet18, which"),
        ("convnet", "checkpoint", "name a file with its weights$"),
        ("timm/resnet81", "checkpoint", "name a file with its weights$"),
    ],
)
def test_a_name_of_a_network_is_no_file(name: str, field: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}={name} is the name of a network: .*{message}"):
        local_file(name, field)


def test_a_file_with_the_name_of_a_network_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("resnet18").write_bytes(b"")
    for name in ("resnet18", "resnet18.pth", "timm.pt", "runs/resnet18"):
        assert local_file(name, "checkpoint") == Path(name)


def test_weights_of_timm_on_the_hub_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network: Any = timm.create_model("resnet18")
    save_file(network.state_dict(), tmp_path / WEIGHTS, {"format": "pt"})  # as timm writes them, with the classifier
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(tmp_path / WEIGHTS))
    encoder = moco.load_encoder("hf://timm/resnet18.a1_in1k", backbone="timm/resnet18")
    network.reset_classifier(0)
    assert torch.equal(encoder(IMAGES), network.eval()(IMAGES))
