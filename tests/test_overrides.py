"""Text fields keep the characters that the person typed, or the value is refused with the quotes to use."""

import importlib
import os
import re
import shlex
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError

from moco import composition
from moco.config import ConfigError, config_dir
from moco.config.quoting import quoted
from moco.overrides import keep_text, split

COMMANDS = sorted(path.stem for path in Path(config_dir()).glob("*.yaml"))
HARD = (
    *("2024_01", "1.10", "1_0", "1e5", "+5", "-5", "0x10", "007", "1:30", "inf", "nan", "true", "False", "no", "null"),
    *("NULL", "~", "~/x", "~nobody_has_this_name", "a b", " a", "it's", '"a', "'a'b", '"a"', "Bücher", "日本", "a,b"),
    *("a=b", "[a]", "[a", "a]", "{a: 1}", "{a", "$HOME", "a$b", "${x", "${seed}", "a\\,b", "a\\x", "\\", "str(5)"),
    *("f(x)", "(a)", "choice(1,2)", "range(1,3)", "???", "#a", "a#b", "!a", "@a", "%a", "a:b", "a: b", "a\nb", "a;b"),
)
TEXT = st.one_of(st.sampled_from(HARD), st.text(st.sampled_from("aé1_0.+-~ '\"\\,=:[]{}()$?#@!\n"), max_size=8))


def text_fields(name: str) -> tuple[type[Any], list[str]]:
    """The schema of a command and its text fields, without those that name a file of configs/."""
    title = "".join(part.title() for part in name.split("_"))
    schema = getattr(importlib.import_module(f"moco.config.{name}"), f"{title}Config")
    names = [field for field, kind in composition.field_types(schema).items() if kind in (str, str | None)]
    names = [field for field in names if not field.startswith("method.") and field != "protocol"]
    return schema, names


def composed(name: str, schema: type[Any], *arguments: str) -> Any:
    with patch.object(sys, "argv", [name, *arguments]):
        (config,) = composition.compose(name, schema)
    return config


def of(config: Any, field: str) -> Any:
    for part in field.split("."):
        config = getattr(config, part)
    return config


def quotes_of(text: str) -> bool:
    """Whether a text is in quotes, which are not part of it."""
    return len(text) > 1 and text[0] == text[-1] and text[0] in "'\""


@settings(max_examples=400)
@given(TEXT)
@example("a\\,b")
def test_hydra_reads_the_characters_that_were_typed_or_they_are_refused(text: str) -> None:
    def read(argument: str) -> Any:
        (kept,) = keep_text([argument], {"field": str})
        (parsed,) = OverridesParser.create().parse_overrides([kept])
        if parsed.is_sweep_override():
            raise ConfigError(composition._invalid_value(f"Ambiguous value for argument '{kept}'"))
        return OmegaConf.create({"field": parsed.value()}).field

    try:
        value = read(f"field={text}")
    except OverrideParseException as error:
        assert "," in text
        sentence = composition._unreadable_override(error.override)
    except ConfigError as error:
        sentence = str(error)
    except InterpolationKeyError:
        return  # a complete reference
    else:
        assert quotes_of(text) or value == text
        return
    assert f"field={text}" in sentence
    if "${" not in text and text.strip() != "???":
        fixed = re.findall(r"'field=\"[\s\S]*\"'", sentence)
        assert read(shlex.split(fixed[-1])[0]) == text


@pytest.mark.parametrize("name", COMMANDS)
def test_all_text_fields_of_a_command_keep_their_characters(name: str) -> None:
    schema, fields = text_fields(name)
    kept = [each for each in HARD if not any(part in each for part in ("${", "~", "???"))]
    first = COMMANDS.index(name) * 5  # each command begins with other texts
    fields = [field for field in fields if field != "recipe"]  # set by experiment=NAME
    texts = {field: kept[(first + i) % len(kept)] for i, field in enumerate(fields)}
    arguments = []
    for field, text in texts.items():
        try:
            arguments += keep_text([f"{field}={text}"], {field: str})
        except ConfigError:
            arguments.append(f"{field}={quoted(text)}")
        if split(text) != [text.strip()]:  # a sweep
            arguments[-1] = f"{field}={quoted(text)}"
    config = composed(name, schema, *arguments)
    assert {field: of(config, field) for field in fields} == {
        field: text[1:-1] if quotes_of(text) else text for field, text in texts.items()
    }


SPACES = {
    ("data.root=My", "Photos"): "My Photos",
    ("data.root=My", "Photos", "-", "2024"): "My Photos - 2024",
    ("data.root=Familie,", "Freunde"): "Familie, Freunde",
    ("names=[My", "Photos/klein", "8.jpg]"): ["My Photos/klein 8.jpg"],
    ("names=[a.jpg,", "b", "c.jpg]"): ["a.jpg", "b c.jpg"],
    ("names=My", "Photos"): ["My Photos"],
    ("sizes=[0.2,", "1]"): [0.2, 1],
}
FIELDS = {"data.root": str, "names": list[str], "sizes": list[float], "epochs": int}


