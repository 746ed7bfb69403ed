#!/usr/bin/env python3
"""Writes docs/config/: a page for each group of the configuration and for each command, from the schemas themselves.

    python -m scripts.config_pages              # writes the pages anew
    python -m scripts.config_pages --check      # writes nothing; status 1 where a page is not what it would write

Types, defaults and meanings come from the dataclasses in moco/config/ and the strings below their fields, values from
configs/. A command is found by its configs/NAME.yaml, its schema by its name: moco.config.NAME, NameConfig.
"""

import ast
import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from moco.config import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    EvaluateConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    config_dir,
)
from moco.config.subject import SubjectConfig
from moco.data.view import View
from moco.methods import METHODS

CONFIGS = Path(config_dir())
PAGES = Path(__file__).resolve().parents[1] / "docs" / "config"
HEAD = (
    "<!-- Written by scripts/config_pages.py from moco/config/ and configs/: change these, then run it again. -->\n\n"
)
GROUPS: dict[str, type] = {
    "data": DataConfig,
    "augment": AugmentConfig,
    "model": ModelConfig,
    "method": MethodConfig,
    "optim": OptimConfig,
    "evaluate": EvaluateConfig,
    "checkpoint": CheckpointConfig,
}
SCHEMAS: dict[type, dict[str, type[MethodConfig]]] = {MethodConfig: METHODS}  # the schemas that add to a group's own
OPTIONS = {"knn": "preset", "linear": "protocol"}  # commands that have a group of their own
EXPLAINED: dict[type, type] = {AugmentConfig: View}  # a schema whose fields another class explains


def commands() -> dict[str, type]:
    """The schema of each command, by the name of its YAML file."""
    found = {}
    for path in sorted(CONFIGS.glob("*.yaml")):
        schema = "".join(part.title() for part in path.stem.split("_")) + "Config"
        found[path.stem] = getattr(importlib.import_module(f"moco.config.{path.stem}"), schema)
    return found


def own_pages() -> dict[type, str]:
    """The page of each schema that has one."""
    return {SubjectConfig: "judge"} | {schema: name for name, schema in (GROUPS | commands()).items()}


def explained(schema: type) -> dict[str, tuple[str, str]]:
    """Each field that a class itself declares: its type as written, and the string below it (empty without one)."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(schema))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for line, below in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            said = text.value if isinstance(text, ast.Constant) and isinstance(text.value, str) else ""
            found[line.target.id] = (ast.unparse(line.annotation), " ".join(said.split()))
    return found


def values(path: Path) -> dict[str, Any]:
    """What a YAML file sets, without what is Hydra's."""
    loaded = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    return {name: value for name, value in loaded.items() if name not in ("defaults", "hydra")}


def comment(path: Path) -> str:
    """The lines of comment that open a YAML file, without Hydra's own."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line[1:].removeprefix(" "))
    return "\n".join(lines)


def written(value: Any) -> str:
    """A value as on the command line, in code; nothing for an empty text."""
    if isinstance(value, str):
        return f"`{value}`" if value else ""
    if isinstance(value, float):
        return f"`{value:.6g}`"
    if isinstance(value, list):
        return f"`[{','.join(written(each).strip('`') for each in value)}]`"
    if isinstance(value, Mapping):
        inside = ", ".join(f"{name}: {written(each).strip('`')}" for name, each in value.items())
        return f"`{{{inside}}}`"
    return f"`{yaml.safe_dump(value).splitlines()[0]}`"  # null, true, 3


def limits(field: Field[Any]) -> str:
    """Return the values that a field accepts, to be appended to its type: ", at least 1"."""
    bounds = field.metadata.get("bounds")
    if bounds is None:
        return ""
    each = "each " if "list" in str(field.type) else ""
    length = "not empty" if field.type is str and bounds.min_length else bounds.length()
    parts = [length, each + bounds.element() if bounds.element() else "", "no value twice" if bounds.unique else ""]
    return "".join(f", {part}" for part in parts if part)


def row(*cells: str) -> str:
    """One line of a table."""
    return "| " + " | ".join(each.replace("|", "\\|") for each in cells) + " |\n"


def table(schema: type, told: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The fields of a schema and of its parents, and a table for each nested schema: all those without a page."""
    pages = own_pages()
    said: dict[str, tuple[str, str]] = {}
    for base in reversed(schema.__mro__):
        if base is schema or (is_dataclass(base) and base not in pages):
            said |= explained(base)
    elsewhere = explained(EXPLAINED[schema]) if schema in EXPLAINED else {}
    yield row("field", "type", "default", "meaning") + row("---", "---", "---", "---")
    nested = []
    for each in fields(schema):
        if each.name not in said:
            continue  # inherited
        kind, meaning = said[each.name]
        meaning = meaning or elsewhere.get(each.name, ("", ""))[1]
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        default = told.get(each.name, default)
        if is_dataclass(each.type):
            assert isinstance(each.type, type)
            page = pages.get(each.type)
            kind, default = (f"[{page}]({page}.md)" if page else "the fields below"), ""
            nested += [] if page else [each]
        else:
            optional = default is None and "None" not in kind
            kind = kind.replace(" | None", " or null") + " or null" * optional + limits(each)
            default = written(default)
        yield row(f"`{prefix}{each.name}`", kind, default, meaning)
    for each in nested:
        assert isinstance(each.type, type)
        yield f"\n## `{prefix}{each.name}`\n\n{docstring(each.type)}\n\n"
        yield from table(each.type, told.get(each.name, {}), f"{prefix}{each.name}.")


