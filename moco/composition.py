"""The configuration of a command line: composed by Hydra, checked by the schema, returned as a dataclass.

The schema is a dataclass of `moco.config`: it has the names and types of all fields. `compose` raises
ConfigError for an invalid command line.
"""

import difflib
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moco import plugins
from moco.config import ConfigError, MethodConfig, TrainConfig, config_dir, expand_paths, flatten, require
from moco.config.quoting import override, quoted, value_text
from moco.config.types import type_error
from moco.methods import METHODS
from moco.overrides import checked_files, keep_text
from moco.runtime.stdio import exit_on_broken_pipe

Schema = TypeVar("Schema")

# The groups with several schemas, by the type of their field: the defaults list of a file
# configs/GROUP/OPTION.yaml names one of these schemas.
SCHEMAS: dict[Any, dict[str, type[MethodConfig]]] = {MethodConfig: METHODS}


def compose_overrides(overrides: Sequence[str]) -> list[TrainConfig]:
    """Return the configurations of `python -m moco.train` with these overrides; see `compose`."""
    arguments, sys.argv = sys.argv, ["moco.train", *overrides]  # where Hydra reads them
    try:
        return compose("train", TrainConfig)
    finally:
        sys.argv = arguments


def compose(name: str, schema: type[Schema]) -> list[Schema]:
    """Return the configurations of the command line: one; with --multirun, one per job; with --help or --cfg, none.

    Raises:
        ConfigError: for arguments that Hydra cannot read, an unknown field, or a value that does not fit its type.
    """
    composed: list[DictConfig] = []
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors, instead of printing several lines and exiting
    _refuse_options(sys.argv[1:], field_types(schema))
    try:
        plugins.load(_plugins_named(sys.argv[1:]))
        types = field_types(schema)
        with tempfile.TemporaryDirectory() as scratch, exit_on_broken_pipe(), checked_files(types):
            register(name, schema, scratch)
            given = sys.argv[1:]
            kept = sorted(keep_text(given, types), key=lambda each: each not in ("--multirun", "-m"))
            sys.argv = [sys.argv[0], *kept]  # argparse refuses --multirun between fields
            # The command runs outside Hydra, which would print a line of its own before every error.
            run = hydra.main(version_base="1.3", config_path=config_dir(), config_name=name)
            run(lambda config: composed.append(_with_recipe(config)))()
            if name == "train":
                _refuse_replaced_values(given)
        if len(composed) > 1:
            _refuse_shared_output(composed, types)
        configs = [to_dataclass(each, schema) for each in composed]
        for config in configs:
            _refuse_unloaded_plugins(config)
        return configs
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_sentence(error, schema)) from error


def _plugins_named(arguments: Sequence[str]) -> list[str]:
    """Return the plug-ins of a command line, or else of its recipe, before Hydra reads these two.

    A value of another form than a list of names is left to Hydra and the schema, which refuse it.
    """
    values = _values(arguments)
    if "plugins" in values:
        with suppress(HydraException):
            return _names(OverridesParser.create().parse_override(f"plugins={values['plugins']}").value())
    return _names(_option("experiment", values.get("experiment", ""), arguments).get("plugins"))


def _refuse_replaced_values(arguments: Sequence[str]) -> None:
    """Refuse GROUP=OPTION on the command line of moco.train if the recipe sets fields of the group to other values.

    Hydra would silently use the recipe's values of these fields, not those of the option.
    """
    values = _values(arguments)
    recipe = values.get("experiment", "digits")  # the default in configs/train.yaml
    own = _option("experiment", recipe, arguments)
    for group in [each for each in values if isinstance(own.get(each), dict)]:
        chosen, other = (flatten(each) for each in (_option(group, values[group], arguments), own[group]))
        replaced = [each for each in other if chosen.get(each, other[each]) != other[each]]
        replaced = [each for each in replaced if f"{group}.{each}" not in values]
        if replaced:
            of_group, of_recipe = (
                " ".join(f"{group}.{each}={value_text(values_of[each])}" for each in replaced)
                for values_of in (chosen, other)
            )
            sentence = f"{group}={values[group]} has {of_group}, but the recipe {recipe} has {of_recipe}"
            raise ConfigError(f"{sentence}: add the values that you want to the command")


def _values(arguments: Sequence[str]) -> dict[str, str]:
    return {key.lstrip("+"): value for key, _, value in (each.partition("=") for each in arguments)}


