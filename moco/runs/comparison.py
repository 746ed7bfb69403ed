"""The rows and columns of a table of results.json, and names that tell them apart.

A key identifies each row, and another key each column. Keys are derived from all fields of an entry, except those in
`EXCLUDED` and those that `_fields` leaves out of some entries. A field that is added to entries later thus keeps
different evaluations apart without a change here.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moco.config.base import flatten
from moco.config.data import FOLDERS
from moco.config.quoting import value_text

BASELINES = ("untrained", "pixels")
# The fields of an entry that are part of no key.
EXCLUDED = frozenset(
    [
        # Results.
        *("figures", "chosen", "each_seed", "per_seed", "problem", "choice.leave_one_out"),
        # The time, the versions and the machine; see `moco.runtime.provenance`.
        *("time", "moco", "commit", "torch", "plugins", "machine", "processes"),
        # Files and their format: sha256 identifies the weights, and subset_list_sha256 the list.
        *("source", "layout", "step", "saved", "settings.subset_list"),
        # The encoders beside which this one was evaluated.
        "settings.encoders",
        # How images are read or shown, and what only pretraining uses.
        *(f"data.{name}" for name in ("workers", "resident", "download", "preview", "allow_pipe", "on_bad_image")),
        *(f"data.{name}" for name in ("max_bad", "length", "shuffle_buffer", "weights")),
        # The numbers of boxes left out. data.sha256 covers all other boxes.
        *("data.training_boxes_left_out", "data.held_out_boxes_left_out"),
    ]
)
# The fields that identify an encoder, and thus its column. All others belong to the row.
ENCODER = frozenset(
    [
        *("encoder", "weights", "sha256", "projection_sha256", "projection", "backbone", "options", "channels"),
        *("initial_seed", "look", "trained_with_labels"),
    ]
)
# The fields that an entry may lack, because an earlier version wrote it, or its command does not use that part of the
# encoder.
_OPTIONAL = frozenset(
    [
        *("weights", "channels", "initial_seed", "projection", "projection_sha256", "data.sha256"),
        "trained_with_labels",
        *("look.size", "look.resize", "look.mean", "look.std"),
        *("settings.kind", "settings.seed", "settings.mean", "settings.std", "settings.precision"),
    ]
)
_SECTIONS = ("data", "settings", "choice", "look")  # their fields have dotted names
# Fields that are part of no key of the baselines "untrained" and "pixels".
# They describe the pretrained encoder.
_NOT_OF_UNTRAINED = frozenset(["weights", "sha256", "projection_sha256", "trained_with_labels"])
_NOT_OF_PIXELS = (ENCODER - {"encoder", "look"}) | {"look.mean", "look.std"}
# The text of some fields in a name; the text of all other fields is NAME=VALUE. To tell names apart, the texts of the
# fields in `_WORDS` are appended first, in this order.
_WORDS: dict[str, Callable[[Any], str]] = {
    "data.classes": lambda value: f"{len(value)} classes",
    "data.training": lambda value: f"{value:,} training images",
    "data.held_out": lambda value: f"{value:,} held-out images",
    "data.bits": lambda value: f"bits={'automatic' if value is None else value}",
    "initial_seed": lambda value: f"seed {value}",
}
# Settings that the field `changed` of an entry may lack. If rows of one protocol differ in them, their names say so.
_NOT_IN_CHANGED = ("settings.draws", "settings.seeds", "settings.validation")
# Fields that are digests, and what such a digest identifies.
_DIGESTS = {"data.sha256": "images or labels", "sha256": "weights", "projection_sha256": "projection head"}
_LONGEST = 100  # largest number of characters of a field in a name
_DIGEST = re.compile(r"[0-9a-f]{64}")

Key = frozenset[tuple[str, str]]  # the names of fields, and their values as JSON


class Placed(NamedTuple):
    """An entry of results.json, and its place in a table."""

    entry: Mapping[str, Any]
    evaluation: str  # command, protocol and settings; with `data` it names the row
    data: str
    encoder: str  # the column


def placed(
    entries: Sequence[Mapping[str, Any]], shown: Callable[[Mapping[str, Any]], Any] = lambda entry: entry
) -> list[Placed]:
    """Return the newest entry of each evaluation of each encoder, with the names of its row and column.

    Different rows have different names, and so do different columns.

    An entry of an earlier version lacks fields. It joins an existing row (or column) if all fields that the entry lacks
    are in `_OPTIONAL`, and exactly one row (or column) agrees with it in all other fields. Otherwise the entry has its
    own row (or column).

    Args:
        entries: the entries, oldest first.
        shown: returns the entry from which the names are made, such as one without paths.
    """
    visible = [shown(entry) for entry in entries]
    row_keys, column_keys = ([_key(entry, of_encoder) for entry in entries] for of_encoder in (False, True))
    rows, columns = _completed_keys(row_keys), _completed_keys(column_keys)
    row_names = _named(rows, dict(zip(row_keys, visible, strict=True)), _row_titles)
    column_names = _named(columns, dict(zip(column_keys, visible, strict=True)), _column_titles)
    newest = dict(zip(zip(rows, columns, strict=True), entries, strict=True))
    return [Placed(entry, *row_names[row], *column_names[column]) for (row, column), entry in newest.items()]


def of_weights(entries: Sequence[Mapping[str, Any]], digests: Sequence[str]) -> list[Mapping[str, Any]]:
    """Return the entries of weights with one of these digests, and the baselines of the same evaluations.

    A baseline that was measured beside other weights is kept if its network, the preparation of images, the settings
    and the data are those of an entry of these weights.
    """

    def evaluation(entry: Mapping[str, Any]) -> tuple[Key, str]:
        network = [entry.get(name) for name in ("backbone", "options", "channels", "look")]
        return _key(entry, of_encoder=False), json.dumps(network, sort_keys=True, default=str)

    own = [each.get("sha256") in digests for each in entries]
    known = {evaluation(each) for each, is_own in zip(entries, own, strict=True) if is_own}
    return [
        each
        for each, is_own in zip(entries, own, strict=True)
        if is_own or (each.get("encoder") in BASELINES and evaluation(each) in known)
    ]


def _key(entry: Mapping[str, Any], of_encoder: bool) -> Key:
    """Return the key of an entry's column if `of_encoder`, else of its row."""
    fields = _fields(entry, of_encoder)
    return frozenset((name, json.dumps(value, sort_keys=True, default=str)) for name, value in fields.items())


