"""What a linear probe leaves: results.json, linear.safetensors, a picture of the confusions, the closing table."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moco.config.linear import LinearConfig
from moco.data.sources import Source
from moco.evaluation.confusion import draw_confusion
from moco.evaluation.layers import OUTPUT
from moco.evaluation.linear_probe import LinearHead, save_head
from moco.evaluation.metrics import Figures, mean_interval
from moco.evaluation.subject import Subject, about, data_config
from moco.runs.results import record
from moco.runtime.console import log, percent, table
from moco.runtime.next_command import command

_MOST_CLASSES = 100  # in the picture of the confusion matrix


@dataclass(frozen=True, eq=False)
class Task:
    """What one encoder is subject on."""

    config: LinearConfig
    subject: Subject
    train: Source
    held_out: Source
    device: torch.device

    @property
    def data_name(self) -> str:
        return data_config(self.config, self.subject).name

    @property
    def workers(self) -> int:
        return data_config(self.config, self.subject).workers

    def seeds(self) -> range:
        return range(self.config.seed, self.config.seed + self.config.seeds)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a protocol found of one encoder."""

    encoder: str  # pretrained, untrained or pixels
    figures: list[Figures]  # one a seed
    heads: list[LinearHead]  # one a seed
    chosen: list[dict[str, Any]]  # layer, lr, weight_decay, and of a sweep the validation accuracy; one a seed
    settings: dict[str, Any]  # values that the data or the batch changed

    def summary(self) -> dict[str, Any]:
        """The figures of one seed in full, or of several their means, for results.json."""
        if len(self.figures) == 1:
            return self.figures[0].plain()
        mean, half = mean_interval([each.top1 for each in self.figures])
        return {"top1": mean, "top1_half_width95": half, "top5": self.top5(), "count": self.figures[0].count}

    def top5(self) -> float | None:
        fives = [each.top5 for each in self.figures if each.top5 is not None]
        return float(np.mean(fives)) if fives else None


def about_head(task: Task, layer: str, unit: bool) -> dict[str, Any]:
    """What a classifier has to know beside its weights."""
    file = task.subject.file
    return {
        "layer": layer,
        "unit": unit,
        "classes": list(task.train.classes),
        "protocol": task.config.protocol,
        "encoder": file.source,
        "backbone": file.backbone,
        "step": file.step,
        "look": asdict(task.subject.look),
    }


def keep(task: Task, outcomes: list[Outcome]) -> list[Path]:
    """Writes results.json, and of the pretrained encoder the first seed's head and confusions. Rank 0.

    Returns:
        The files.
    """
    folder, first = task.subject.output, outcomes[0]
    files = [record(folder, [_entry(task, each) for each in outcomes], task.subject.step)]
    files.append(folder / "linear.safetensors")
    save_head(files[-1], first.heads[0])
    if len(task.train.classes) <= _MOST_CLASSES:
        files.append(folder / "confusion_linear.png")
        title = f"linear, {task.config.protocol}: top-1 {first.figures[0].top1:.1f} %"
        draw_confusion(first.figures[0].confusion, task.train.classes, title, files[-1])
    return files


def _entry(task: Task, outcome: Outcome) -> dict[str, Any]:
    """For results.json."""
    config = task.config
    told = ("epochs", "batch_size", "momentum", "seed", "seeds", config.kind)
    return {
        "command": "linear",
        "encoder": outcome.encoder,
        "protocol": config.protocol,
        **about(task.subject, config, task.train, task.held_out),
        "settings": {name: asdict(config)[name] for name in told}
        | ({"augment": config.augment} if config.kind == "official" else {})
        | outcome.settings,
        "chosen": outcome.chosen,
        "figures": outcome.summary(),
        "each_seed": [each.plain() for each in outcome.figures] if len(outcome.figures) > 1 else None,
    }


def show(task: Task, outcomes: list[Outcome]) -> None:
    """The closing table."""
    config, swept = task.config, task.config.kind == "sweep"
    rows = []
    for outcome in outcomes:
        mean, half = mean_interval([each.top1 for each in outcome.figures])
        low, high = outcome.figures[0].interval()
        first = outcome.chosen[0]
        rows.append(
            (
                outcome.encoder,
                f"{mean:.1f} ({low:.1f}–{high:.1f})" if half is None else percent(mean, half),
                percent(outcome.top5()),
                *([percent(first["validation_top1"])] if swept else []),
                f"{first['layer']}, " * (first["layer"] not in (OUTPUT, "pixels"))
                + f"lr {first['lr']:g}, wd {first['weight_decay']:g}",
            )
        )
    several = f"mean of {config.seeds} seeds ± half of Student's 95 % interval" + (
        "; setting and files are the first seed's" if config.seeds > 1 else ""
    )
    lines = [f"top-1: {several if config.seeds > 1 else 'with Wilson’s 95 % interval'}."]
    if swept:
        lines.append(
            f"The setting was chosen on {config.sweep.validation:.0%} of each training class and trained again on the "
            "whole training split; the held-out split was opened once, at the end."
        )
    else:
        lines.append("The last epoch counts. The frozen weights and buffers are bit for bit those that were loaded.")
    columns = ("encoder", "top-1 %", "top-5 %", *(["validation %"] if swept else []), "setting")
    table(f"Linear probe, {config.protocol}", columns, rows, "\n".join(lines))


def say_next(task: Task) -> None:
    """What to run next, and why."""
    config = task.config
    said: dict[str, Any] = {}
    if not config.compare:
        said["compare"] = ["untrained", "pixels"] if config.kind == "sweep" else ["untrained"]
        if config.protocol != "sweep":
            said["protocol"] = config.protocol
        why = "what there was to gain"
    elif config.kind == "sweep":
        said["protocol"] = "moco_v2_digits" if task.data_name == "digits" else "moco_v2"
        why = "the published protocol, with augmented pictures"
    else:
        why = "chooses learning rate, weight decay and layer on a validation part, in seconds"
    log(f"next: {command('moco.linear', config, **said)}  ({why})")