def _option(group: str, name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Read configs/GROUP/NAME.yaml without Hydra; return {} if there is no such file, or its content is no mapping."""
    folders = [get_args_parser().parse_known_args(list(arguments))[0].config_dir, config_dir()]
    for file in (Path(folder, group, f"{name}.yaml") for folder in folders if folder):
        if file.is_file():
            with suppress(yaml.YAMLError, UnicodeDecodeError):
                content = yaml.safe_load(file.read_text(encoding="utf-8"))
                return content if isinstance(content, dict) else {}
            return {}
    return {}


def _names(value: Any) -> list[str]:
    return value if isinstance(value, list) and all(isinstance(each, str) for each in value) else []


def _refuse_unloaded_plugins(config: Any) -> None:
    """Refuse plug-ins that are not on the command line or in the recipe's own file: they were not imported.

    An example is a plug-in that is set only by a file in the recipe's defaults list.
    """
    unloaded = [each for each in config.plugins if each not in plugins.versions()]
    named = f"plugins=[{','.join(config.plugins)}]"
    require(not unloaded, f"{named} is neither on the command line nor in the recipe's own file: add {named}")


def _with_recipe(config: DictConfig) -> DictConfig:
    """Return the configuration; for moco.train, store the name of the recipe in it. Called while Hydra runs."""
    recipe = HydraConfig.get().runtime.choices.get("experiment")
    if recipe:
        config.recipe = str(recipe)
    return config


def _refuse_options(arguments: Sequence[str], types: Iterable[str]) -> None:
    """Raise ConfigError for an option that Hydra does not have, or for a group set to a list, such as data=[].

    For an unknown option, argparse would print eight lines, or take its first letters for another option: --experiment
    for --experimental-rerun. Hydra would ignore an empty list, and merge all files that a longer list names.
    """
    options = get_args_parser()._option_string_actions
    names = [*types, *(each.name for each in Path(config_dir()).iterdir() if each.is_dir())]
    for argument in arguments:
        group, is_list, _ = argument.lstrip("+").partition("=[")
        if is_list and Path(config_dir(), group).is_dir():
            raise ConfigError(f"{argument}: a group takes one name, {group}=NAME")
        option, equals, value = argument.partition("=")
        if argument.startswith("--"):
            exists = argument == "--" or (option in options and not (equals and options[option].nargs == 0))
        else:
            exists = not argument.startswith("-") or argument[:2] in options
        if not exists:
            name = option.lstrip("-").replace("-", "_")
            known = [each for each in names if name in (each, each.rpartition(".")[2])]
            written = " or ".join(shlex.quote(f"{each}={value or 'VALUE'}") for each in known[:3])
            fix = f"write a field without dashes, {written or 'FIELD=VALUE'}"
            raise ConfigError(f"{argument}: {fix}{'' if known else '; --help lists the fields and options'}")


def to_dataclass(composed: DictConfig, schema: type[Schema]) -> Schema:
    """Return a composed configuration, to which `+field=value` may have added fields, as an object of its schema.

    Raises:
        ConfigError: if the field `name` of a group does not match the schema of the group, or for a list inside a list
            of texts or numbers.
        OmegaConfBaseException: for an unknown field or any other value of a wrong type.
    """
    typed = OmegaConf.structured(schema)
    for each in fields(schema):  # type: ignore[arg-type]
        schemas = SCHEMAS.get(each.type)
        if schemas is None:
            continue
        chosen, name = OmegaConf.get_type(composed, each.name), composed[each.name].name
        require(
            schemas.get(name) is chosen,
            f"{each.name}.name={name!r} does not choose a {each.name}: set {each.name}=OPTION, a file of "
            f"configs/{each.name}/ that opens with the defaults '/NAME_schema@_here_' (NAME is one of "
            f"{', '.join(schemas)})",
        )
        typed[each.name] = chosen
    config = OmegaConf.to_object(OmegaConf.merge(typed, OmegaConf.to_container(composed)))
    assert isinstance(config, schema)
    error = type_error("", config, schema, exact=True)  # OmegaConf accepts a list inside a list
    require(not error, error)
    expand_paths(config)
    return config


def _refuse_shared_output(composed: list[DictConfig], names: Iterable[str]) -> None:
    """Refuse --multirun with jobs that would overwrite each other's files; `names` are the command's fields."""
    place = "output" if "output" in names else "run"  # a command that reads a run writes to `output`
    sources = (place, "run", "checkpoint")
    written = [next((f"{name}={each[name]}" for name in sources if each.get(name)), "") for each in composed]
    if len(set(written)) < len(written):
        example = "output=runs/seed_${seed}" if place == "output" else "run=runs/lr_${optim.lr}"
        shared = max(written, key=written.count)
        raise ConfigError(
            f"--multirun has {written.count(shared)} jobs with {shared or 'the same directory'}: give each job its own "
            f"{place}, named by the fields that differ, such as '{example}'"
        )


def register(name: str, schema: type, scratch: str = ".") -> None:
    """Register the schemas, the config `quiet` (settings of Hydra) and the options of plug-ins with Hydra.

    The defaults lists in configs/ refer to the schemas and to `quiet`. With `quiet`, Hydra writes no files, except
    multirun.yaml in the directory `scratch` if --multirun is given.
    """
    store = ConfigStore.instance()
    store.repo = _Shared(store.repo)
    store.store(name=f"{name}_schema", node=schema)
    for each in fields(schema):
        for option, node in SCHEMAS.get(each.type, {}).items():
            store.store(name=f"{option}_schema", node=node)
    for group, names in _options_of_plugins().items():
        for option in names:
            store.store(group=group, name=option, node=METHODS[option] if group == "method" else {"name": option})
    quiet = {"output_subdir": None, "run": {"dir": "."}, "job": {"chdir": False}}
    quiet |= {"sweep": {"dir": scratch, "subdir": "."}, "hydra_help": {"template": "${hydra.help.template}"}}
    store.store(name="quiet", node={"hydra": quiet}, package="_global_")
    OmegaConf.register_new_resolver("groups", _groups, replace=True)


class _Shared(dict[str, Any]):
    """Hydra's registered configs, shared instead of copied: for --help, Hydra would copy all of them once per group.

    Sharing is safe, because Hydra also copies each config when it loads it.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shared":
        return self


def _options_of_plugins() -> dict[str, list[str]]:
    """Return the names that plug-ins add to the groups `method` and `data`, by group: options of method= and data=."""
    sources = sys.modules.get("moco.data.sources")  # not imported here: that needs torch
    return {"method": METHODS.added, "data": sources.SOURCES.added if sources else []}


def _groups(name: str) -> str:
    """Return the groups of `configs/NAME.yaml` and their options, one line per group, for the --help of the command."""
    folder = Path(config_dir())
    defaults = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))["defaults"]
    groups = [str(key) for each in defaults if isinstance(each, dict) for key in each if (folder / key).is_dir()]
    options = {group: sorted(file.stem for file in (folder / group).glob("*.yaml")) for group in groups}
    added = _options_of_plugins()
    return "\n".join(f"{group}: {', '.join([*names, *added.get(group, [])])}" for group, names in options.items())