@pytest.mark.parametrize(("words", "value"), SPACES.items())
def test_an_argument_that_the_shell_divided_is_quoted_in_the_message(words: tuple[str, ...], value: Any) -> None:
    with pytest.raises(ConfigError, match=r"quote the whole argument") as caught:
        keep_text(["epochs=2", *words, "epochs=3"], FIELDS)
    fix = re.search(r"because of its spaces, (.*); otherwise", str(caught.value))
    assert fix is not None
    assert str(caught.value).startswith(f"{words[1]} cannot be read")
    (argument,) = shlex.split(fix[1])
    assert OverridesParser.create().parse_override(keep_text([argument], FIELDS)[0]).value() == value


@pytest.mark.parametrize(
    "arguments", [["epochs=2", "runs"], ["data.root=", "a"], ["data.root=a", "--cfg", "job"], ["data.root=a", "~b"]]
)
def test_other_words_are_left_to_hydra(arguments: list[str]) -> None:
    assert keep_text(arguments, FIELDS) == arguments


def test_a_path_without_its_field_is_left_to_hydra(tmp_path: Path) -> None:
    assert keep_text(["data.root=a", str(tmp_path)], FIELDS) == ["data.root=a", str(tmp_path)]


@pytest.mark.parametrize("text", ["a.jpg", "My Photos/klein 8.jpg", "Straße/写真.jpg", "a'b", "${HOME", "1"])
def test_one_text_for_a_list_is_refused_with_a_list_to_copy(text: str) -> None:
    with pytest.raises(ConfigError, match="must be a list: ") as caught:
        keep_text([f"names={text}"], FIELDS)
    (argument,) = shlex.split(str(caught.value).partition("must be a list: ")[2])
    if "$" not in text:
        assert OverridesParser.create().parse_override(keep_text([argument], FIELDS)[0]).value() == [text]


def test_several_texts_for_a_list_are_refused_with_lists_to_copy() -> None:
    with pytest.raises(ConfigError, match=r"names=My Photos/a,b\.jpg must be a list: write") as caught:
        keep_text(["names=My Photos/a,b.jpg"], FIELDS)
    assert """'names=["My Photos/a",b.jpg]'""" in str(caught.value)
    assert """'names=["My Photos/a,b.jpg"]'""" in str(caught.value)


def test_a_comma_in_the_path_of_a_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("My Photos/Familie, Freunde/a,b 097.webp")
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(ConfigError, match="a comma separates") as caught:
        keep_text([f"names=[x.jpg,{path},y.jpg]"], FIELDS)
    (argument,) = shlex.split(str(caught.value).partition("in quotes, ")[2])
    (kept,) = keep_text([argument], FIELDS)
    assert OverridesParser.create().parse_override(kept).value() == ["x.jpg", str(path), "y.jpg"]
    for fine in ("names=[x.jpg,y.jpg]", f'names=["{path}"]'):
        assert keep_text([fine], FIELDS) == [fine]


@settings(max_examples=300)
@given(TEXT)
def test_quoted_text_is_kept_unchanged(text: str) -> None:
    if "${" not in text and text != "???":
        argument = f"run={quoted(text)}"
        assert keep_text([argument], {"run": str}) == [argument]


@settings(max_examples=200)
@given(st.lists(TEXT, max_size=3))
def test_a_list_of_text_is_kept_or_refused(texts: list[str]) -> None:
    try:
        (found,) = keep_text([f"runs=[{','.join(map(quoted, texts))}]"], {"runs": list[str]})
    except ConfigError as error:
        assert "runs" in str(error)  # noqa: PT017 # both outcomes are allowed
        assert any("${" in text or text == "???" for text in texts)
    else:
        assert [each for each in split(found.removeprefix("runs=")[1:-1]) if each] == list(map(quoted, texts))


@pytest.mark.parametrize(
    ("argument", "kept"),
    [
        ("run=2024_01", 'run="2024_01"'),
        ("run=runs/first", "run=runs/first"),
        ("+data.root=1.10", '+data.root="1.10"'),
        ("data.root=Bücher", 'data.root="Bücher"'),
        ("runs=[2024_01, r/a,'b,c']", "runs=[\"2024_01\",r/a,'b,c']"),
        ("overrides=[data.root=IMAGES,optim.milestones=[1,2]]", None),
        ("experiment=2024", 'experiment="2024"'),
        ("backbone=null", "backbone=null"),
        ("~run", "~run"),
        ("epochs=1e5", "epochs=1e5"),
        ("--config-dir", "--config-dir"),
    ],
)
def test_only_text_that_hydra_would_change_is_quoted(argument: str, kept: str | None) -> None:
    types = {"run": str, "data.root": str, "runs": list[str], "overrides": list[str], "backbone": str | None}
    expected = kept or 'overrides=["data.root=IMAGES","optim.milestones=[1,2]"]'
    assert keep_text([argument], types | {"epochs": int}) == [expected]


