"""The command line: runs a command with its configuration, and reports expected errors without a traceback."""

import importlib
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from moco.composition import compose
from moco.config import ConfigError, ResumableConfig, RunWarning, require
from moco.config.base import paths_of
from moco.runtime.preemption import Preempted, PreemptionHandler, Terminated, prevent_restart, raise_terminated
from moco.runtime.stdio import for_terminal, print_error, printable, protected_streams

Schema = TypeVar("Schema")

# What to do about an unreadable image, by command; other commands need every image.
_IMAGE_ADVICE = {
    "train": "python -m moco.check_data with the same data.* fields lists all such images; to replace them by other "
    "images, set data.on_bad_image=replace and the data.max_bad that moco.check_data names",
    **dict.fromkeys(
        ("embed", "search", "knn", "linear", "finetune", "transfer"), "to leave out such images, set on_bad_image=skip"
    ),
}


# Commands that resume when they are run again. Some also report what they have kept, see `preemption.keeping`.
_RESUMABLE = {"train", "pack", "embed", "search", "finetune", "segment", "detect", "transfer", "temperature"}


@dataclass(frozen=True)
class Command(Generic[Schema]):
    """A command: `main` runs it with the configuration of the command line; a call runs it with a given configuration.

    Attributes:
        name: The name of its file in configs/, without the ending.
        schema: The dataclass of its configuration.
        check: Raises ConfigError for an invalid configuration.
        work: "module:function", called with the configuration, and with a `PreemptionHandler` if it is a
            `ResumableConfig`. The module imports torch, so it is imported last.
    """

    name: str
    schema: type[Schema]
    check: Callable[[Schema], None]
    work: str

    def __call__(self, config: Schema) -> None:
        self.check(config)
        if isinstance(config, ResumableConfig):
            with PreemptionHandler(config.stop_after) as preemption:  # before the import in `_work`: it takes seconds
                self._work()(config, preemption)
        else:
            self._work()(config)

    def _work(self) -> Callable[..., object]:
        module, _, function = self.work.partition(":")
        found: Callable[..., object] = getattr(importlib.import_module(module), function)
        return found

    def main(self) -> None:
        """Run the command with the configuration of the command line."""
        run_command(self.name, self.schema, self)


