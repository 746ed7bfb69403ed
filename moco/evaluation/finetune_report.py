"""What fine-tuning shares and leaves: its task, its outcomes, their entries in results.json, their table."""

import hashlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moco.config.finetune import FinetuneConfig, fraction_of
from moco.config.subject import SubjectConfig
from moco.data.plan import Plan
from moco.data.sources import Source
from moco.data.view import View
from moco.evaluation.metrics import Figures, mean_interval
from moco.evaluation.subject import Subject, about
from moco.interop.encoder_file import EncoderFile
from moco.runtime import console
from moco.runtime import next_command as hints


@dataclass(frozen=True)
class Task:
    """What every encoder and seed share."""

    config: FinetuneConfig
    subject: Subject
    file: EncoderFile  # the subject one, with drop-path where it is asked for
    labeled: Source
    held_out: Source
    view: View
    device: torch.device


@dataclass(frozen=True)
class Outcome:
    """What became of one encoder over all seeds."""

    encoder: str
    figures: list[Figures]  # one a seed
    saved: Path  # where the last seed's network is

    def top1(self) -> tuple[float, float | None]:
        return mean_interval([each.top1 for each in self.figures])

    def top5(self) -> float | None:
        values = [each.top5 for each in self.figures if each.top5 is not None]
        return float(np.mean(values)) if values else None


def protocol(config: FinetuneConfig) -> tuple[str, str]:
    """What the labels are, for a person and for a folder's name."""
    if fraction := fraction_of(config):
        said, short = f"{100 * fraction:g} % of labels", f"{100 * fraction:g}percent"
    elif config.labels_per_class:
        said, short = f"{config.labels_per_class} labels a class", f"{config.labels_per_class}perclass"
    else:  # list_: SimCLR's 1percent.txt is not fraction=0.01
        said, short = f"labels of {Path(config.subset_list).name}", f"list_{Path(config.subset_list).stem}"
    return (f"{said}, validation", f"{short}_validation") if config.validation else (said, short)


def common(task: Task, plan: Plan) -> dict[str, Any]:
    """What the entries of all encoders say alike: all that repeats the figures."""
    config, others = task.config, {each.name for each in fields(SubjectConfig)} - {"seed"}
    settings = {name: value for name, value in asdict(config).items() if name not in others}
    settings |= {"batch_size": plan.batch_size, "epochs": plan.epochs, "steps": plan.total_steps}
    settings |= {"view": asdict(task.view), "fraction": fraction_of(config)}
    if config.subset_list:
        file = Path(config.subset_list)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        settings |= {"subset_list": str(file.absolute()), "subset_list_sha256": digest}
    return {
        "command": "finetune",
        "protocol": protocol(config)[0],
        **about(task.subject, config, task.labeled, task.held_out),
        "settings": settings,
        "labelled": plan.length,
    }


def entries(shared: dict[str, Any], outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """For `results.record`, one for each encoder."""
    return [
        shared
        | {
            "encoder": outcome.encoder,
            "figures": {"top1": outcome.top1()[0], "top1_half_width95": outcome.top1()[1], "top5": outcome.top5()},
            "per_seed": [each.plain() for each in outcome.figures],
            "saved": str(outcome.saved.absolute()),
        }
        for outcome in outcomes
    ]


def summarize(task: Task, plan: Plan, outcomes: list[Outcome], file: Path) -> None:
    """The closing table, what was written, and what to do next; on rank 0."""
    rows = []
    for outcome in outcomes:
        mean, half = outcome.top1()
        low, high = outcome.figures[0].interval()
        shown = console.percent(mean, half) if half is not None else f"{mean:.1f} ({low:.1f} … {high:.1f})"
        seeds = ", ".join(console.percent(each.top1) for each in outcome.figures)
        rows.append([outcome.encoder, shown, console.percent(outcome.top5()), seeds])
    repeats = task.config.seeds
    meaning = f"± half of Student's 95 % interval over {repeats} seeds" if repeats > 1 else "Wilson's 95 % interval"
    console.table(
        f"fine-tuned, {protocol(task.config)[0]} ({plan.length:,} pictures, {plan.total_steps:,} steps)",
        ["encoder", "top-1 %", "top-5 %", "each seed"],
        rows,
        f"{meaning}; subject on {len(task.held_out):,} pictures",
    )
    if len(outcomes) == 2 and repeats > 1:
        gain, half = mean_interval(
            [one.top1 - two.top1 for one, two in zip(*(o.figures for o in outcomes), strict=True)]
        )
        names = " less ".join(outcome.encoder for outcome in outcomes)
        console.log(f"{names}, on the same pictures seed by seed: {gain:+.1f} ± {half:.1f}")
    console.log(f"written: {file}")
    for outcome in outcomes:
        console.log(f"saved: {outcome.saved}/encoder.safetensors and head.safetensors (the last seed)")
    # The file says its network, pictures and their look itself.
    its_own: dict[str, Any] = {
        "run": "",
        "output": "",
        "weights": "encoder",
        "backbone": None,
        "options": {},
        "images": {},
    }
    split = {"hold_out": task.config.data.hold_out}
    encoder = f"{outcomes[0].saved}/encoder.safetensors"
    console.log(f"next: {hints.command('moco.knn', task.config, **its_own, data=split, checkpoint=encoder)}")
