"""What every command shares: Hydra in, one sentence out when something is wrong.

Hydra composes; the schema (dataclasses in `moco.config`) checks names and types; the command gets a plain dataclass.
"""

import difflib
import os
import re
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moco.config import ConfigError, MethodConfig, RunWarning, config_dir
from moco.methods import METHODS
from moco.runtime.next_command import quoted
from moco.runtime.preemption import Preempted, prevent_restart
from moco.runtime.stdio import exit_on_broken_pipe, print_error, protected_streams

Schema = TypeVar("Schema")

# Nothing of Hydra's own is written, and the directory stays. Each command's defaults name it behind their schema.
_QUIET = {
    "output_subdir": None,
    "run": {"dir": "."},
    "job": {"chdir": False},
    "hydra_help": {"template": "${hydra.help.template}"},
}

# A group with several schemas: the option of the group, configs/GROUP/OPTION.yaml, chooses one in its defaults list.
SCHEMAS: dict[Any, dict[str, type[MethodConfig]]] = {MethodConfig: METHODS}

USER_ERRORS = (ValueError, FileNotFoundError, PermissionError, FloatingPointError)


def register(name: str, schema: type, scratch: str = ".") -> None:
    """Tells Hydra of the two entries that open the defaults of `configs/NAME.yaml`: NAME_schema and quiet.

    Args:
        name, schema: see `run_command`.
        scratch: where --multirun puts Hydra's own multirun.yaml, which it cannot be told to leave out.
    """
    store = ConfigStore.instance()
    store.store(name=f"{name}_schema", node=schema)
    for each in fields(schema):
        for option, node in SCHEMAS.get(each.type, {}).items():
            store.store(group=f"{each.name}/schema", name=option, node=node)
    quiet = _QUIET | {"sweep": {"dir": scratch, "subdir": "."}}
    store.store(name="quiet", node={"hydra": quiet}, package="_global_")


@protected_streams()
def run_command(name: str, schema: type[Schema], command: Callable[[Schema], None]) -> None:
    """Composes `configs/NAME.yaml` with the command line's overrides, checks it, and calls the command.

    Ends the process with status 2 and one sentence for a configuration that cannot be, with status
    1 and one sentence for what the command says is wrong. MOCO_TRACEBACK=1 shows the traceback instead. A run that was
    stopped before its end, with everything saved, ends with 75 (EX_TEMPFAIL: the same command goes on), or with 130
    where Ctrl-C stopped it; a second Ctrl-C leaves at once, with 130 too. Help that nobody reads to its end (`| head`)
    ends with 141, as a shell has it.

    Args:
        name: the top-level YAML file, without its ending.
        schema: the dataclass that the composed configuration must fit.
        command: what to do with it.
    """
    plain = warnings.formatwarning
    warnings.formatwarning = lambda message, category, *rest: (
        f"moco: warning: {message}\n" if issubclass(category, RunWarning) else plain(message, category, *rest)
    )
    composed: list[DictConfig] = []  # one, or with --multirun one a job; none after --help or --cfg
    # Hydra would print errors over several lines and exit; this makes it raise them instead.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        with tempfile.TemporaryDirectory() as scratch, exit_on_broken_pipe():
            register(name, schema, scratch)
            # The command runs outside of Hydra, which would print a traceback of its own around any error.
            hydra.main(version_base="1.3", config_path=config_dir(), config_name=name)(composed.append)()
        _refuse_one_place(composed, schema)
        for each in composed:
            command(to_dataclass(each, schema))
    except (HydraException, OmegaConfBaseException) as error:
        _stop(2, _composition_error(error, schema), error)
    except ConfigError as error:
        _stop(2, str(error), error)
    except USER_ERRORS as error:
        _stop(1, f"{error} (MOCO_TRACEBACK=1 shows where)", error)
    except Preempted as stopped:  # nothing is wrong: no traceback is wanted
        if os.environ.get("RANK", "0") == "0":
            print_error(f"moco: {stopped}")
        sys.exit(stopped.status)
    except KeyboardInterrupt as error:
        _stop(
            130,
            "interrupted"
            + "; the same command goes on from the last checkpoint, or from the start if there is none yet"
            * (name == "train"),
            error,
        )


def to_dataclass(composed: DictConfig, schema: type[Schema]) -> Schema:
    """Return a composed configuration as an object of its schema.

    Checks it against the schema once more, because `+field=value` adds any field to what Hydra composed.

    Raises:
        ConfigError: if a group's name is not that of its schema.
        OmegaConfBaseException: for an unknown field or a value of another type.
    """
    typed = OmegaConf.structured(schema)
    for each in fields(schema):  # type: ignore[arg-type]
        schemas = SCHEMAS.get(each.type)
        if schemas is None:
            continue
        chosen, name = OmegaConf.get_type(composed, each.name), composed[each.name].name
        if schemas.get(name) is not chosen:
            raise ConfigError(
                f"{each.name}.name={name!r} does not choose a {each.name}: set {each.name}=OPTION, a file of "
                f"configs/{each.name}/ that opens with the defaults 'schema/NAME@_here_' (NAME is one of "
                f"{', '.join(schemas)})"
            )
        typed[each.name] = chosen
    config = OmegaConf.to_object(OmegaConf.merge(typed, OmegaConf.to_container(composed)))
    assert isinstance(config, schema)
    return config


