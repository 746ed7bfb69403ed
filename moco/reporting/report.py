"""Write a page about one run, or about several runs side by side."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from markupsafe import Markup

from moco.analysis.doctor import Alarm
from moco.config import ConfigError, require
from moco.config.report import ReportConfig
from moco.distributed import is_rank_zero
from moco.files import WriteError, cause
from moco.reporting import page, sections
from moco.reporting.image_map import Map
from moco.reporting.images import ImageFeatures, attention, compute_features, compute_map, neighbors
from moco.reporting.markup import part
from moco.reporting.page import Figures, Section
from moco.reporting.projector import write_projector
from moco.reporting.run_record import Run, findings, names, open_run
from moco.runtime.console import log, log_next, summary_panel
from moco.runtime.device import compute_context
from moco.runtime.output_directory import check_output_file

_OPEN_QUERIES = 2  # number of queries whose neighbors are visible; those of the other queries are folded


@dataclass(frozen=True, eq=False)
class _Computed:
    """A run with everything that the report computes from it."""

    run: Run
    images: ImageFeatures | None  # None without a checkpoint, or with pictures=0
    map: Map | None
    alarms: list[Alarm]


def report(config: ReportConfig) -> None:
    """Write the page about the configured runs, on rank 0; raise ConfigError if a run or the output cannot be used."""
    with compute_context(config) as device:
        if is_rank_zero():
            _report(config, device)


def _report(config: ReportConfig, device: torch.device) -> None:
    runs = [open_run(Path(config.run)), *(open_run(Path(each), "compare") for each in config.compare)]
    runs = [replace(run, given=config.data.overrides()) for run in runs]
    out = Path(config.output) if config.output else runs[0].path / "report.html"
    is_page = out.suffix.lower() in (".html", ".htm")
    require(is_page or out.is_dir(), f"output={out} does not end in .html: the report is an HTML page")
    check_output_file(out, "report.html")
    computed = [_compute(config, run, device) for run in runs]
    figures = Figures()
    body = [Section("Overview", sections.headline(runs, [each.alarms for each in computed]))]
    if len(runs) > 1:
        body.append(Section("Settings that differ", sections.differences(runs)))
        body.append(sections.curves(runs, figures))
    for name, each in zip(names(runs), computed, strict=True):
        parts = _run_sections(config, each, figures, device)
        if len(runs) > 1:
            body.append(Section(f"Run {name}", Markup(), parts))
        else:  # the curves come late, because 20 charts fill many screens of a phone
            body += [*parts[:-1], sections.curves(runs, figures), parts[-1]]
    title = " and ".join(names(runs)) if len(runs) < 3 else f"{len(runs)} runs"
    _summarize(computed)  # before writing: the findings stay visible if writing fails
    try:
        page.write(out, f"Report of {title}", body, figures)
    except (OSError, WriteError) as error:
        raise ConfigError(f"output={out} cannot be written ({cause(error)}): set output=FILE") from error
    log(f"page: {out} ({out.stat().st_size / 1e6:.1f} MB; opens in any browser, without a network)")
    projectors = [
        write_projector(each.run, each.images, each.map)
        for each in computed
        if config.projector and each.images is not None and each.images.shown.finite
    ]
    if projectors:
        log_next(shlex.join(["tensorboard", "--logdir", str(projectors[0])]), "tab Projector: the same images in 3-D")
    for run in [run for run in runs if not run.results and run.finished][:1]:
        for line in run.next_commands(config):
            log_next(line)


def _compute(config: ReportConfig, run: Run, device: torch.device) -> _Computed:
    images = compute_features(config, run, device) if config.pictures and run.checkpoint else None
    alarms = findings(run)
    return _Computed(run, images, compute_map(config, images) if images else None, alarms)


def _run_sections(config: ReportConfig, computed: _Computed, figures: Figures, device: torch.device) -> list[Section]:
    run, views = computed.run, computed.run.path / "views.png"
    parts = [
        Section("Evaluations", sections.evaluations(run, figures)),
        *_image_sections(config, computed, figures, device),
    ]
    if computed.alarms:
        parts.insert(0, Section("Training doctor", part("findings", computed.alarms)))
    if views.is_file():
        caption = "Augmented views from the start of training: one column per image, one row per view."
        parts.append(Section("Views", part("views", views.read_bytes(), caption)))
    return [*parts, Section("Environment", sections.environment(run))]


def _image_sections(config: ReportConfig, computed: _Computed, figures: Figures, device: torch.device) -> list[Section]:
    """Return the sections with neighbors, map and attention, or one section with the reason why there are none."""
    images = computed.images
    if images is None:
        why = "Not shown: pictures=0." if computed.run.checkpoint else "None: the run has no checkpoint yet."
        return [Section("Images", part("paragraph", why))]
    if not (images.shown.finite and images.references.finite):
        why = "None: training diverged. The features of the encoder are NaN or infinite."
        return [Section("Images", part("paragraph", why))]
    parts = []
    if config.queries:
        queries, caption = neighbors(config, images)
        level, more = 4 if config.compare else 3, len(queries) - _OPEN_QUERIES
        body = part("paragraph", caption) + part("neighbors", queries[:_OPEN_QUERIES], level)
        if more > 0:
            title = f"{more} more {'queries' if more > 1 else 'query'}"
            body += part("folded", title, part("neighbors", queries[_OPEN_QUERIES:], level))
        parts.append(Section("Nearest neighbors", body))
    if computed.map is not None:
        numbers = [figures.add_image(images.shown.image(i)) for i in range(len(images.shown))]
        caption = (
            f"{computed.map.title} of the backbone features. Nearby images have similar features; distances between "
            "groups carry little meaning. The clusters come from k-means on the features, without labels."
        )
        caption += f" Unreadable images, not shown: {images.unreadable}." if images.unreadable else ""
        parts.append(Section("Map", part("paragraph", caption) + figures.add_map(computed.map, numbers)))
    attended = attention(config, images, device)
    if attended is not None:
        tiles, caption = attended
        parts.append(Section("Attention", part("paragraph", caption) + part("attention", tiles)))
    return parts


def _summarize(computed: Sequence[_Computed]) -> None:
    runs = [each.run for each in computed]
    rows = [(name, sections.progress(run)) for name, run in zip(names(runs), runs, strict=True)]
    for name, each in zip(names(runs), computed, strict=True):
        alarms = "; ".join(f"{alarm.name}: {alarm.evidence} (remedy: {alarm.remedy})" for alarm in each.alarms)
        rows.append((f"doctor, {name}" if len(runs) > 1 else "doctor", alarms or "no findings"))
    if not runs[0].finished:
        rows.append(("later", "run the same command again after more training"))
    summary_panel("report", rows)
