"""Check the fields on the command line and in YAML files, and keep the characters of text fields as they were typed.

Hydra and YAML convert a value before the schema is known: 1.10 becomes 1.1, and 2024_01 becomes 202401. Therefore the
overrides of the command line are rewritten before Hydra reads them: text that Hydra would change is quoted. In YAML
such a value is refused, because the file can be corrected.
"""

import os
import re
import shlex
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from itertools import combinations, takewhile
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, OverrideType, QuotedString, RangeSweep, Sweep
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moco.config import ConfigError, config_dir, require
from moco.config.quoting import override, quoted
from moco.config.types import members, type_error

# Hydra's functions: `extend_list` returns a list, the others return a sweep or convert a value to another type.
_FUNCTION = re.compile(
    r"\s*(choice|range|interval|glob|shuffle|sort|tag|extend_list|int|float|str|bool|json_str)\s*\(.*\)\s*", re.DOTALL
)

# Characters that copying a command from a document brings in: quotes, dashes, and invisible characters.
_QUOTES = "\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f\u00ab\u00bb\u2039\u203a\u2032\u2033"
_DASHES = "\u2010-\u2015\u2212"
_INVISIBLE = "\u00a0\u00ad\u2000-\u200f\u2028-\u202f\u205f-\u2064\u3000\ufeff"
_COPIED = re.compile(
    rf"(?:^|(?<=[=\[,]))[{_QUOTES}{_INVISIBLE}]|^[{_DASHES}]|[{_QUOTES}{_INVISIBLE}](?=[=\],]|$)", re.MULTILINE
)


class _Unreadable:
    """Stands for a value that Hydra cannot read."""


def keep_text(arguments: Sequence[str], types: Mapping[str, Any]) -> list[str]:
    """Return the arguments of a command line with quotes around text that Hydra would change.

    Args:
        arguments: the arguments, including options of Hydra such as --multirun.
        types: the types of all fields of the command by their dotted names.

    Raises:
        ConfigError: for a value that does not fit its field's type, or text that has another meaning to Hydra; the
            message names the field, the value and the quotes that make it text.
    """
    sweep = "--multirun" in arguments or "-m" in arguments
    for each in arguments:
        _refuse_copied(each)
    _refuse_divided_by_shell(arguments, types)
    return [each if each.startswith("-") else _override(each, types, sweep) for each in arguments]


def _override(argument: str, types: Mapping[str, Any], sweep: bool) -> str:
    key, equals, value = argument.partition("=")
    name = key.lstrip("+").partition("@")[0]
    kind = types.get(name, str)
    is_group = bool(re.fullmatch(r"\w+", name)) and Path(config_dir(), name).is_dir()
    group = is_group and (kind is str or is_dataclass(kind))
    if equals and not name:
        raise ConfigError(f"{argument} cannot be read: write field=value, without spaces around the =")
    if not equals or key.startswith("~") or not (group or name in types):
        return argument
    kind = str if group else kind
    values = split(value)
    if len(values) > 1 and not sweep:
        if not group:
            _refuse_several(name, value, kind)
        return argument  # Hydra refuses it as ambiguous
    if len(values) == 1 and not _is_list(value):
        values = [value]  # `split` would remove the spaces around it
    return f"{key}={','.join(_value(name, each, kind, group, sweep) for each in values)}"


def _refuse_divided_by_shell(arguments: Sequence[str], types: Mapping[str, Any]) -> None:
    """Refuse words after field=value that can belong to its value: a shell divides an unquoted value at spaces."""
    for i, argument in enumerate(arguments, start=1):
        name, _, value = argument.partition("=")
        kinds = members(types.get(name.lstrip("+"), Any))
        words = list(takewhile(lambda word: "=" not in word and not re.match(r"-+\w|~", word), arguments[i:]))
        whole, is_list = " ".join([value, *words]), value.startswith("[") and not value.endswith("]")
        if not (words and value) or not (is_list or {str, list[str]} & {*kinds}):
            continue
        if not is_list and _exists(words[0]) and not _exists(whole):
            continue  # a path, probably of another argument that lacks its field=
        if list[str] in kinds:
            fix = override(name, [_plain(each) for each in split(whole[1:-1])] if _is_list(whole) else [whole])
        else:
            fix = shlex.quote(f"{name}={whole}") if is_list else override(name, whole)
        raise ConfigError(
            f"{words[0]} cannot be read: if it belongs to {argument}, quote the whole argument because of its spaces, "
            f"{fix}; otherwise write field=value, without spaces around the ="
        )


