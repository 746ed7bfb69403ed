"""A page about a run, or about several side by side, and the embedding for TensorBoard's projector."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from moco.analysis.doctor import Alarm
from moco.config import ConfigError, require
from moco.config.report import ReportConfig
from moco.config.subject import SubjectConfig
from moco.distributed import is_rank_zero
from moco.evaluation.features import evaluation_view
from moco.files import WriteError, cause
from moco.reporting import html, page
from moco.reporting import sections as sections
from moco.reporting.curves import plotly
from moco.reporting.images import ImageFeatures, Layout, as_map, attention, compute_features, compute_layout, neighbors
from moco.reporting.page import Figures, Section
from moco.reporting.run_record import Run, findings, names, open_run
from moco.runtime.console import summary_panel
from moco.runtime.device import compute_context
from moco.runtime.next_command import command

_SPRITE = 64  # pixels of a picture in TensorBoard's projector at most; it takes 8,192 in all


def report(config: ReportConfig) -> None:
    """See `moco.report.report`."""
    plotly()  # its absence shall not show after minutes
    with compute_context(config) as device:
        if is_rank_zero():
            _report(config, device)


def _report(config: ReportConfig, device: torch.device) -> None:
    runs = [open_run(Path(each)) for each in [config.run, *config.compare]]
    out = Path(config.output) if config.output else runs[0].path / "report.html"
    require(not out.is_dir(), f"output={out} is a folder: name a file, e.g. output={out / 'report.html'}")
    figures = Figures()
    seen = [compute_features(config, run, device) if config.pictures and run.checkpoint else None for run in runs]
    placed = [compute_layout(config, each) if each else None for each in seen]
    images = [each.training if each else None for each in seen]
    found = [findings(run, count) for run, count in zip(runs, images, strict=True)]
    own = [
        _of_run(config, run, each, where, alarms, figures, device)
        for run, each, where, alarms in zip(runs, seen, placed, found, strict=True)
    ]
    several = len(runs) > 1
    body = [
        Section("Side by side" if several else "What was run", sections.headline(runs, images, found)),
        *([Section("Settings that differ", sections.differences(runs))] if several else []),
        sections.curves(runs, figures),
    ]
    if several:
        body += [
            Section(f"Run {name}", page.paragraph(sections.state(run)), parts)
            for name, run, parts in zip(names(runs), runs, own, strict=True)
        ]
    else:
        body += own[0]
    title = " and ".join(names(runs)) if len(runs) < 3 else f"{len(runs)} runs"
    about = " · ".join(f"{name}: {sections.state(run)}" for name, run in zip(names(runs), runs, strict=True))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        page.write(out, f"Report of {title}", about, body, figures)
    except (OSError, WriteError) as error:
        raise ConfigError(f"output={out} cannot be written ({cause(error)}): set output=FILE") from error
    projected = [
        _project(run, each, where)
        for run, each, where in zip(runs, seen, placed, strict=True)
        if config.projector and each is not None and each.shown.finite
    ]
    _summarize(runs, out, found, projected)


def _of_run(
    config: ReportConfig,
    run: Run,
    seen: ImageFeatures | None,
    placed: Layout | None,
    alarms: Sequence[Alarm],
    figures: Figures,
    device: torch.device,
) -> list[Section]:
    """A run's own parts, in the order in which to read them."""
    parts = [Section("Evaluations", sections.evaluations(run))]
    views = run.path / "views.png"
    if views.is_file():
        said = "What the model was shown: a column a picture, a row a view."
        parts.append(Section("Views", page.views(views.read_bytes(), said)))
    parts += _pictures(config, run, seen, placed, figures, device)
    parts.append(
        Section("What the doctor says", page.alarms([(each.name, each.evidence, each.remedy) for each in alarms]))
    )
    parts.append(Section("Environment", sections.environment(run)))
    return parts