def _fields(entry: Mapping[str, Any], of_encoder: bool) -> dict[str, Any]:
    """Return the fields of an entry that are part of the key of its column if `of_encoder`, else of its row."""
    found: dict[str, Any] = {}
    for name, value in entry.items():
        nested = name in _SECTIONS and isinstance(value, Mapping)
        found.update({f"{name}.{each}": value[each] for each in value} if nested else {name: value})
    without = set(EXCLUDED)
    if "choice.k" in found:  # then k and temperature are results: the best of the values in `choice`
        without |= {"settings.k", "settings.temperature"}
    if found.get("data.name") == "digits":  # scikit-learn contains the images: data.root has no effect
        without.add("data.root")
    if "backbone_sha256" in found:  # then sha256 covers the projection head, too
        found["projection_sha256"], found["sha256"] = found.get("sha256"), found.pop("backbone_sha256")
    # Fields images.* that the command line sets belong to the row, as part of "changed".
    if isinstance(entry.get("changed"), Mapping):
        without |= {f"look.{each.removeprefix('images.')}" for each in entry["changed"]}
    if entry.get("encoder") in BASELINES:
        without |= _NOT_OF_UNTRAINED if entry["encoder"] == "untrained" else _NOT_OF_PIXELS
    kept = {name: value for name, value in found.items() if name not in without}
    return {n: value for n, value in kept.items() if (n in ENCODER or n.startswith("look.")) == of_encoder}


def _completed_keys(keys: Sequence[Key]) -> list[Key]:
    """Replace each key by the key that has the same fields and more from `_OPTIONAL`, if there is exactly one."""
    found: dict[Key, Key] = {}
    for key in sorted(set(keys), key=len, reverse=True):
        larger = {each for each in found.values() if key < each and {name for name, _ in each - key} <= _OPTIONAL}
        found[key] = larger.pop() if len(larger) == 1 else key
    return [found[key] for key in keys]


