"""Encoders as graphs that run without this package: ONNX and torch.export, for any batch size.

The input is normalized images; their size, mean and std are stored in the file.
"""

import io
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moco.config.base import optional_module

Features = Callable[[Tensor], Tensor]  # images (N, C, S, S) to features (N, D)


def save_onnx(path: Path, backbone: nn.Module, images: Mapping[str, Any]) -> None:
    """Write a `.onnx` file with the input "images" (batch, C, S, S) and the output "features" (batch, D).

    Args:
        path: of the file.
        backbone: in eval mode, on the CPU.
        images: describes the input: "size" (S), "mean" and "std" (C values each), ... The file's metadata hold it as
            JSON, under the key "images".

    Raises:
        ConfigError: if a package is missing.
    """
    _onnxruntime()  # needed to check the file
    with warnings.catch_warnings(action="ignore"):  # about deprecated calls within the exporter
        program = torch.onnx.export(
            backbone,
            (_example(images),),
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props["images"] = json.dumps(dict(images))
    program.save(str(path))


def load_onnx(path: Path) -> Features:
    """Load a file with onnxruntime, on the CPU."""
    session = _onnxruntime().InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])


def save_exported(path: Path, backbone: nn.Module, images: Mapping[str, Any]) -> None:
    """Write a `.pt2` file with torch.export and store `images` in it as images.json; arguments as in `save_onnx`."""
    program = torch.export.export(
        backbone, (_example(images),), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
    )
    content = io.BytesIO()  # with a path, torch's writer aborts the process if the disk is full
    torch.export.save(program, content, extra_files={"images.json": json.dumps(dict(images))})
    path.write_bytes(content.getbuffer())


def load_exported(path: Path) -> tuple[Features, dict[str, Any]]:
    """Load a file with torch; return the network and its weights."""
    with warnings.catch_warnings(action="ignore"):  # torch 2.11: about buffers that are not writable
        program = torch.export.load(path)
    network = program.module()
    return lambda images: network(images), program.state_dict  # wrapped, because this module refuses eval()


def _onnxruntime() -> Any:
    optional_module("onnxscript", "to=onnx", "onnx")
    return optional_module("onnxruntime", "to=onnx", "onnx")


def _example(images: Mapping[str, Any]) -> Tensor:
    batch = 2  # the exporter would treat a batch size of 1 as a constant
    return torch.zeros(batch, len(images["mean"]), images["size"], images["size"])