def test_a_sweep_keeps_the_characters_of_each_value() -> None:
    schema, _ = text_fields("train")
    with patch.object(sys, "argv", ["train", "-m", "run=1.10, 2024_01,ü"]):
        assert [each.run for each in composition.compose("train", schema)] == ["1.10", "2024_01", "ü"]
    with (
        patch.object(sys, "argv", ["train", "-m", "run=choice(1.10,2)"]),
        pytest.raises(ConfigError, match=r"run=choice\(1.10,2\) has the form of a function of Hydra"),
    ):
        composition.compose("train", schema)


def test_the_home_directory_is_expanded_in_every_path_field() -> None:
    home = os.path.expanduser("~")
    schema, _ = text_fields("search")
    arguments = ["run=~/r", "checkpoint=~/c", "output=~", "index=~/i", "query=[~/q.jpg]", "data.root=~/d"]
    config = composed("search", schema, *arguments, "weights=~/w")
    assert [config.run, config.checkpoint, config.output, config.index, config.query, config.data.root] == [
        *(f"{home}/r", f"{home}/c", home, f"{home}/i", [f"{home}/q.jpg"], f"{home}/d")
    ]
    assert config.weights == "~/w"


PATHS = {
    "run",
    "runs",
    "output",
    "checkpoint",
    "init_from",
    "index",
    "query",
    "root",
    "eval_root",
    "label_file",
    "more_roots",
    "subset_list",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_fields_with_the_names_of_paths_are_paths(name: str) -> None:
    def walk(schema: Any) -> None:
        for each in fields(schema):
            if is_dataclass(each.type):
                walk(each.type)
            elif each.name in PATHS:
                assert each.metadata["bounds"].path, each.name

    walk(text_fields(name)[0])


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("run: 2024_02", 'line 2: run: 2024_02 is not read as text: put it in quotes, "2024_02"'),
        ("run: 1.10", 'run: 1.10 .*"1.10"'),
        ("run: no", 'run: no .*"no"'),
        ("run: ~", 'run: ~ .*"~"'),
        ("data: {root: 1_0}", 'root: 1_0 .*"1_0"'),
        ("optim: {exclude: [bias, 1]}", 'exclude: 1 .*"1"'),
        ("method: {queue_start: 3}", 'queue_start: 3 .*"3"'),
        ("run: [a, b]", "line 2: run must be text"),
        ("epochs: [1]", r"mine\.yaml: epochs=\[1\] must be an integer"),
        ("optim: {exclude: bias}", r"optim.exclude='bias' must be a list: 'optim.exclude=\[bias\]'"),
        ("model: 3", "model=3 must hold named values: write model.backbone=VALUE"),
        ('run: "a', r"mine\.yaml is not valid YAML"),
        ("- a", r"mine\.yaml must hold lines of the form field: value"),
    ],
)
def test_a_recipe_with_a_value_of_another_type_is_refused(line: str, error: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{line}\n")
    with pytest.raises(ConfigError, match=error):
        composed("train", text_fields("train")[0], "--config-dir", str(tmp_path), "experiment=mine")


def test_a_recipe_in_quotes_is_read(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "2024.yaml").write_text('# @package _global_\nrun: "1.10"\nmodel: {options: {a: 1}}\n')
    config = composed("train", text_fields("train")[0], "--config-dir", str(tmp_path), "experiment=2024")
    assert (config.run, config.model.options["a"]) == ("1.10", 1)


@pytest.mark.parametrize(
    ("argument", "error"),
    [
        ("“run=r”", "“run=r” contains the character U+201C (left double quotation mark)"),
        ("run=“r”", "run=“r” contains the character U+201C (left double quotation mark)"),
        ("runs=[a,‘b’]", "runs=[a,‘b’] contains the character U+2018"),
        ("runs=[null]", "runs=null must be text: leave it out, or write 'runs=[\"null\"]' for this text"),
        ("–help", "–help contains the character U+2013 (en dash)"),
        ("epochs=1\u00a0", "epochs=1\u00a0 contains the character U+00A0 (no-break space)"),
        ("data.root=\u202aC:/x", "data.root=\u202aC:/x contains the character U+202A"),
        ("epochs=1;", "epochs=1; must be an integer"),
        ("epochs=1,000", "epochs=1,000 has a comma: write one value"),
        ("optim.lr=0,03", "optim.lr=0,03 has a comma: write a decimal point, optim.lr=0.03"),
    ],
)
def test_a_copied_or_misspelled_value_is_refused_with_advice_that_works(argument: str, error: str) -> None:
    types = {"run": str, "data.root": str, "runs": list[str], "epochs": int, "optim.lr": float}
    with pytest.raises(ConfigError) as caught:
        keep_text([argument], types)
    assert str(caught.value).startswith(error)
    for fixed in re.findall(r"write '([^']*)' for this text", str(caught.value)):
        assert keep_text([fixed], types) == [fixed]


def test_typographic_characters_inside_of_a_name_are_kept() -> None:
    assert keep_text(["run=Anna’s dogs"], {"run": str}) == ['run="Anna’s dogs"']