def _named(
    keys: Sequence[Key], visible: Mapping[Key, Any], titles: Callable[[Sequence[Any], Sequence[Key]], list[list[str]]]
) -> dict[Key, list[str]]:
    """Return the title of each key, made from an entry with this key."""
    distinct = list(dict.fromkeys(keys))
    return dict(zip(distinct, titles([visible[key] for key in distinct], distinct), strict=True))


def _row_titles(entries: Sequence[Mapping[str, Any]], keys: Sequence[Key]) -> list[list[str]]:
    """Return distinct pairs of texts: the command with its protocol and settings, and the data."""
    titles = [[label(entry), evaluated_on(_mapping(entry.get("data")))] for entry in entries]
    fields = [flatten(_fields(entry, of_encoder=False)) for entry in entries]
    protocols = [[str(entry.get(name)) for name in ("command", "protocol")] for entry in entries]
    for name in _NOT_IN_CHANGED:
        _tell_apart(titles, 0, ["" if _is_changed(name, each) else _detail(name, each) for each in fields], protocols)
    for name in _in_order(fields):
        _tell_apart(titles, int(name.startswith("data.")), [_detail(name, each) for each in fields])
    data = [frozenset(item for item in key if item[0].startswith("data.")) for key in keys]
    _tell_others_apart(titles, 1, data)
    _tell_others_apart(titles, 0, keys)
    return titles


def _is_changed(name: str, fields: Mapping[str, Any]) -> bool:
    """Return whether `label` names this setting."""
    return f"changed.{name.removeprefix('settings.')}" in fields


def _column_titles(entries: Sequence[Mapping[str, Any]], keys: Sequence[Key]) -> list[list[str]]:
    """Return distinct names of encoders, each as a list of one text."""
    fields = [flatten(_fields(entry, of_encoder=True)) for entry in entries]
    titles = [[str(entry.get("encoder", "?"))] for entry in entries]
    for title, each in zip(titles, fields, strict=True):
        title[0] += f", {each['weights']}" if each.get("weights", "encoder") != "encoder" else ""
        title[0] += ", trained with labels" * bool(each.get("trained_with_labels"))
    for detail in (_run_of, lambda entry: f", step {entry.get('step', '?')}"):
        _tell_apart(titles, 0, ["" if each.get("encoder") in BASELINES else detail(each) for each in entries])
    for name in _in_order(fields):
        _tell_apart(titles, 0, [_detail(name, each) for each in fields])
    _tell_apart(titles, 0, [f", weights {each['sha256'][:8]}" if each.get("sha256") else "" for each in fields])
    _tell_others_apart(titles, 0, keys)
    return titles


def _run_of(entry: Mapping[str, Any]) -> str:
    """Return a comma and the folder of the encoder's file, or the run of a checkpoint; "" if it is unknown."""
    folder = Path(str(entry.get("source", ""))).parent
    name = (folder.parent if folder.name == "checkpoints" else folder).name
    return f", {name}" * bool(name)


