"""Plug-ins: modules of other projects that add methods, backbones, data sets, ... by an entry in a dict of moco.

    python -m moco.train plugins=[my_package.my_module] method=my_method

A module is imported only because the command line or a local recipe names it, never because a checkpoint, a run or a
download does. docs/howto/extend.md has an example of each kind.
"""

import hashlib
import importlib
import importlib.metadata
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from moco.config import ConfigError, RunWarning, require

T = TypeVar("T")

_loaded: dict[str, str] = {}  # the plug-ins of this process and their versions


class UnknownName(ConfigError):
    """A field holds a name that no entry of its `Registry` has."""

    def __init__(self, field: str, name: str, known: str) -> None:
        super().__init__(
            f"{field}={name!r} must be one of {known}; for a name of a plug-in, add its module, plugins=[MODULE]"
        )
        self.field, self.name = field, name


class Registry(dict[str, T]):
    """The values of a field by name, such as the constructors of backbones.

    New names can be added; no entry can be replaced.

    Args:
        field: the field of the configuration that holds such names.
        entries: the entries that moco itself provides.
    """

    def __init__(self, field: str, entries: Mapping[str, T]) -> None:
        super().__init__(entries)
        self.field, self._shipped = field, frozenset(entries)

    @property
    def added(self) -> list[str]:
        """Return the names that plug-ins have added."""
        return [name for name in self if name not in self._shipped]

    def __setitem__(self, name: str, value: T) -> None:
        """Add an entry.

        Raises:
            ConfigError: if the name is taken: a run that names it would silently compute something else.
        """
        require(name not in self, f"{self.field}={name!r} exists already: a plug-in must choose another name")
        super().__setitem__(name, value)

    def find(self, name: str, also: str = "", field: str = "") -> T:
        """Return the entry of a name; raise UnknownName if there is none.

        Args:
            name: the name.
            also: further valid names, for the error.
            field: the field that holds the name, for the error, if it is not the field of the registry.
        """
        if name not in self:
            raise UnknownName(field or self.field, name, ", ".join([*self, also] if also else self))
        return self[name]


def check_options(field: str, function: Callable[..., Any], options: Any, arguments: int) -> None:
    """Raise ConfigError unless a function takes these options by name, after `arguments` positional arguments."""
    named = isinstance(options, Mapping) and all(isinstance(each, str) for each in options)
    require(named, f"{field}={options!r} must hold options by name: set {field}={{}} for their defaults")
    try:
        inspect.signature(function).bind(*[None] * arguments, **options)
    except TypeError as error:
        raise ConfigError(f"{field}={dict(options)}: {error}") from error


def load(names: Sequence[str]) -> None:
    """Import plug-ins, which add their entries to the dicts of moco. A loaded plug-in is skipped.

    Raises:
        ConfigError: if a name is not that of a module, or if the module cannot be found or imported.
    """
    for name in names:
        if name in _loaded:
            continue
        module = name.replace("/", ".").removesuffix(".py")
        valid = all(part.isidentifier() for part in name.split(".")) and module == name
        require(valid, f"plugins=[{name}] must name a module as Python's import does: plugins=[{module.strip('.')}]")
        try:
            _loaded[name] = _version(importlib.import_module(name))
        except (Exception, SystemExit) as error:  # whatever the module raises
            raise ConfigError(f"plugins=[{name}] cannot be imported: {_reason(name, error)}") from error


def _reason(name: str, error: BaseException) -> str:
    missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    if missing and f"{name}.".startswith(f"{missing}."):
        return f"there is no module {missing!r} in this directory ({Path.cwd()}) or among the installed packages"
    if isinstance(error, ConfigError):
        return str(error)
    message = " ".join(str(error).split())
    return f"it raises {type(error).__name__}{f' ({message})' if message else ''}; MOCO_TRACEBACK=1 shows where"


def _version(module: Any) -> str:
    """Return the version of a module, of its package or of its distribution; else the start of the file's SHA-256."""
    package = module.__name__.partition(".")[0]
    for one in (module, sys.modules.get(package)):
        if version := getattr(one, "__version__", None):
            return str(version)
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    file = getattr(module, "__file__", None)
    return f"sha256 {hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]}" if file else "unknown"


def versions() -> dict[str, str]:
    """Return the version of each plug-in of this process by the name of its module."""
    return dict(_loaded)


def recorded() -> dict[str, Any]:
    """Return {"plugins": `versions`} for a file that records what made it; {} without plug-ins."""
    return {"plugins": versions()} if _loaded else {}


@contextmanager
def naming_plugins(source: object, config: Mapping[str, Any]) -> Iterator[None]:
    """Turn the error for an unknown name into one that says which `plugins=` to add, if plug-ins are missing.

    Plug-ins are missing if the recorded configuration lists plug-ins that this process has not loaded.

    Args:
        source: the run or file that holds the configuration, for the error.
        config: the configuration. None of its plug-ins is imported.

    Raises:
        ConfigError: in place of an UnknownName, if plug-ins are missing.
    """
    try:
        yield
    except UnknownName as error:
        missing = missing_plugins(config)
        if not missing:
            raise
        raise ConfigError(
            f"{source} has {error.field}={error.name!r} of a plug-in, and plug-ins are imported only if you name them: "
            f"add {missing} to the command; in a Python program, first import the module that defines it"
        ) from error


def missing_plugins(config: Mapping[str, Any]) -> str:
    """Return the argument that loads the plug-ins of a recorded configuration; "" if all of them are loaded."""
    names = config.get("plugins")  # a list of modules, or a dict of their versions
    missing = [str(each) for each in names if each not in _loaded] if isinstance(names, list | Mapping) else []
    return f"plugins=[{','.join([*_loaded, *missing])}]" if missing else ""


def warn_of_other_versions(before: Any) -> None:
    """Warn of each plug-in whose version is not the recorded one; `before` are the recorded `versions`, if any.

    Another version is not refused, just as another version of moco is not: most new versions do not change results,
    and only their author knows which ones do.
    """
    for name, version in _loaded.items():
        then = before.get(name, version) if isinstance(before, Mapping) else version
        if then != version:
            message = f"plugins=[{name}] has version {version}, and the run was made with version {then}"
            warnings.warn(f"{message}: results may change", RunWarning, stacklevel=2)