def docstring(schema: type) -> str:
    """A schema's own words."""
    return inspect.cleandoc(schema.__doc__ or "")


def options(group: str) -> Iterator[str]:
    """The options of a group: what each says of itself, and the values that it sets."""
    files = sorted((CONFIGS / group).glob("*.yaml"))
    yield f"\n## Options\n\n`{group}=NAME` takes the values of `configs/{group}/NAME.yaml`.\n\n"
    for path in files:
        yield f"### {path.stem}\n\n```text\n{comment(path)}\n```\n\n"
    flat = {path.stem: flattened(values(path)) for path in files}
    names = list(dict.fromkeys(name for each in flat.values() for name in each))
    yield row("field", *flat) + row(*["---"] * (1 + len(flat)))
    for name in names:
        yield row(f"`{name}`", *(written(each[name]) if name in each else "" for each in flat.values()))


def flattened(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def group_page(name: str, schema: type) -> Iterator[str]:
    """The page of a group of moco.train."""
    told = values(CONFIGS / "train.yaml").get(name, {})
    yield f"# {name}\n\n{docstring(schema)} Schema: `{source(schema)}`. On the command line: `{name}.FIELD=VALUE`.\n\n"
    if (CONFIGS / name).is_dir():
        yield "The defaults are the schema's; the options below set others.\n\n"
    yield from table(schema, told)
    for option, added in SCHEMAS.get(schema, {}).items():
        yield f"\n## {option}\n\n{docstring(added)} Schema: `{source(added)}`. It has the fields above and these:\n\n"
        yield from table(added, told)
    if (CONFIGS / name).is_dir():
        yield from options(name)


def command_page(name: str, schema: type) -> Iterator[str]:
    """The page of a command."""
    path = CONFIGS / f"{name}.yaml"
    yield f"# moco.{name}\n\n{docstring(schema)} Schema: `{source(schema)}`; values: `configs/{name}.yaml`.\n\n"
    pages = own_pages()
    shared = [f"[{pages[base]}]({pages[base]}.md)" for base in schema.__mro__[1:] if base in pages]
    if shared:
        yield f"It has the fields of {' and '.join(shared)} as well.\n\n"
    defaults = [each for each in yaml.safe_load(path.read_text(encoding="utf-8"))["defaults"] if isinstance(each, dict)]
    chosen = [f"`{group}={option}`" for each in defaults for group, option in each.items() if option]
    chosen = [each for each in chosen if "hydra" not in each]
    if chosen:
        yield f"Options unless others are named: {', '.join(chosen)}.\n\n"
    yield from table(schema, values(path))
    if name in OPTIONS:
        yield from options(OPTIONS[name])


def recipes_page() -> Iterator[str]:
    """The page of the recipes: what each file says of itself."""
    yield "# experiment\n\n"
    yield "The recipes: `python -m moco.train experiment=NAME`. Each is a file in `configs/experiment/` and "
    yield "opens with its command, hardware, time and what to expect, as here. A test composes and checks all.\n"
    for path in sorted((CONFIGS / "experiment").glob("*.yaml")):
        yield f"\n## {path.stem}\n\n```text\n{comment(path)}\n```\n"


def index_page() -> Iterator[str]:
    """The page that links all others."""
    yield "# Configuration\n\nEvery field of every command. `python -m moco.NAME --cfg job` prints the values as "
    yield "composed, `--help` the options.\n\n## Groups of moco.train\n\n"
    yield "".join(f"- [{name}]({name}.md): {first(schema)}\n" for name, schema in GROUPS.items())
    yield "- [experiment](experiment.md): the recipes.\n\n## Commands\n\n"
    yield "".join(f"- [moco.{name}]({name}.md): {first(schema)}\n" for name, schema in commands().items())
    yield f"- [judge](judge.md): {first(SubjectConfig)}\n"


def first(schema: type) -> str:
    """The first line of a schema's docstring."""
    return docstring(schema).splitlines()[0]


def source(schema: type) -> str:
    """The file of a schema, from the top of the repository."""
    return schema.__module__.replace(".", "/") + ".py"


def pages() -> dict[str, str]:
    """Every page by its file name."""
    made = {"index": index_page(), "experiment": recipes_page()}
    made |= {name: group_page(name, schema) for name, schema in GROUPS.items()}
    made |= {name: command_page(name, schema) for name, schema in commands().items()}
    about = "# judge\n\nWhat the commands that judge or use an encoder share. Schema: `moco/config/subject.py`.\n\n"
    made["judge"] = iter([about, *table(SubjectConfig, {})])
    return {f"{name}.md": HEAD + "".join(parts) for name, parts in made.items()}


def main(arguments: list[str]) -> int:
    """Writes or checks; gives the status."""
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    made = pages()
    there = {path.name: path.read_text(encoding="utf-8") for path in PAGES.glob("*.md")}
    stale = sorted(name for name in made | there if made.get(name) != there.get(name))
    if arguments:
        for name in stale:
            print(
                f"docs/config/{name} is not what the schemas say: run python -m scripts.config_pages", file=sys.stderr
            )
        return int(bool(stale))
    PAGES.mkdir(parents=True, exist_ok=True)
    for name in stale:
        if name in made:
            (PAGES / name).write_text(made[name], encoding="utf-8")
        else:
            (PAGES / name).unlink()
    print(f"docs/config: {len(made)} pages, {len(stale)} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
