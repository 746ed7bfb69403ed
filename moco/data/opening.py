"""Opens the data set that a configuration names."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from moco.config import AugmentConfig, ConfigError, DataConfig, require
from moco.data.bad_images import without_bad
from moco.data.sources import Progress, Sources, limited, load_source
from moco.data.view import View
from moco.distributed import is_rank_zero, on_rank_zero
from moco.runtime.console import progress_bar


def open_sources(
    config: DataConfig, bank_size: int, keep_bad: bool = False, heartbeat: Callable[[], None] = lambda: None
) -> Sources:
    """The data set, with at most `bank_size` reference images for the live kNN (0: all).

    Args:
        config: which data set.
        bank_size: see above.
        keep_bad: see `moco.data.sources.load_source`.
        alive: called now and then while pictures are decoded.

    Raises:
        FileNotFoundError, ValueError: see `moco.data.sources.load_source`.
    """

    def load(download: bool) -> Sources:
        with progress_bar("decoding pictures", quiet=not is_rank_zero()) as shown:
            return load_source(
                config.name,
                config.root,
                download,
                config.labels,
                config.eval_root,
                config.resident,
                _with_heartbeat(shown, heartbeat),
                keep_bad,
                config.subset,
                config.split,
                config.eval_split,
                config.image_column,
                config.label_column,
                config.length,
                config.shuffle_buffer,
                config.allow_pipe,
            )

    if config.download:
        on_rank_zero(lambda: len(load(True).train))  # one rank downloads, then all of them read
    sources = load(False)
    return sources if sources.bank is None else replace(sources, bank=limited(sources.bank, bank_size))


def _with_heartbeat(shown: Progress, heartbeat: Callable[[], None]) -> Progress:
    """Shows how far work is, and gives a sign of life with it."""

    def progress(done: int, total: int) -> None:
        heartbeat()
        shown(done, total)

    return progress


def without_bad_references(
    sources: Sources, config: DataConfig, heartbeat: Callable[[], None]
) -> tuple[Sources, list[str]]:
    """The data set with a bank and a held-out split that can be read throughout, and a line on what was left out.

    What accuracy is measured with has no substitutes. Every picture of both is decoded once, which takes about as long
    as the first evaluation; each rank does a part. `heartbeat` is called now and then.

    Raises:
        ImageError: if more of a split is bad than `data.max_bad`.
    """
    if sources.bank is None or sources.held_out is None:
        return sources, []
    said = []
    kept = []
    for name, source in (("reference", sources.bank), ("held-out", sources.held_out)):
        with progress_bar(f"reading the {name} pictures", quiet=not is_rank_zero()) as shown:
            good, bad = without_bad(source, f"{name} pictures", config.max_bad, _with_heartbeat(shown, heartbeat))
        kept.append(good)
        if bad:
            first = min(bad)
            said.append(
                f"{len(bad)} of the {len(source):,} {name} pictures cannot be read and are left out of the live "
                f"accuracy, the first: {source.name(first)} ({bad[first]})"
            )
    return replace(sources, bank=kept[0], held_out=kept[1]), said


def build_views(config: AugmentConfig) -> list[View]:
    """The views' recipes: the group's fields, then those in which the second differs, and both again in turn.

    Raises:
        ConfigError: for a field of `second` that is none, or a value that cannot be.
    """
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in asdict(config).items()
        if name not in ("views", "second", "eval_resize")
    }
    unknown = set(config.second) - set(values)
    require(not unknown, f"augment.second names {', '.join(sorted(unknown))}; it can hold {', '.join(values)}")
    require("size" not in config.second, "augment.second cannot change size: both views have augment.size")
    second = {name: tuple(value) if isinstance(value, list) else value for name, value in config.second.items()}
    try:
        recipes = View(**values), View(**(values | second))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"augment.{error}") from error
    return [recipes[view % 2] for view in range(config.views)]