def _sentence(error: Exception, schema: type) -> str:
    """Return one sentence for an error of Hydra or OmegaConf, with the most similar name for a misspelled one."""
    if isinstance(error, OverrideParseException):
        return _unreadable_override(error.override)
    text = "\n".join(str(part) for part in (error, error.__cause__) if part is not None)
    not_a_field = r"[Kk]ey '([^']+)' (?:is not in struct|not in '\w+')|Could not override '([^']+)'"
    if unknown := re.search(not_a_field, text):
        full, owner = re.search(r"full_key: (\S+)", text), re.search(r"not in '(\w+)'", text)
        return _unknown_field(full[1] if full else unknown[1] or unknown[2], owner[1] if owner else "", schema)
    if sentence := _invalid_value(text):
        return sentence
    if missing := re.search(r"Could not (?:find|load) '([^']+)'", text):
        options = re.findall(r"^\t(\S+)$", text, flags=re.M)
        available = f"; available: {', '.join(options)}" if options else ""
        own = "; if a plug-in adds it, name its module: plugins=[MODULE]" * missing[1].startswith(("method/", "data/"))
        return f"there is no {missing[1]!r}{_did_you_mean(missing[1].split('/')[-1], options, 0.6)}{available}{own}"
    lines = [str(each).splitlines()[0].strip() for each in (error, error.__cause__) if str(each or "")]
    field = getattr(error, "full_key", None)
    if missing := re.search(r"Interpolation key '([^']+)'", text):  # in a list, OmegaConf names no field
        field = field or next((each for each in sys.argv[1:] if f"${{{missing[1]}" in each), None)
    return ": ".join([field, *lines] if field and field not in lines[0] else lines)


def _invalid_value(text: str) -> str:
    """Return one sentence for a message of Hydra or OmegaConf about a value; "" for another message."""
    if found := re.search(r"Value '([^']*)' of type '\w+' could not be converted to (\w+)[\s\S]*full_key: (\S+)", text):
        return f"{found[3]}={found[1]} must be of type {found[2].lower()}"
    if found := re.search(r"Value '([^']*)' is not a valid bool[\s\S]*full_key: (\S+)", text):
        return f"{found[2]}={found[1]} must be true or false"
    if found := re.search(r"Could not append to config\. An item is already at '([^']+)'", text):
        return f"{found[1]} exists: change it without the plus, {found[1]}=VALUE"
    if found := re.search(r"Error merging override \+*(\S+)=(\S+)\n.*is not a ListConfig", text):
        return f"{found[1]}={found[2]} must be a list: {shlex.quote(f'{found[1]}=[{found[2]}]')}"
    if found := re.search(r"Ambiguous value for argument '([^=]+)=(.*)'", text):
        field, value = found.groups()
        as_list, as_text = shlex.quote(f"{field}=[{value}]"), override(field, value)
        return f"{field}={value} is ambiguous: write a list as {as_list}, or text with a comma as {as_text}"
    return ""