def _pictures(
    config: ReportConfig,
    run: Run,
    seen: ImageFeatures | None,
    placed: Layout | None,
    figures: Figures,
    device: torch.device,
) -> list[Section]:
    """Neighbors, map and attention, or why there are none."""
    if seen is None:
        why = "Left out: pictures=0." if run.checkpoint else "None: the run has saved no checkpoint yet."
        return [Section("Pictures", page.paragraph(why))]
    if not (seen.shown.finite and seen.references.finite):
        why = "None: the encoder's features are NaN or infinite, its training diverged."
        return [Section("Pictures", page.paragraph(why))]
    parts = []
    level = 4 if config.compare else 3
    if config.queries:
        found, said = neighbors(config, seen)
        parts.append(Section("Nearest neighbors", page.paragraph(said) + page.queries(found, level)))
    if placed is not None:
        numbers = [figures.picture(seen.shown.image(i)) for i in range(len(seen.shown))]
        drawn = as_map(config, seen, placed, numbers)
        left = f" {seen.shown.unreadable} could not be read and are left out." if seen.shown.unreadable else ""
        said = f"{drawn.what} of the backbone's features: what lies together is alike to the encoder; distances between"
        said += f" groups say little. Clusters are k-means' in the features, made without labels.{left}"
        parts.append(Section("Map", page.paragraph(said) + figures.map(drawn)))
    looked = attention(config, seen, device)
    if looked is not None:
        tiles, said = looked
        parts.append(Section("Attention", page.paragraph(said) + page.looks(tiles)))
    return parts


def _project(run: Run, seen: ImageFeatures, placed: Layout | None) -> Path:
    """The embedding with its pictures for TensorBoard's projector, in a directory of its own beside the run's events.

    Raises:
        ConfigError: if it cannot be written.
    """
    from torch.utils.tensorboard import SummaryWriter  # costs seconds at start-up

    folder, shown = run.path / "projector", seen.shown
    groups = placed.groups if placed else {}
    rows = [
        [html.plain(cell).encode("utf-8", "backslashreplace").decode() for cell in (shown.name(i), *own)]
        for i, own in enumerate(zip(*groups.values(), strict=True) if groups else [()] * len(shown))
    ]
    side = min(_SPRITE, 8192 // int(np.ceil(len(shown) ** 0.5)))
    small = torch.stack([evaluation_view(shown.image(i), 0, side) for i in range(len(shown))])
    header = ["name", *groups] if groups else None  # TensorBoard wants no heading over a single column
    try:
        shutil.rmtree(folder, ignore_errors=True)  # another report's: add_embedding would add to it
        with SummaryWriter(str(folder)) as writer:
            writer.add_embedding(
                torch.from_numpy(shown.features),
                rows if header else [row[0] for row in rows],
                small.float() / 255,
                global_step=run.step,
                tag="backbone",
                metadata_header=header,
            )
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}): set projector=false") from error
    return folder


def _summarize(runs: Sequence[Run], out: Path, found: Sequence[Sequence[Alarm]], projected: Sequence[Path]) -> None:
    """The closing table."""
    rows = [(name, sections.state(run)) for name, run in zip(names(runs), runs, strict=True)]
    for name, alarms in zip(names(runs), found, strict=True):
        said = "; ".join(f"{each.name}: {each.evidence} (remedy: {each.remedy})" for each in alarms)
        rows.append((f"doctor, {name}" if len(runs) > 1 else "doctor", said or "nothing to report"))
    rows.append(("page", f"{out} ({out.stat().st_size / 1e6:.1f} MB; opens in any browser, without a network)"))
    if projected:
        rows.append(("projector", f"tensorboard --logdir {projected[0]}  (tab Projector: the same pictures in 3-D)"))
    unjudged = [run for run in runs if not run.results and run.finished]
    if unjudged:
        rows.append(("next", command("moco.linear", SubjectConfig(), run=str(unjudged[0].path))))
    elif not runs[0].finished:
        rows.append(("next", "the same command again when the run has gone on"))
    summary_panel("report", rows)