def _refuse_divided_path(name: str, value: str) -> None:
    """Refuse a list of texts if a comma of it belongs to the path of an existing file or folder."""
    parts = value.strip()[1:-1].split(",")
    if len(parts) > 50 or re.search(r"""["'\[\]{}\\]""", value.strip()[1:-1]):
        return
    for start, end in combinations(range(len(parts) + 1), 2):
        path = ",".join(parts[start:end]).strip()
        if end - start > 1 and _exists(path) and not _exists(parts[start].strip()):
            entries = [*map(str.strip, parts[:start]), path, *map(str.strip, parts[end:])]
            raise ConfigError(
                f"{name}={value}: a comma separates the entries of a list, but {path} is one path: put it in quotes, "
                f"{override(name, entries)}"
            )


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))  # noqa: PTH110, PTH111  # pathlib raises errors for some texts


def _plain(value: str) -> str:
    """Return the characters of one text: without its quotes, if it is quoted."""
    parsed = _parse(value)
    return parsed.text if isinstance(parsed, QuotedString) else value


def _refuse_copied(argument: str) -> None:
    """Refuse a typographic quote, a dash or an invisible character where the command line needs a plain one."""
    key, equals, value = argument.partition("=")
    found = _COPIED.search(key + equals if value[:1] in {"'", '"'} else argument)
    if found is None:
        return
    name = unicodedata.name(found[0], "").lower()
    is_text = found.start() > len(key) and not value.startswith("[")
    text = f", or write {shlex.quote(f'{key}={quoted(value)}')} for this text" * is_text
    raise ConfigError(
        f"{argument} contains the character U+{ord(found[0]):04X} ({name}), which copying from a document brings in: "
        f"type the quotes, dashes and spaces of the command yourself{text}"
    )


def _refuse_several(name: str, value: str, kind: Any) -> None:
    """Refuse several values, separated by commas, without --multirun. Hydra refuses them for types not handled here."""
    texts = [_plain(each) for each in split(value)]
    if list[str] in members(kind):
        one = f"or, for one entry with a comma, {override(name, [value])}"
        raise ConfigError(f"{name}={value} must be a list: write {override(name, texts)}, {one}")
    jobs = "with --multirun, commas separate the values of several jobs"
    if str in members(kind):
        raise ConfigError(f"{name}={value} has a comma: write {override(name, value)} for this text; {jobs}")
    if not {int, float, bool} & {*members(kind)}:
        return
    number = float in members(kind) and re.fullmatch(r"([+-]?\d+),(\d+(?:[eE][+-]?\d+)?)", value.strip())
    fix = f"write a decimal point, {name}={number[1]}.{number[2]}" if number else "write one value"
    raise ConfigError(f"{name}={value} has a comma: {fix}; {jobs}")


def _value(name: str, value: str, kind: Any, group: bool, sweep: bool) -> str:
    """Return one value of an override, quoted if needed."""
    kinds = members(kind)
    if list[str] in kinds and _is_list(value):
        _refuse_divided_path(name, value)
        texts = split(value.strip()[1:-1])
        return f"[{','.join(_text(name, each, optional=False, sweep=False, in_list=True) for each in texts)}]"
    if str in kinds:
        return value if group and _is_list(value) else _text(name, value, type(None) in kinds, sweep)
    parsed = _parse(value)
    is_text = isinstance(parsed, _Unreadable | str | QuotedString) and value.strip()[:1] not in {"[", "{"}
    if list[str] in kinds and is_text:
        refers = isinstance(parsed, str) and "${" in parsed
        require(refers, f"{name}={value} must be a list: {override(name, [_plain(value)])}")
    elif isinstance(parsed, _Unreadable):
        error = type_error(name, _parts(value) if _is_list(value) else value, kind, value, exact=True)
        require(not error, error)
    elif not isinstance(parsed, Sweep) and not (isinstance(parsed, str) and "${" in parsed):
        error = type_error(name, parsed, kind, value)
        require(not error, error)
    return value


def _parts(value: str) -> list[Any]:
    """Return the values in a list, each as Hydra reads it, or as text if Hydra cannot read it."""
    texts = split(value.strip()[1:-1])
    return [text if isinstance(parsed := _parse(text), _Unreadable) else parsed for text in texts]


def _text(name: str, value: str, optional: bool, sweep: bool, in_list: bool = False) -> str:
    """Return a value of a text field, quoted unless Hydra reads exactly these characters."""
    parsed = _parse(value)
    whole = f"[{quoted(value)}]" if in_list else quoted(value)
    fix = f"write {shlex.quote(f'{name}={whole}')} for this text"
    if isinstance(parsed, QuotedString):
        _refuse_reference(name, parsed.text)
        return value
    if sweep and isinstance(parsed, Sweep) and _exact(parsed):
        return value
    if _FUNCTION.fullmatch(value):
        raise ConfigError(f"{name}={value} has the form of a function of Hydra: quote its values, or {fix}")
    if value.lstrip()[:1] in {"[", "{", '"', "'"}:
        raise ConfigError(f"{name}={value} must be text: {fix}")
    if parsed is None:
        if optional:
            return value
        raise ConfigError(f"{name}={value} must be text: leave it out, or {fix}")
    if isinstance(parsed, str) and "\\" in value and parsed != value:
        raise ConfigError(f"{name}={value} has backslashes that Hydra would remove: {fix}")
    _refuse_reference(name, value)
    return value if parsed == value else quoted(value)