def _unreadable_override(argument: str) -> str:
    field, _, value = argument.partition("=")
    if not value:
        path = " A path needs its field too, such as run=DIR or data.root=DIR" * Path(argument).exists()
        return f"{argument} cannot be read: write field=value, without spaces around the ={path and f'.{path}'}"
    is_list = re.fullmatch(r"\[.*\]", value)
    fixed = f"[{','.join(map(quoted, value[1:-1].split(',')))}]" if is_list else quoted(value)
    return f"{argument} cannot be read: quote its value, {shlex.quote(f'{field}={fixed}')}"


def _recipes_with(group: str, option: str) -> list[str]:
    """Return the recipes of configs/experiment/ that choose this option of a group themselves."""
    pattern = re.compile(rf"^ *- override /{group}: {option}$", re.MULTILINE)
    files = sorted(Path(config_dir(), "experiment").glob("*.yaml"))
    return [file.stem for file in files if pattern.search(file.read_text(encoding="utf-8"))]


def _unknown_field(field: str, owner: str, schema: type) -> str:
    """Return the sentence for an unknown dotted field; `owner` is the name of the schema that does not have it."""
    for group in fields(schema):
        for option, chosen in SCHEMAS.get(group.type, {}).items():
            if owner == chosen.__name__ and field.startswith(f"{group.name}."):
                own = [f"{group.name}.{each.name}" for each in fields(chosen)]
                hint = _did_you_mean(field, own) or f"; its fields are {', '.join(own)}"
                if not any(each.lstrip("+~").startswith(field) for each in sys.argv[1:]):
                    given = [each.partition("=")[2] for each in sys.argv[1:] if each.startswith(f"{group.name}=")]
                    option = given[-1] if given else option  # several options can share a schema
                    names = ", ".join(_recipes_with(group.name, option))
                    hint = f"; the recipe sets it: choose a recipe for {option}, experiment=NAME"
                    hint += f" ({names})" * bool(names)
                return f"{field} is not a field of {option}{hint}"
    known = field_types(schema)
    if field == "experiment" and "method.name" in known:  # only moco.train takes recipes
        return "a recipe must open with the line '# @package _global_': see docs/howto/use.md"
    name = next((each for each in known if field.startswith(f"{each}.") and not is_dataclass(known[each])), "")
    if name:
        return f"{name} does not hold {field.removeprefix(f'{name}.')!r} yet: add it with +{field}=VALUE"
    if field.partition(".")[0] == "images" and "augment.size" in known:
        return "images is a group of the evaluations; for training, set augment.size, augment.mean or augment.std"
    if field == "data.hold_out":
        fix = "set data.eval_root=DIR or data.label_file=FILE (with a column named split) for held-out images"
        return f"data.hold_out is a field of the evaluations, such as moco.knn; here, {fix}"
    if field == "runs" and {"run", "compare"} <= set(known):
        return "there is no field 'runs': name one run as run=DIR, and the others as 'compare=[DIR,...]'"
    if field == "experiment" and "recipe" in known:
        return "there is no field 'experiment'; did you mean 'recipe'?"
    recipe = next((each for each in sys.argv[1:] if each.lstrip("+").startswith("experiment=")), "")
    if recipe and (field in known or not any(each.lstrip("+~").startswith(field) for each in sys.argv[1:])):
        return f"{recipe}: only moco.train has recipes; remove it"
    same = [repr(each) for each in known if each.endswith(f".{field}")]  # such as lr, for optim.lr
    hint = f"; did you mean {' or '.join(same[:3])}?" if same else _did_you_mean(field, known)
    return f"there is no field {field!r}{hint}"


def _did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.7) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def field_types(schema: Any, prefix: str = "") -> dict[str, Any]:
    """Return the types of all fields of nested dataclasses by dotted name; a group has the fields of its schemas."""
    types = {}
    for each in fields(schema):
        types[prefix + each.name] = each.type
        if is_dataclass(each.type):
            for chosen in (*SCHEMAS.get(each.type, {}).values(), each.type):
                types |= field_types(chosen, f"{prefix}{each.name}.")
    return types
