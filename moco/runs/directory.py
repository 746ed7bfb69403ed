"""The run directory: config.yaml, metrics.jsonl, checkpoints/, TensorBoard's events, views.png.

Only rank 0 writes there. A run that is started again in its directory resumes from its newest checkpoint.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import yaml

from moco.config import ConfigError, flatten, require
from moco.config.quoting import override
from moco.files import atomic_write, write_errors
from moco.methods import read_method
from moco.plugins import missing_plugins, naming_plugins
from moco.runs.checkpoint import list_checkpoints
from moco.runs.metrics import METRICS
from moco.runtime.output_directory import LOCK, lock_directory
from moco.untrusted import read_yaml

# Fields that may change when a run resumes. They affect for example where data is, how fast it is processed and what is
# recorded; they change the results by rounding at most. data.on_bad_image, data.max_bad and optim.skip_nonfinite decide
# whether a run continues after an unreadable image or a non-finite step, not how it continues.
FREE_FIELDS = (
    "recipe",
    "plugins",  # `refuse_missing_plugins` refuses a missing plug-in, and another version is reported
    *("run", "device", "threads", "log_every", "analyse_every", "stop_after", "hang_after", "accumulate", "compile"),
    *("cuda_graph", "shard", "activation_checkpointing", "logger"),
    *("channels_last", "profile", "checkpoint", "optim.skip_nonfinite", "evaluate.batch_size"),
    *(f"data.{name}" for name in ("root", "more_roots", "eval_root", "download", "allow_pipe", "workers")),
    *(f"data.{name}" for name in ("on_bad_image", "max_bad")),
)
_MOST_NAMED = 3  # fields in a message


def refuse_difference(
    path: Path, there: Mapping[str, Any], config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> None:
    """Raise ConfigError if the run in `path` was configured to compute something else; the message names the fields.

    Args: see `difference`.
    """
    named = difference(path, there, config, defaults)
    if not named:
        return
    recipe = there.get("recipe")
    which = f"was made with experiment={recipe}" if recipe != config.get("recipe") and recipe else ""
    first = f"the other fields of its first command ({path / 'config.yaml'} holds all values)"
    fix = f"add experiment={recipe} and {first}" if which else "restore those values"
    checkpoints, from_encoder = list_checkpoints(path / "checkpoints"), ""
    if (path / "encoder.safetensors").exists() and checkpoints:  # a finished run
        from_encoder = f" (to train longer, add {override('init_from', checkpoints[0])})"
    raise ConfigError(
        f"run={path} {which or 'holds a run with another configuration'}: {named}. To resume it, {fix}; to start "
        f"another run, set run=DIR{from_encoder}"
    )


def difference(
    path: Path, there: Mapping[str, Any], config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> str:
    """Return the fields in which the run in `path` differs from this run, with both values; "" if there are none.

    Args:
        path: the run's directory.
        there, config: the configuration of the run in `path`, and that of this run.
        defaults: the values of fields that did not exist yet when the earlier run was configured.
    """
    if there.get("method"):
        with naming_plugins(f"run={path}", there):
            there = {**there, "method": asdict(read_method(there["method"]))}
    before, now, default = flatten(there), flatten(config), flatten(defaults or {})
    before |= {name: default[name] for name in now.keys() & default.keys() - before.keys()}
    # With grouped BN, micro-batches do not change the results; otherwise they do.
    free = [name for name in FREE_FIELDS if name != "accumulate" or before.get("model.bn") == "grouped"]
    differing = [
        f"{name} (there {before.get(name)!r}, now {now.get(name)!r})"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not any(name == each or name.startswith(f"{each}.") for each in free)
    ]
    more = len(differing) - _MOST_NAMED
    return "; ".join(differing[:_MOST_NAMED]) + (f"; and {more} more field{'s' * (more > 1)}" if more > 0 else "")


def open_run(path: Path, config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> IO[str]:
    """Lock the directory, check that it holds no other run, and write config.yaml.

    Returns the open lock file. The lock holds until this file is closed or the process ends.

    Raises:
        ConfigError: if another process trains in the directory, or if it holds other files, a damaged config.yaml,
            renamed checkpoints, or a run with another configuration.
    """
    file, checkpoints = path / "config.yaml", path / "checkpoints"
    holds_run = file.exists() or checkpoints.is_dir()
    require(
        holds_run or _is_usable(path),
        f"run={path} is not empty and holds no run (no config.yaml): choose another directory",
    )
    lock = lock_directory(path, "run")
    with write_errors(checkpoints):
        for half_written in [*checkpoints.glob("*.tmp"), *filter(_is_remnant, path.glob("*.tmp"))]:
            half_written.unlink()
    renamed = _renamed(path)
    require(not renamed, f"{renamed} to resume from it; to start another run, set run=DIR")
    if there := recorded_config(path):
        refuse_difference(path, there, config, defaults)
    with atomic_write(file) as temporary:
        temporary.write_text(yaml.safe_dump(dict(config), sort_keys=False))
    return lock


def recorded_config(path: Path) -> dict[str, Any]:
    """Return the configuration in config.yaml; {} for a run without checkpoints and metrics, which may be replaced.

    Raises:
        ConfigError: if the file is damaged.
    """
    file, metrics = path / "config.yaml", path / METRICS
    began = list_checkpoints(path / "checkpoints") or (metrics.is_file() and metrics.stat().st_size)
    return _read(file) if file.is_file() and began else {}


def refuse_missing_plugins(path: Path) -> None:
    """Raise ConfigError if the run that would resume in `path` used plug-ins that are not loaded."""
    file = path / "config.yaml"
    resumes = file.is_file() and any((path / "checkpoints").glob("step_*.pt"))
    missing = missing_plugins(_read(file)) if resumes else ""
    require(not missing, f"run={path} was started with plug-ins, without which it cannot resume: add {missing}")


def in_run_directory(file: Path) -> bool:
    """Return whether a file lies in the directory of a run, at most three folders below it."""
    return any(all((run / name).is_file() for name in ("config.yaml", METRICS)) for run in file.absolute().parents[:4])


def run_of(path: Path) -> Path | None:
    """Return the directory of a run that is one of the two folders above a file or folder; None if neither is one."""
    folders = (*path.parents[:2], *path.absolute().parents[:2])
    return next((each for each in folders if (each / "checkpoints").is_dir()), None)


def no_directory_message(path: Path, field: str = "run") -> str:
    """Return the message for a `field` that must name the directory of a run and names something else."""
    if not path.exists():
        where = f" (in the folder {Path.cwd()})" * (not path.is_absolute())
        return f"{field}={path} does not exist{where}: name the directory of a run, e.g. {field}=runs/digits"
    run = run_of(path)
    fix = f"set {_setting(field, run)}" if run else "name the directory of a run"
    return f"{field}={path} is a file: {fix}"


def folder_message(path: Path, field: str) -> str:
    """Return the message for a folder in `field`, which takes a file of weights: what to set instead."""
    problem, run = f"{field}={path} is a folder", path if (path / "checkpoints").is_dir() else run_of(path)
    if run is None:
        names = ("encoder.safetensors", "model.safetensors")
        found = [path / name for name in names if (path / name).is_file()]
        inside = [each for each in sorted(path.iterdir()) if (each / "checkpoints").is_dir()]
        if found:
            return f"{problem}: name a file, {override(field, found[0])}"
        has_run = bool(inside) and field == "checkpoint"
        return f"{problem}: name {'a run in it, ' + override('run', inside[0]) if has_run else 'a file'}"
    checkpoints = list_checkpoints(run / "checkpoints")
    if not checkpoints:
        return f"{problem}, and {no_checkpoint_message(run)}"
    if field == "checkpoint":
        return f"{problem}: set {override('run', run)}, or name a file"
    encoder = run / "encoder.safetensors"
    return f"{problem}: name a file, such as {override(field, encoder if encoder.is_file() else checkpoints[0])}"


def no_checkpoint_message(path: Path, field: str = "run") -> str:
    """Return the message for a directory in `field` that has no checkpoint: why, and what to do."""
    if run := run_of(path):
        return f"{field}={path} is a folder in the directory of a run: set {_setting(field, run)}"
    if renamed := _renamed(path):
        return f"{renamed}, or set checkpoint=FILE"
    inside = [each for each in sorted(path.iterdir()) if (each / "checkpoints").is_dir()]
    if inside:
        more = f" and {len(inside) - 5:,} more" if len(inside) > 5 else ""
        found = ", ".join(_setting(field, each) for each in inside[:5])
        return f"{field}={path} is a folder of runs: choose one of them, {found}{more}"
    if (path / "config.yaml").is_file() and (path / "encoder.safetensors").is_file():
        encoder = override("checkpoint", path / "encoder.safetensors")
        return f"{field}={path} has no checkpoints any more: use its encoder, {encoder} in place of {field}"
    if (path / "config.yaml").is_file():
        fix = "run its command of moco.train again (config.yaml holds its settings)"
        return f"{field}={path} has no checkpoint yet: {fix}"
    if _is_usable(path):
        return f"{field}={path} has no checkpoint: train it first, python -m moco.train {override('run', path)}"
    return f"{field}={path} holds no run of moco.train (no config.yaml): name the directory of a run"


def _setting(field: str, run: Path) -> str:
    return override(field, run if field == "run" else [run])  # other fields are lists


def _is_usable(path: Path) -> bool:
    """Return whether a run may begin in a directory without a run: it is missing, or holds only moco's own remnants."""
    return not path.is_dir() or all(each.name == LOCK or _is_remnant(each) for each in path.iterdir())


def _renamed(path: Path) -> str:
    """Return the message for a run whose checkpoints all have names other than step_NUMBER.pt; "" for another run."""
    files = sorted((path / "checkpoints").glob("*.pt"))
    if not files or list_checkpoints(path / "checkpoints"):
        return ""
    return f"run={path} has no checkpoint named step_NUMBER.pt, but has {files[0]}: rename it to step_NUMBER.pt"


def _is_remnant(file: Path) -> bool:
    """Return whether this is a temporary file that a killed run left; those of evaluations have other names."""
    names = ("config.yaml", METRICS, "encoder.safetensors", "views.png", "image_names.gz")
    return any(file.match(f"{name}*.tmp") for name in names)


def _read(file: Path) -> dict[str, Any]:
    try:
        there = read_yaml(file)
    except ValueError:
        there = None
    saved = any((file.parent / "checkpoints").glob("step_*.pt"))
    advice = "remove it, the checkpoints hold its settings" if saved else "choose another directory for the run"
    require(isinstance(there, dict), f"{file} is damaged: {advice}")
    return dict(there)
