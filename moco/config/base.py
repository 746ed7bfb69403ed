"""The common part of all configurations: errors, bounds of fields, and the location of the YAML files."""

import importlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """An invalid configuration; the message is one sentence for the user."""


class RunWarning(UserWarning):
    """A problem that does not prevent the run; the message is one sentence for the user."""


def config_dir() -> str:
    """Return the folder of the YAML files: inside an installed wheel, or at the top level of a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "train.yaml").is_file():
            return str(folder)
    places = f"neither in {package / 'configs'} nor in {package.parent / 'configs'}"
    raise FileNotFoundError(f"moco's configs are {places}: install moco again")


def require(condition: bool, sentence: str) -> None:
    """Raise `ConfigError(sentence)` unless the condition holds."""
    if not condition:
        raise ConfigError(sentence)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested mapping: the names become dotted."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, Mapping) and value
        flat.update(flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat


LARGEST = 2**31 - 1  # the largest value of an integer field except a seed: libraries take no more

HUB = "hf://"  # begins a name on the Hugging Face Hub, see moco/interop/hub.py
REPOSITORY = r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*"  # USER/NAME on the Hub

# The extras of pyproject.toml that a command may need, and their packages as pip names them.
EXTRAS = {
    "detect": "torchmetrics pycocotools",
    "hub": "huggingface-hub",
    "huggingface": "datasets",
    "mlflow": "mlflow-skinny sqlalchemy alembic sqlparse",
    "onnx": "onnx onnxruntime onnxscript",
    "parquet": "pyarrow",
    "tiff": "tifffile imagecodecs",
    "umap": "umap-learn",
    "video": "av",
    "wandb": "wandb",
    "webdataset": "webdataset",
}


def optional_module(name: str, purpose: str, extra: str, instead: str = "") -> Any:
    """Import a module, or raise a ConfigError that says for which purpose it is needed and how to install it.

    `instead` ends the message with another setting that avoids the module.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{purpose} needs {install(extra)}{instead}") from error


def install(extra: str) -> str:
    """Return the packages of an extra, and the command that installs them."""
    packages = EXTRAS[extra]
    return f"{packages.replace(' ', ', ')}: pip install {packages} (extra {extra!r})"


@dataclass(frozen=True)
class Bounds:
    """The values that a field accepts, see `bounded`. In a list, ge, gt, le, lt and choices apply to each element."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: tuple[str, ...] = ()
    min_length: int = 0
    max_length: int | None = None
    unique: bool = False
    path: bool = False
    example: str = ""

    def element(self) -> str:
        """Describe the accepted numbers or choices, e.g. "at least 0 and below 1"."""
        limits = {"at least": self.ge, "above": self.gt, "at most": self.le, "below": self.lt}
        parts = [f"{name} {_number(limit)}" for name, limit in limits.items() if limit is not None]
        return f"one of {', '.join(self.choices)}" if self.choices else " and ".join(parts)

    def length(self) -> str:
        """Describe the accepted length of a list, e.g. "at least 1 value"."""
        low, high = self.min_length, self.max_length
        if high is None:
            return f"at least {low} value{'s' * (low > 1)}" if low else ""
        return f"{low} values" if low == high else f"{low} to {high} values"

    def error(self, name: str, value: Any) -> str:
        """Return the sentence that refuses a value of the named field; empty for an accepted value."""
        example = f", e.g. {self.example}" if self.example else ""
        if isinstance(value, str) and not self.choices:
            return f"{name}={value!r} must not be empty{example}" if self.min_length and not value.strip() else ""
        if not isinstance(value, list):
            return "" if self._accepts(value) else f"{name}={_shown(value)} must be {self.element()}{example}"
        if len(value) < self.min_length or (self.max_length is not None and len(value) > self.max_length):
            return f"{name}={value} must hold {self.length()}{example}"
        for each in value:
            if not self._accepts(each):
                return f"{name}={value}: {_shown(each)} must be {self.element()}{example}"
        if self.unique and len({self._identity(each) for each in value}) < len(value):
            return f"{name}={value} must not hold a value twice"
        return ""

    def _identity(self, value: Any) -> Any:
        """Return the same text for all spellings of a path. Text without a slash may be a name and is kept."""
        path = value.rstrip("/") if self.path else ""
        return os.path.realpath(path) if "/" in path else path or value

    def _accepts(self, value: Any) -> bool:
        return (
            (not self.choices or value in self.choices)
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )


def bounded(default: Any, **bounds: Any) -> Any:
    """Declare a dataclass field with the values that it accepts, for `check_bounds` and the pages of docs/config.

    Null is accepted where the field's type allows it. A list as the default is copied for each instance.

    Args:
        default: The default value.
        bounds: The fields of `Bounds`: ge, gt, le, lt (numbers), choices (names), min_length, max_length and unique
            (lists; min_length=1 refuses an empty string too), path (a text that names a file or directory, or a list of
            such texts: see `expand_paths`), example (a valid setting for the error message).
    """
    metadata = {"bounds": Bounds(**bounds)}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[Any, str, str, Any, Bounds]]:
    """Yield a tuple for each field of a configuration and its groups: (group, name, dotted name, value, bounds)."""
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{each.name}.")
        else:
            yield config, each.name, prefix + each.name, value, each.metadata.get("bounds", Bounds())


def check_bounds(config: Any, prefix: str = "") -> None:
    """Check all fields of a configuration and its groups against their bounds. Numbers must be finite.

    Integers, except seeds, must be at most `LARGEST`.

    Raises:
        ConfigError: for the first invalid value. The message has `prefix` and the dotted name of the field, and the
            accepted values.
    """
    for _, _, name, value, bounds in _leaves(config, prefix):
        for dotted, number in _floats(name, value):
            require(math.isfinite(number), f"{dotted}={number} must be a finite number")
        error = "" if value is None else bounds.error(name, value)
        require(not error, error)
        if isinstance(value, int) and bounds.lt is None:  # a seed has a bound `lt` of its own, 2**64
            require(abs(value) <= LARGEST, f"{name}={value} must be at most {LARGEST}")


_FROM_HUB = ("checkpoint", "init_from", "encoders")  # fields that accept a name on the Hub


def expand_paths(config: Any) -> None:
    """Replace `~` and `~user` at the start of all path fields of a configuration and its groups, in place.

    Raises:
        ConfigError: if there is no such user, or for an address in the place of a path.
    """

    def expanded(name: str, path: str) -> str:
        full = os.path.expanduser(path)  # noqa: PTH111 # Path would also remove ./, // and a final slash
        user = path.partition("/")[0]
        require(not full.startswith("~"), f"{name}={path}: there is no user {user[1:]!r}; write ./{path} for that name")
        # Some data sets are read from addresses, and encoders can be on the Hub.
        readable = name.startswith("data.") or (name in _FROM_HUB and path.startswith(HUB))
        require(readable or "://" not in path, f"{name}={path} is an address: download the file, and set its path here")
        return full

    for group, field_name, name, value, bounds in _leaves(config):
        if bounds.path and value:
            several = isinstance(value, list)
            setattr(group, field_name, [expanded(name, one) for one in value] if several else expanded(name, value))


def paths_of(config: Any) -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the value of each path in a configuration and its groups."""
    for _, _, name, value, bounds in _leaves(config):
        if bounds.path and value:
            yield from ((name, path) for path in (value if isinstance(value, list) else [value]))