def _refuse_reference(name: str, text: str) -> None:
    """Refuse text that OmegaConf does not read as text: an incomplete reference, or "???" (a missing value)."""
    try:
        if not OmegaConf.is_missing(OmegaConf.create({"text": text}), "text"):
            return
        problem = "marks a missing value"
    except OmegaConfBaseException:
        problem = "has an incomplete ${...}, which refers to the value of another field"
    raise ConfigError(f"{name}={text} {problem}: choose other text")


def _exact(sweep: Sweep) -> bool:
    """Return whether Hydra keeps the characters of all values of a sweep: they are text, or a range of integers."""
    if isinstance(sweep, ChoiceSweep):
        return all(isinstance(each, str | QuotedString) for each in sweep.list)
    return not isinstance(sweep, RangeSweep) or isinstance(sweep.start, int)


def _parse(value: str) -> Any:
    """Return what Hydra reads: text, a `QuotedString`, a number, a list, a `Sweep`, ..., or `_Unreadable`."""
    try:
        parsed = OverridesParser.create().parse_override(f"x={value}")
    except HydraException:
        return _Unreadable()
    assert parsed.type is OverrideType.CHANGE
    return parsed._value


def split(text: str) -> list[str]:
    """Split at the commas outside quotes and brackets, and remove spaces around each part; [""] for an empty text."""
    parts, depth, quote = [""], 0, ""
    for i, letter in enumerate(text):
        opens = not parts[-1].strip()  # a quote inside of text is an apostrophe
        escaped = (i - len(text[:i].rstrip("\\"))) % 2 == 1
        if quote:
            quote = "" if letter == quote and not escaped else quote
        elif letter in "'\"" and (opens or depth):
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in "]})":
            depth -= 1
        if letter == "," and depth <= 0 and not (quote or escaped):
            parts.append("")
        else:
            parts[-1] += letter
    return [each.strip() for each in parts]


def _is_list(value: str) -> bool:
    return value.strip().startswith("[") and value.strip().endswith("]")


@contextmanager
def checked_files(types: Mapping[str, Any]) -> Iterator[None]:
    """Let Hydra check each YAML file that it reads: raise ConfigError for a value that does not fit its field's type.

    A number or a word such as `true` in a text field is refused, because its characters are lost.
    """

    class CheckedSource(FileConfigSource):
        def load_config(self, config_path: str) -> ConfigResult:
            path = Path(self.path, self._normalize_file_name(config_path))
            try:
                result = super().load_config(config_path)
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
            package = result.header.get("package") or config_path.rpartition("/")[0].replace("/", ".")
            prefix = "" if package in ("", "_global_") else f"{package}."
            _check_file(path, OmegaConf.to_container(result.config), types, prefix, [])
            return result

    Plugins.instance()  # registers Hydra's own source of files
    sources = SourcesRegistry.instance().types
    before, sources["file"] = sources["file"], CheckedSource
    try:
        yield
    finally:
        sources["file"] = before


def _check_file(path: Path, values: Any, types: Mapping[str, Any], prefix: str, keys: list[Any]) -> None:
    """Check the values below `keys` in a file; the dotted names of their fields begin with `prefix`."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} must hold lines of the form field: value")
    for key, value in values.items():
        name, here = f"{prefix}{key}", [*keys, key]
        kinds = members(types.get(name, Any))
        if list[str] in kinds and isinstance(value, list):
            for i, each in enumerate(value):
                _check_text(path, each, [*here, i])
        elif str in kinds and not (value is None and type(None) in kinds):
            _check_text(path, value, here)
        elif name in types and not (isinstance(value, str) and "${" in value):
            error = type_error(name, value, types[name])
            require(not error, f"{path}: {error}")
        if isinstance(value, Mapping) and not (name in types and not is_dataclass(kinds[0])):
            _check_file(path, value, types, f"{name}.", here)


def _check_text(path: Path, value: Any, keys: Sequence[Any]) -> None:
    """Refuse a value of a text field that is not text; the error quotes the characters in the file."""
    if isinstance(value, str):
        return
    node: Any = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    for key in keys:
        node = node.value[key] if isinstance(key, int) else [one for name, one in node.value if name.value == key][-1]
    where = f"{path}, line {node.start_mark.line + 1}: {next(key for key in reversed(keys) if isinstance(key, str))}"
    if not isinstance(value, list | Mapping):
        raise ConfigError(f'{where}: {node.value} is not read as text: put it in quotes, "{node.value}"')
    raise ConfigError(f"{where} must be text, not a list or a group")
