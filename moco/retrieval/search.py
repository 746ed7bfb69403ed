"""Search among features, and write the results as JSON and as a gallery."""

import json
from pathlib import Path
from typing import Any

import torch

from moco.config import ConfigError, require
from moco.config.search import SearchConfig
from moco.distributed import is_rank_zero
from moco.evaluation.subject import open_subject
from moco.files import atomic_write
from moco.reporting.contact_sheet import write_png
from moco.reporting.gallery import write_html
from moco.retrieval.embed import compute
from moco.retrieval.modes import Result, find_duplicates, find_nearest, find_outliers
from moco.retrieval.queries import open_index
from moco.retrieval.store import Embedding
from moco.runtime.console import summary_panel
from moco.runtime.device import compute_context

_MODES = {"nearest": find_nearest, "duplicates": find_duplicates, "outliers": find_outliers}


def search(config: SearchConfig) -> None:
    """Search as configured, and write the results."""
    with compute_context(config) as device:
        if config.index:
            index, out = open_index(config), Path(config.output or config.index)
        else:
            subject = open_subject(config)
            out = Path(config.output) if config.output else subject.output
            index = compute(config, subject, out / "features", device)
    if is_rank_zero():  # a search takes seconds; only the features, which take hours, use all ranks
        _search(config, index, out / "search", device)


def _search(config: SearchConfig, index: Embedding, out: Path, device: torch.device) -> None:
    count, encoder = len(index.images), index.about["encoder"]["source"]
    require(
        count > 1 or config.mode == "nearest",
        f"mode={config.mode} compares images, but {index.origin} contains only one: add more images",
    )
    result = _MODES[config.mode](config, index, device)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output={out} cannot be written to: {error.strerror}") from error
    written = [out / f"{config.mode}.json"]
    head = {
        "mode": config.mode,
        "k": config.k,
        "threshold": config.threshold,
        "encoder": encoder,
        "features": str(index.folder),
        "root": index.about["pictures"]["root"],
        "pictures": count,
    }
    _write_json(written[0], head, result)
    if config.gallery != "none":
        written.append(out / f"{config.mode}.{config.gallery}")
        about = [f"{count:,} images of {index.origin}", f"encoder {encoder}", *([result.note] if result.note else [])]
        write = write_html if config.gallery == "html" else write_png
        write(written[1], result.title, " · ".join(about), result.sections)
    note = [("note", result.note)] if result.note else []
    files = [("" if i else "written", str(path)) for i, path in enumerate(written)]
    summary_panel(result.title, [("images", f"{count:,} of {index.origin}"), *result.summary, *note, *files])


def _write_json(path: Path, head: dict[str, Any], result: Result) -> None:
    """Write one JSON object with one entry per line, because all entries may not fit in memory."""
    with atomic_write(path) as temporary, temporary.open("w") as file:
        file.write(json.dumps(head)[:-1] + f', "{result.kind}": [')
        for i, entry in enumerate(result.entries):
            file.write(("," if i else "") + "\n" + json.dumps(entry))
        file.write("\n]}\n")
