"""The model card of an encoder: README.md of a repository on the Hugging Face Hub.

What the card states about the encoder comes only from the encoder's file and from the results.json of its run.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

import moco
from moco.interop.encoder_file import EncoderFile
from moco.runs.comparison import chosen_neighbors, data_name, placed

# Characters with a meaning in Markdown, which `plain` escapes.
_MARKUP = re.compile(r"([\\`*_\[\]|~$]|:(?=//))")
_PLACEHOLDER = "USER/NAME"  # the name of a repository that is not uploaded yet


def model_card(
    file: EncoderFile, title: str, timm: bool, parameters: int, results: Sequence[Mapping[str, Any]], repo: str
) -> str:
    """Return the card in Markdown. All text from the file and the results is escaped.

    Args:
        file: the encoder. Its `images` have size, resize, mean and std, and its `config` has no paths, see `shareable`.
        timm: whether timm can build the network from the repository.
        parameters: the number of parameters of the network.
        results: entries of results.json, see `moco.runs.results.record`.
        repo: the repository on the Hub; "" if unknown.
    """
    parts = [
        _front_matter(timm),
        f"# {plain(title)}",
        _summary(file, parameters),
        "## Load",
        _loading(file, timm, repo or _PLACEHOLDER),
        "## Results",
        _results(results),
        "## Recipe",
        _recipe(file),
    ]
    return "\n\n".join(parts) + "\n"


def plain(text: Any) -> str:
    """Return text that Markdown and HTML show literally, in one line."""
    line = " ".join("".join(each if each.isprintable() else " " for each in str(text)).split())
    escaped = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKUP.sub(r"\\\1", escaped)


def _front_matter(timm: bool) -> str:
    about: dict[str, Any] = {
        "library_name": "timm" if timm else "moco",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["moco", "self-supervised-learning", *(["timm"] if timm else [])],
    }
    return f"---\n{yaml.safe_dump(about, sort_keys=False)}---"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *([plain(each) for each in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _summary(file: EncoderFile, parameters: int) -> str:
    config, images = file.config, file.images
    data, method = config.get("data") or {}, config.get("method") or {}
    channels = {1: "gray", 3: "RGB"}.get(file.channels, f"{file.channels} channels")
    facts = {
        "network": " ".join([file.backbone, *(f"{name}={value}" for name, value in file.options.items())]),
        "parameters": f"{parameters:,}",
        "method": method.get("name"),
        "data": data_name(data),
        "optimizer steps": f"{file.step:,}" if file.step else None,
        "epochs": config.get("epochs"),
        "batch size": config.get("batch_size"),
        "seed": config.get("seed"),
        "images": f"{channels}, {images['size']} x {images['size']} px, "
        + (f"the shorter side resized to {images['resize']} px first, " if images["resize"] else "")
        + f"{_scale(data)}, minus {list(images['mean'])}, divided by {list(images['std'])}",
        "converted from": None if config else file.layout,
    }
    rows = [(name, value) for name, value in facts.items() if value not in (None, "")]
    about = f"An image encoder: it maps images to features. Written by moco.convert (moco {moco.__version__})."
    return f"{plain(about)}\n\n{_table(['', ''], rows)}"


def _scale(data: Mapping[str, Any]) -> str:
    """Return the range of pixels before normalization (`moco.data.pixel_format.to_float`), as text."""
    divided = {"uint16": "in 0 ... 1 (divided by 65535)", "float32": "with the values of the files"}
    return divided.get(str(data.get("dtype")), "in 0 ... 1")


def _loading(file: EncoderFile, timm: bool, repo: str) -> str:
    ours = f"""With moco (the package momentum-contrast); instead of the name, the path of this folder works too:

```python
import moco

encoder = moco.load_encoder("hf://{repo}")
features = encoder(encoder.transform(image)[None])
```"""
    if file.channels != 3:  # timm's transform takes RGB images only
        prepared = f"normalized as above, a float tensor (N, {file.channels}, S, S)"
        theirs = f"""With timm, for images that are {prepared}:

```python
import timm

features = timm.create_model("hf_hub:{repo}", pretrained=True).eval()(images)
```"""
    else:
        theirs = f"""With timm:

```python
import timm

network = timm.create_model("hf_hub:{repo}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
features = network(transform(image)[None])
```

timm resizes PIL images and moco resizes tensors; therefore features may differ slightly."""
    note = f"`{_PLACEHOLDER}` stands for the repository." if repo == _PLACEHOLDER else ""
    return "\n\n".join(filter(None, [ours, theirs if timm else "", note]))


def _results(results: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return "None were recorded for these weights."
    rows = [
        (evaluation, encoder, data, ", ".join(filter(None, [_figures(_with_count(entry)), chosen_neighbors(entry)])))
        for entry, evaluation, data, encoder in placed(results, shareable)
    ]
    table = _table(["evaluation", "encoder", "data", "figures"], rows)
    return f"From results.json, for exactly these weights and the baselines.\n\n{table}"


def _with_count(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"count": (entry.get("data") or {}).get("held_out")} | (entry.get("figures") or {})


def _figures(figures: Mapping[str, Any]) -> str:
    numbers = {name: value for name, value in figures.items() if type(value) in (int, float)}
    shown = [f"{name} {value:.4g}" for name, value in numbers.items()]
    match figures.get("interval95"):
        case [float(low), float(high)]:
            shown.append(f"95 % interval {low:.4g} to {high:.4g}")
    return ", ".join(shown)


def _recipe(file: EncoderFile) -> str:
    if not file.config:
        return "The file does not state how the encoder was trained."
    text = yaml.safe_dump(file.config, sort_keys=False, allow_unicode=False)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)  # the text cannot end the block
    return f"The configuration of `moco.train`, without the paths of its machine:\n\n{fence}yaml\n{text}{fence}"


def shareable(value: Any) -> Any:
    """Return a configuration without details of the machine.

    Of an absolute path, only the last part is kept. Commands (pipe:) and addresses other than hf:// become "".
    """
    if isinstance(value, Mapping):
        return {name: shareable(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [shareable(each) for each in value]
    if not isinstance(value, str):
        return value
    if value.startswith("pipe:") or ("://" in value and not value.startswith("hf://")):
        return ""  # the text may contain a password
    return value.rstrip("/").rpartition("/")[2] if value.startswith(("/", "~")) else value
