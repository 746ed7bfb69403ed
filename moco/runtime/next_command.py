"""The command to run next, with the settings of the current one, ready to paste into a shell."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from itertools import starmap
from pathlib import Path
from typing import Any

from moco import plugins
from moco.config.base import ComputeConfig
from moco.config.data import FOLDERS, DataConfig, is_remote
from moco.config.quoting import override
from moco.config.subject import EncoderConfig, SubjectConfig
from moco.runtime.output_directory import ABOUT, FEATURES
from moco.untrusted import read_json


def command(module: str, config: EncoderConfig, **changes: Any) -> str:
    """Return `python -m MODULE` with the plug-ins, and each field of `SubjectConfig` that differs from its default.

    Fields that `config` does not have are left out.

    `changes` replace or extend the fields of `config`. A field of `SubjectConfig` that is changed to its default is
    left out.
    """
    defaults, own = asdict(SubjectConfig()), asdict(config)
    values = {each.name: own[each.name] for each in fields(SubjectConfig) if each.name in own} | changes
    values["plugins"] = values["plugins"] or list(plugins.versions())
    return " ".join(["python", "-m", module, *starmap(override, changed_fields(values, defaults))])


def computing_as(config: ComputeConfig) -> SubjectConfig:
    """Return the default configuration with the device, threads and plug-ins of another command's configuration."""
    return SubjectConfig(**{each.name: getattr(config, each.name) for each in fields(ComputeConfig)})


def next_commands(
    run: str,
    name: str,
    root: str,
    labeled: bool,
    on_bad_image: str = "raise",
    given: Mapping[str, Any] | None = None,
    step: int | None = None,
    compute: ComputeConfig | None = None,
) -> list[str]:
    """Return the commands that evaluate or use the encoder of a finished run.

    For a data set without labels, commands whose output exists are left out.

    Args:
        run: the directory of the run.
        name, root: data.name and data.root of the run.
        labeled: whether the data set of the run has labels and held-out images.
        on_bad_image: data.on_bad_image of the run; the commands for evaluation have the field on_bad_image instead.
        given: fields of the data set that the present command line sets, to be repeated.
        step: the step of the newest checkpoint of the run.
        compute: the device, threads and plug-ins of the commands.
    """
    start = computing_as(compute) if compute else SubjectConfig()
    repeated = given or {}
    name, root = repeated.get("name", name), repeated.get("root", root)
    images = named_images(name, root) | {f"data.{field}": value for field, value in repeated.items()}
    images |= {"on_bad_image": "skip"} if on_bad_image == "replace" else {}
    if labeled:
        return [command("moco.linear", start, run=run, **images)]
    # The first folder that holds no features of another step: moco.embed would refuse to replace such features.
    folders = (f"{run}/features", *(f"{run}/features_{i}" for i in range(2, 1000)))
    features, there = next((each, found) for each in folders if (found := _features_step(each)) in (None, step))
    embed = command("moco.embed", start, run=run, **images, output=features)
    of_index = named_images(name, root) if name != "webdataset" else {}
    search = command("moco.search", start, index=features, **of_index, sample=8)
    found = Path(features, "search", "nearest.json").is_file()
    return [embed, search] if there is None else [] if found else [search]


def _features_step(folder: str) -> int | None:
    """Return the step of the encoder whose features are in a folder of moco.embed.

    None if the folder holds no complete features, and -1 if the step is unknown.
    """
    if not Path(folder, FEATURES).is_file():
        return None
    try:
        return int(read_json(Path(folder, ABOUT))["encoder"]["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


def free_run(first: str) -> str:
    """Return a run directory that does not exist: `first`, or `first` with a number, such as runs/mine_2."""
    names = (first, *(f"{first}_{i}" for i in range(2, 1000)))
    return next(each for each in names if not Path(each).exists())


def named_images(name: str, root: str) -> dict[str, Any]:
    """Return the fields that name remote images again: a command downloads only what its own command line names.

    A stream cannot be read image by image: the fields then name YOUR_IMAGES, a placeholder for a folder. For images on
    this machine, return {}.
    """
    if name == "webdataset":
        return {"data.name": "folder", "data.root": "YOUR_IMAGES"}
    return {"data.root": root} if is_remote(name, root) else {}


def given_fields(data: DataConfig) -> dict[str, Any]:
    """Return data.root, and each other field of a data set that differs from its default, by their dotted names.

    data.name is left out: it is set by data=NAME or by a recipe.
    """
    defaults = asdict(DataConfig()) | {"name": data.name, "root": None}
    return {f"data.{name}": value for name, value in asdict(data).items() if value != defaults[name]}


def stats_command(data: DataConfig) -> str:
    """Return the command that computes the mean and std of each channel.

    moco.check_data does not read every kind of data set. For the others, the command names YOUR_IMAGES, a placeholder
    for a folder.
    """
    if data.name not in (*FOLDERS, "imagenet"):
        data = DataConfig("folder", "YOUR_IMAGES", channels=data.channels, dtype=data.dtype)
    name = {} if data.name == "folder" else {"data": data.name}
    return command("moco.check_data", SubjectConfig(), **name, **given_fields(data), stats=True)


def changed_fields(
    values: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield dotted names and values that differ from the defaults; Hydra needs a plus before a new nested name."""
    for name, value in values.items():
        plus = "+" * (name not in defaults and bool(prefix) and not prefix.startswith("+"))
        if isinstance(value, Mapping):
            yield from changed_fields(value, defaults.get(name, {}), f"{plus}{prefix}{name}.")
        elif name not in defaults or value != defaults[name]:
            yield f"{plus}{prefix}{name}", value
