"""Read a file of torch.save: tensors and plain values only, no code. The size of the file limits the memory used."""

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moco.files import cause
from moco.untrusted import refuse_special_file, values_of

_ZIP = b"PK\x03\x04"
_LARGEST_RATIO = 4  # of the bytes of all tensors to the size of the file; above 1, because tensors can share bytes


class CheckpointError(ValueError):
    """A checkpoint cannot be used or written; the message is one sentence."""


class CodeRefused(CheckpointError):
    """Raised if torch refuses to unpickle a file, for example because it holds code.

    Also raised if the file is an archive of another kind than torch.save's, for example a program of TorchScript.
    """


class _Settings:
    """Takes the place of argparse's settings, which DINO and SupContrast save beside their weights; keeps no values."""

    def __setstate__(self, state: Any) -> None:
        pass


def read_weights(path: Path) -> Any:
    """Return the content of a file of torch.save, on the CPU.

    Raises:
        CodeRefused: if torch refuses to unpickle the file, or if it is an archive of another kind. Torch refuses code,
            which is not run, and most files that torch.save did not write.
        CheckpointError: for any other file that cannot be read: missing, damaged or no regular file; and for content
            beyond the limits of size or depth.
    """
    try:
        size = refuse_special_file(path)
        _refuse_other_archive(path, size)
        with (
            warnings.catch_warnings(action="ignore"),  # about pickle protocols other than torch's default
            torch.serialization.safe_globals([(_Settings, "argparse.Namespace")]),
        ):
            content = torch.load(path, map_location="cpu", weights_only=True)
        _refuse_large_tensors(content, size)
    except CodeRefused:
        raise
    except (LookupError, EOFError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: it is damaged") from error
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}") from error
    except pickle.UnpicklingError as error:
        raise CodeRefused(f"{path} cannot be read as a checkpoint ({type(error).__name__})") from error
    except Exception as error:  # torch raises many types of error for a damaged file
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {cause(error)}") from error
    return content


def _refuse_other_archive(path: Path, size: int) -> None:
    """Refuse an archive that torch.save did not write: a program of torch.export or TorchScript, or compressed data."""
    with path.open("rb") as file:
        begins_as_zip = file.read(len(_ZIP)) == _ZIP
    if not zipfile.is_zipfile(path):
        if begins_as_zip:
            # Torch might find a zip directory where Python finds none.
            raise ValueError("it is truncated or damaged (its zip directory is missing)")
        return
    with zipfile.ZipFile(path) as parts:
        names = {each.rpartition("/")[2] for each in parts.namelist()}
        unpacked = sum(each.file_size for each in parts.infolist())
    if "data.pkl" not in names or "constants.pkl" in names:  # the latter is in programs of TorchScript
        raise CodeRefused(f"{path} cannot be read as a checkpoint: it is an archive of another kind")
    if unpacked > size:
        raise ValueError(f"it would unpack to {unpacked:,} bytes, more than its size; it was not written by torch")


def _refuse_large_tensors(content: Any, size: int) -> None:
    """Refuse tensors with more elements than the file holds: with stride 0, a few bytes are enough for any shape.

    Whatever is computed from such a tensor, such as its digest, would take memory for the whole shape.
    """
    total = 0
    for each in values_of(content):
        if not isinstance(each, Tensor) or each.layout != torch.strided:  # torch.load checks sparse indices
            continue
        bytes_ = each.numel() * each.element_size()
        if each.is_meta or bytes_ > each.untyped_storage().nbytes():
            raise ValueError(f"a tensor of shape {tuple(each.shape)} is larger than its bytes in the file")
        total += bytes_
    if total > _LARGEST_RATIO * size:
        raise ValueError(f"its tensors have {total:,} bytes, more than {_LARGEST_RATIO} times the file's size")
