"""Several encoders for one command: `encoders=[pretrained,untrained,FILE]`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moco.config import ConfigError, require
from moco.config.base import HUB
from moco.config.subject import EncoderConfig
from moco.digest import digest
from moco.evaluation.seen import log_labels
from moco.evaluation.subject import IMAGENET, open_encoder
from moco.interop.encoder_file import EncoderFile


def fields_of_encoder(name: str) -> dict[str, Any]:
    """Return the fields `run` and `checkpoint` of an encoder.

    Its `name` is a run directory, a file, or a name on the Hugging Face Hub.
    """
    is_run = not name.startswith(HUB) and Path(name).is_dir()
    return {"run": name if is_run else "", "checkpoint": "" if is_run else name}


def open_encoders(own: EncoderFile, names: Sequence[str], command: str) -> dict[str, EncoderFile]:
    """Read the encoder file of each entry of `encoders`; that of "pretrained" and of "untrained" is `own`.

    Raises:
        ConfigError: for a file that cannot be read, or an encoder whose images are not RGB: `command` reads RGB only.
    """
    found = dict[str, EncoderFile]()
    for name in names:
        try:
            known = name in ("pretrained", "untrained")
            file = own if known else open_encoder(EncoderConfig(**fields_of_encoder(name)))
        except (ValueError, FileNotFoundError) as error:
            raise ConfigError(f"encoders={name}: {error}") from error
        takes = f"takes images of {file.channels} channels, and {command} reads RGB only"
        require(file.channels == 3, f"encoders={name} {takes}: choose another encoder")
        found[name] = file
        if name != "untrained":
            log_labels(file)
    return found


def normalization(file: EncoderFile, mean: list[float] | None, std: list[float] | None) -> tuple[Any, Any]:
    """Return mean and standard deviation of the pixels: those given, else those of the file, else ImageNet's."""
    of_file = IMAGENET | file.images
    return mean or of_file["mean"], std or of_file["std"]


def folder_name(encoder: str) -> str:
    """Return a name for the folder of an entry of `encoders`, which may be a path."""
    return encoder if encoder in ("pretrained", "untrained") else f"{Path(encoder).name}_{digest(encoder)[:6]}"