@dataclass(kw_only=True)
class CommandConfig:
    """The field that every command has."""

    plugins: list[str] = bounded([], unique=True, example="plugins=[my_package.my_module]")
    """Plug-ins: Python modules that the command imports first, and that add methods, data sets and other parts; see
    docs/howto/extend.md. A command that reads a saved run does not import the run's plug-ins by itself: set plugins for
    that command too."""


@dataclass
class ComputeConfig(CommandConfig):
    """The device of a command that computes, and how it computes there."""

    device: str = bounded("auto", choices=("auto", "cpu", "cuda", "mps"))
    """Device for the computation. auto: a GPU for CUDA if the machine has one, else the CPU. mps: the GPU of a Mac, see
    docs/gpu.md."""
    threads: int = bounded(0, ge=0, le=512)
    """CPU threads per process; 0: the default of torch."""
    tf32: bool = False
    """On a GPU, compute convolutions and matrix products of float32 numbers in TF32, which is several times faster and
    rounds to 10 bits of mantissa instead of 23. Computations in bf16 and fp16 do not change."""


@dataclass
class StoppableConfig(ComputeConfig):
    """The fields of the commands that train: when to log and when to stop."""

    log_every: int = bounded(10, ge=1)
    """Write a record to metrics.jsonl, and by default to TensorBoard, every N steps."""
    stop_after: float = bounded(0.0, ge=0)
    """Minutes from the start of the command after which the command saves its state and exits with status 75; run the
    same command again to resume. 0: never. For a job on a cluster, set stop_after to the job's time limit minus the
    time of a step, an evaluation and a checkpoint."""
    hang_after: float = bounded(15.0, ge=0)
    """If no rank makes progress for this number of minutes, the run exits with status 69 and names the rank that hangs;
    0: wait forever. Progress is a finished step or a part of other work, such as a batch of an evaluation. Set
    hang_after above the duration of the longest step, including the time to save a checkpoint, and above the time to
    open the data."""


@dataclass
class ResumableConfig(StoppableConfig):
    """The fields of the commands that train on labels, and resume from a saved state."""

    save_every: int = bounded(100, ge=0)
    """Steps between two saves of the training state, from which the same command resumes. The state is also saved when
    the command is stopped, and after the last step; 0: the state is saved at these two times only."""


def refuse_on_mps(config: ComputeConfig, *given: str) -> None:
    """Raise ConfigError for device=mps with any of the given settings, such as "compile=true"."""
    error = f"device=mps does not support {' and '.join(given)}: set device=cpu"
    require(config.device != "mps" or not given, error)


def require_divisible(batch_size: int, parts: int, divisor: str, fix: str = "") -> None:
    """Raise ConfigError with a fix, by default the nearest multiple, unless the batch divides into equal parts."""
    fix = fix or f"batch_size={max(1, round(batch_size / parts)) * parts}"
    require(batch_size % parts == 0, f"batch_size={batch_size} must be a multiple of {divisor}: set {fix}")


def _floats(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yield all floats of a value, which may be a list or a dict, with their dotted names."""
    if isinstance(value, float):
        yield name, value
    elif isinstance(value, list):
        for each in value:
            yield from _floats(name, each)
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _floats(f"{name}.{key}", each)


def _number(limit: float) -> str:
    return "2**64" if limit == 2**64 else f"{limit:g}"


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)
