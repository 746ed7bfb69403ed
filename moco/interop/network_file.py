"""Trained detectors and segmentation networks as safetensors files that describe themselves."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from moco.files import absent, cause
from moco.interop.encoder_file import EncoderFile, ForeignFileError, load_all
from moco.interop.weights import load_weights, save_weights
from moco.untrusted import parse_json


def save_network(
    path: Path, network: nn.Module, backbone: str, options: Mapping[str, object], about: Mapping[str, object]
) -> None:
    """Write a network with the name and options of its backbone, and `about`, whose values JSON can hold."""
    described = {**about, "backbone": backbone, "options": dict(options)}
    save_weights(path, network.state_dict(), {name: json.dumps(value) for name, value in described.items()})


def load_network(
    path: str | Path, kind: str, fields: Sequence[str], build: Callable[[EncoderFile, dict[str, Any]], nn.Module]
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network of a file, on the CPU and in eval mode, and what `save_network` stored with it.

    The second value is a dict: the requested `fields` of `about`, and the entries "backbone" and "options".

    Args:
        path: the file.
        kind: names the expected kind of file, for errors.
        fields: names of the entries of `about` that the file must hold.
        build: makes the network from an `EncoderFile` without weights, which names its backbone, and from `about`.

    Raises:
        FileNotFoundError: if the file does not exist.
        ForeignFileError: for a damaged file, or a file of another kind.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{file} {absent(file)}")
    try:
        texts, weights = load_weights(file)
        about = {name: parse_json(texts[name]) for name in (*fields, "backbone", "options")}
        encoder = EncoderFile(str(file), kind, str(about["backbone"]), dict(about["options"]), {})
        network = build(encoder, about)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ForeignFileError(f"{file} cannot be read as a {kind} ({cause(error)})") from error
    load_all(network, weights, f"{file} does not fit the {kind} that it describes")
    return network.eval().requires_grad_(False), about