def _in_order(fields: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of all fields, those in `_WORDS` first."""
    return list(dict.fromkeys([*_WORDS, *(name for each in fields for name in each)]))


def _detail(name: str, fields: Mapping[str, Any]) -> str:
    """Return a field and its value, to append to a name; "" if it is unknown or too long."""
    if name not in fields or name.startswith("changed"):  # `label` names what changed
        return ""
    value = fields[name]
    shown = name.removeprefix("settings.").removeprefix("data.").replace("look.", "images.", 1)
    try:
        text = _WORDS[name](value) if name in _WORDS else f"{shown}={value_text(value)}"
    except (TypeError, ValueError):  # results.json may come from others
        return ""
    return f", {text}" if len(text) <= _LONGEST and not _DIGEST.search(text) else ""


def _tell_apart(
    titles: list[list[str]], part: int, details: Sequence[str], groups: Sequence[Sequence[str]] | None = None
) -> None:
    """Extend several equal titles, each by its own detail, if these details differ.

    Args:
        titles: each a list of texts; changed in place.
        part: the index of the text to which the detail is appended.
        details: one for each title.
        groups: one for each title; if given, titles with equal groups are extended instead of equal titles.
    """
    for same in _equal(groups or titles):
        if len({details[i] for i in same}) > 1:
            for i in same:
                titles[i][part] += details[i]


def _tell_others_apart(titles: list[list[str]], part: int, keys: Sequence[Key]) -> None:
    """Extend equal titles with different keys: name the fields that differ from those of the first key.

    Titles with the first key stay as they are. If several other keys differ in the same fields, a number tells them
    apart. A digest is named only if nothing else differs. `titles` and `part`: see `_tell_apart`.
    """
    for same in _equal(titles):
        others, counts = {keys[same[0]]: ""}, Counter[str]()
        for i in same:
            if keys[i] not in others:
                names = {name for name, _ in keys[i] ^ keys[same[0]]}
                shown = sorted(name.rpartition(".")[2] for name in names - _DIGESTS.keys())
                what = f"other {', '.join(shown or sorted(_DIGESTS[name] for name in names))}"
                counts[what] += 1
                others[keys[i]] = f" ({what}, {counts[what] + 1})" if counts[what] > 1 else f" ({what})"
            titles[i][part] += others[keys[i]]


def _equal(titles: Sequence[Sequence[str]]) -> list[list[int]]:
    """Return the indices of each group of several equal titles."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, title in enumerate(titles):
        groups.setdefault(tuple(title), []).append(i)
    return [each for each in groups.values() if len(each) > 1]


def label(entry: Mapping[str, Any]) -> str:
    """Return the command and the protocol of an entry, with the fields that differ from the protocol's values."""
    name = f"{entry.get('command', '?')}, {entry.get('protocol', '?')}"
    changed = entry.get("changed")
    if not isinstance(changed, Mapping) or not changed:
        return name
    shown = (f"{field.lstrip('+')}={value_text(value)}" for field, value in changed.items())
    return f"{name} ({', '.join(shown)})"


def data_name(data: Mapping[str, Any]) -> str:
    """Return the name of an entry's data set. The root is left out where it is only the folder of the download."""
    has_root = data.get("name") in (None, *FOLDERS, "huggingface")  # None: data of moco.segment and moco.detect
    names = ("name", "root", "file", "subset") if has_root else ("name",)
    more = data.get("more_roots") or []
    return " ".join([*(str(data[name]) for name in names if data.get(name)), *map(str, more)])


def evaluated_on(data: Mapping[str, Any]) -> str:
    """Return the name of an entry's data set and the source of its held-out images, with `image_notes`."""
    share = data.get("hold_out")
    parts = [data.get(name) for name in ("eval_root", "eval_file")] if data.get("name") in (None, *FOLDERS) else []
    held_out = " ".join(str(each) for each in parts if each)
    part = f", held out: {held_out}" if held_out else f", held out: {share} of them" if share else ""
    notes = image_notes(data)
    return data_name(data) + part + (f" ({'; '.join(notes)})" if notes else "")


def image_notes(data: Mapping[str, Any]) -> list[str]:
    """Return facts about an entry's images, other than their source, that affect its figures."""
    notes = ["held-out images were in the training set, without labels"] * bool(data.get("held_out_seen"))
    if copies := data.get("held_out_in_training"):
        notes.append(f"{copies} held-out images are copies of training images")
    left_out = [data.get(f"{split}_boxes_left_out") or 0 for split in ("training", "held_out")]
    notes += [f"without {left_out[0]} bad training boxes and {left_out[1]} held-out ones"] * any(left_out)
    return notes


def chosen_neighbors(entry: Mapping[str, Any]) -> str:
    """Return the k and temperature of an entry of moco.knn, whether they were set or chosen; "" for other commands."""
    settings = entry.get("settings") or {}
    if entry.get("command") != "knn" or not {"k", "temperature"} <= settings.keys():
        return ""
    return f"k={settings['k']}, temperature={settings['temperature']:g}"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