def _refuse_one_place(composed: list[DictConfig], schema: type) -> None:
    """Refuses --multirun with jobs that would write over each other's files."""
    names = field_names(schema)
    place = "output" if "output" in names else "run"  # where `run` is what a command reads, it writes to `output`
    written = [
        next((f"{name}={each[name]}" for name in (place, "run", "checkpoint") if each.get(name)), "")
        for each in composed
    ]
    if place in names and len(set(written)) < len(written):
        example = "output=runs/seed_${seed}" if place == "output" else "run=runs/lr_${optim.lr}"
        twice = max(written, key=written.count)
        raise ConfigError(
            f"--multirun puts {written.count(twice)} jobs into {twice or 'one directory'}: give each its own {place} "
            f"by what differs, such as '{example}'"
        )


def _stop(status: int, sentence: str, error: BaseException) -> None:
    if os.environ.get("MOCO_TRACEBACK") == "1":
        raise error
    rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    if status == 2 or _comes_again(error):
        prevent_restart()  # --max-restarts would come to the same end, as often
    if local_rank == "0" or status == 1:  # what is wrong with the configuration is the same on every rank of a machine
        print_error(f"moco{'' if rank == '0' else f' (rank {rank})'}: {sentence}")
    else:
        time.sleep(3)  # torchrun ends all ranks when the first one leaves: that one must have spoken by then
    sys.exit(status)


def _comes_again(error: BaseException) -> bool:
    """Whether what a command failed with is a property of the data or of training, and so comes again: no accident."""
    decode = sys.modules.get("moco.data.decode")  # which imports torch: where it was not imported no picture was read
    return isinstance(error, FloatingPointError) or (decode is not None and isinstance(error, decode.ImageError))


def _composition_error(error: Exception, schema: type) -> str:
    """One sentence out of Hydra's and OmegaConf's several lines, with the nearest field for a misspelled one."""
    if isinstance(error, OverrideParseException):
        field, _, said = error.override.partition("=")
        whole = f"[{','.join(map(quoted, said[1:-1].split(',')))}]" if re.fullmatch(r"\[.*\]", said) else quoted(said)
        fix = f"quote its value, {shlex.quote(f'{field}={whole}')}" if said else "write field=value"
        return f"{error.override} cannot be read: {fix}"
    text = "\n".join(str(part) for part in (error, error.__cause__) if part is not None)
    known = field_names(schema)
    full_key = re.search(r"full_key: (\S+)", text)
    key = re.search(r"[Kk]ey '([^']+)' (?:is not in struct|not in '\w+')", text) or re.search(
        r"Could not override '([^']+)'", text
    )
    if key:
        wrong = full_key.group(1) if full_key else key.group(1)
        owner = re.search(r"not in '(\w+)'", text)
        for each in fields(schema):
            for name, chosen in SCHEMAS.get(each.type, {}).items():
                if owner and owner.group(1) == chosen.__name__ and wrong.startswith(f"{each.name}."):
                    return _unknown_field(wrong, name, [f"{each.name}.{one.name}" for one in fields(chosen)])
        if wrong == "experiment" and "method.name" in known:  # where a recipe can be taken at all
            return "a recipe must open with the line '# @package _global_': see README, a recipe of your own"
        free = [name for name in known if wrong.startswith(f"{name}.")]
        if free and not is_dataclass(_type_of(schema, free[-1])):
            return f"{free[-1]} does not hold {wrong.removeprefix(f'{free[-1]}.')!r} yet: add it with +{wrong}=VALUE"
        close = difflib.get_close_matches(wrong, known, n=1, cutoff=0.7)
        if wrong == "experiment" and "recipe" in known:
            close = ["recipe"]
        return f"there is no field {wrong!r}" + (f"; did you mean {close[0]!r}?" if close else "")
    value = re.search(r"Value '([^']*)' of type '(\w+)' could not be converted to (\w+)", text)
    if value and full_key:
        return f"{full_key.group(1)}={value.group(1)} must be of type {value.group(3).lower()}"
    switch = re.search(r"Value '([^']*)' is not a valid bool", text)
    if switch and full_key:
        return f"{full_key.group(1)}={switch.group(1)} must be true or false"
    single = re.search(r"Error merging override \+*(\S+)=(\S+)\n.*is not a ListConfig", text)
    if single:
        return f"{single.group(1)}={single.group(2)} must be a list: {single.group(1)}=[{single.group(2)}]"
    comma = re.search(r"Ambiguous value for argument '([^=]+)=(.*)'", text)
    if comma:
        name, parts = comma.groups()
        whole = shlex.quote(f"{name}={quoted(parts)}")
        return f"{name}={parts} is a list, '{name}=[{parts}]', or text with a comma, {whole}: write which"
    missing = re.search(r"(?:Could not find|In '[^']*': Could not find) '([^']+)'\n*((?:.*\n?)*)", text)
    if missing:
        options = re.findall(r"^\t(\S+)$", text, flags=re.M)
        close = difflib.get_close_matches(missing.group(1).split("/")[-1], options, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"there is no {missing.group(1)!r}{hint}" + (f"; there are: {', '.join(options)}" if options else "")
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def _unknown_field(wrong: str, name: str, known: list[str]) -> str:
    """A sentence for a field that the chosen schema of a group does not have."""
    close = difflib.get_close_matches(wrong, known, n=1, cutoff=0.7)
    hint = f"did you mean {close[0]!r}?" if close else f"its fields are {', '.join(known)}"
    return f"{wrong} is not a field of {name}; {hint}"


def _type_of(schema: Any, name: str) -> Any:
    """The annotated type of a dotted field."""
    for part in name.split("."):
        schema = next(each.type for each in fields(schema) if each.name == part)
    return schema


def field_names(schema: Any, prefix: str = "") -> list[str]:
    """Every field of a nested dataclass, dotted."""
    names = []
    for each in fields(schema):
        names.append(prefix + each.name)
        if is_dataclass(each.type):
            names += field_names(each.type, f"{prefix}{each.name}.")
    return names