def launched_processes() -> int:
    """Return the number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_launch() -> None:
    """Raise ConfigError for a removed current directory, or invalid variables of a launcher."""
    try:
        Path.cwd()
    except FileNotFoundError as removed:
        raise ConfigError("the current directory was removed: change to another one (cd DIR)") from removed
    ranges = {"WORLD_SIZE": (1, 2**31), "RANK": (0, 2**31), "LOCAL_RANK": (0, 2**31), "MASTER_PORT": (0, 2**16 - 1)}
    for name, (low, high) in ranges.items():
        text = os.environ.get(name, str(low))
        require(
            bool(re.fullmatch(r"[0-9]{1,10}", text)) and low <= int(text) <= high,
            f"the environment variable {name}={text!r} must be a whole number from {low} to {high}: unset it, or "
            "start the command with torchrun, which sets it",
        )
    rank, processes = os.environ.get("RANK", "0"), launched_processes()
    error = f"the environment variable RANK={rank} must be below WORLD_SIZE={processes}: unset both"
    require(int(rank) < processes, error)


@protected_streams()
def run_command(name: str, schema: type[Schema], command: Callable[[Schema], None]) -> None:
    """Compose `configs/NAME.yaml` with the overrides of the command line, check it against the schema, run the command.

    The exit status is 2 for a configuration that is invalid or names a file or folder that does not exist, 1 for an
    error of the command, 75 (EX_TEMPFAIL) for a training (of train, finetune, segment, detect or temperature) that was
    stopped and has saved its state, and 130 after Ctrl-C. After another signal, a command that saves no state exits
    with 128 + the number of the signal (143 for SIGTERM). The status is 141 if the output pipe of --help is closed
    (`| head`).
    ValueError, OSError, FloatingPointError, MemoryError and Warning are reported without a traceback; MOCO_TRACEBACK=1
    shows it instead.
    """
    plain = warnings.formatwarning
    warnings.formatwarning = lambda message, category, *rest: (
        f"{for_terminal(f'moco: warning: {message}', sys.stderr)}\n"
        if issubclass(category, RunWarning)
        else "\n".join(map(printable, plain(message, category, *rest).split("\n")))
    )
    if os.environ.get("LOCAL_RANK", "0") != "0":  # most warnings are the same on all ranks of a machine
        warnings.simplefilter("ignore", RunWarning)
    config: Schema | None = None
    try:
        _check_launch()
        with raise_terminated():
            for config in compose(name, schema):  # none for --help, several for --multirun
                command(config)
    except ConfigError as error:
        _exit(2, _naming_field(str(error), config), error)
    except BrokenPipeError:  # handled by `exit_on_broken_pipe`
        raise
    except (ValueError, OSError, FloatingPointError, MemoryError, Warning) as error:  # Warning: python -W error
        sentence = _naming_field(_sentence(error), config)
        if type(error) is FileNotFoundError and error.errno is None:  # raised by moco: system errors have a number
            _exit(2, sentence, error)
        hint = "" if _explains_itself(error) else " (MOCO_TRACEBACK=1 shows where)"
        _exit(1, f"{sentence}{_image_advice(name, error)}{hint}", error)
    except Preempted as stopped:  # not an error: never a traceback
        if os.environ.get("RANK", "0") == "0":
            print_error(f"moco: {stopped}")
        sys.exit(stopped.status)
    except KeyboardInterrupt as error:
        _silence_finalizers()
        _exit(130, f"interrupted{_how_to_continue(name, error)}", error)
    except Terminated as error:
        _silence_finalizers()
        _exit(128 + signal.Signals[str(error)], f"stopped by {error}{_how_to_continue(name, error)}", error)


def _how_to_continue(name: str, stopped: BaseException) -> str:
    """Return the end of the sentence about a stop: how to continue; "" for a command that cannot resume."""
    notes = getattr(stopped, "__notes__", ["run the same command again"] if name in _RESUMABLE else [])
    return f"; {notes[0]}" if notes else ""


def _silence_finalizers() -> None:
    """Keep Python from printing errors of finalizers, which fail after a signal has interrupted a constructor."""
    sys.unraisablehook = lambda _: None


def _sentence(error: BaseException) -> str:
    """Return the reason of an error in words, without Python's "[Errno 2]"."""
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object} contains bytes that are not UTF-8: use another name"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error) or ("memory ran out" if isinstance(error, MemoryError) else type(error).__name__)


def _naming_field(sentence: str, config: Any) -> str:
    """Put the name of a path field before a sentence that begins with the value of the field.

    If the values of several fields match, the longest value decides.
    """
    found = [
        (len(str(path)), name)
        for name, value in (paths_of(config) if config else ())
        for path in (Path(value), Path(value).absolute())
        if sentence.startswith((f"{path}/", f"{path}:", f"{path} "))
    ]
    return f"{max(found, key=lambda each: each[0])[1]}={sentence}" if found else sentence


def _exit(status: int, sentence: str, error: BaseException) -> None:
    """Report an error and exit; with MOCO_TRACEBACK=1 raise the error instead."""
    if os.environ.get("MOCO_TRACEBACK") == "1":
        raise error
    rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    if status == 2 or isinstance(error, FloatingPointError) or _is_image_error(error):
        prevent_restart()  # each of torchrun's --max-restarts would fail in the same way
    # An invalid configuration is the same on all ranks of a machine.
    if local_rank == "0" or not local_rank.isdigit() or status == 1:
        print_error(f"moco{'' if rank == '0' else f' (rank {rank})'}: {sentence}")
    else:
        time.sleep(3)  # torchrun kills the other ranks when one exits: local rank 0 must print its error first
    sys.exit(status)


def _is_image_error(error: BaseException) -> bool:
    decode = sys.modules.get("moco.data.decode")  # not imported here, because it imports torch; None: no image was read
    return decode is not None and isinstance(error, decode.ImageError)


def _explains_itself(error: BaseException) -> bool:
    """Return whether a `raise` statement of moco raised the error. Then its message says what to do."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(last.filename).is_relative_to(Path(__file__).parent) and str(last.line).startswith("raise ")


def _image_advice(name: str, error: BaseException) -> str:
    """Return what to do about an image file that a command cannot read; "" for any other error."""
    kind: str = getattr(error, "kind", "")
    if not (_is_image_error(error) and kind):
        return ""
    return "; " + _IMAGE_ADVICE.get(name, "python -m moco.check_data finds all such images: repair or remove them")
