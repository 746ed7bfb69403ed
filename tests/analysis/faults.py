"""Real runs of `moco.train` with one fault per alarm, healthy runs of five methods, and a table of the findings.

    python -m tests.analysis.faults FOLDER                  run what FOLDER does not hold yet, and print the table
    python -m tests.analysis.faults FOLDER --only leak hot  only some of the cases
    python -m tests.analysis.faults --inject early FIELD=VALUE ...     python -m moco.train with a defect in its code

A fault is a configuration if a user can cause it that way, else a defect in the code (`DEFECTS`). The table has the
epoch of the doctor's finding, and its other findings.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from moco.builder import MoCo
from moco.cli import run_command
from moco.config import TrainConfig
from moco.train import train
from moco.training import trainer

# A measurement at the end of each epoch of 10 steps; the digits recipe measures every second epoch.
COMMON = ("threads=1", "log_every=5", "analyse_every=2")
SHORT = ("epochs=4", "evaluate.every_epochs=0")
PAIRS = ("model.bn_group_size=2", "method.temperature=0.1")
# For alarms that need many records. The measurements are as frequent as in COMMON.
OFTEN = ("log_every=2", "analyse_every=5")

Patch = Callable[[object, str, object], None]  # replaces an attribute by a value


class Case(NamedTuple):
    """A run and the expected finding."""

    alarm: str  # "" for a healthy run
    title: str
    overrides: tuple[str, ...]
    defect: str = ""


CASES = {
    "moco_v2": Case("", "MoCo v2", ()),
    "moco_v2plus": Case("", "MoCo v2+", ("method.symmetric=true",)),
    "moco_v3": Case("", "MoCo v3", ("experiment=moco_v3_digits",)),
    "simclr": Case("", "SimCLR", ("experiment=simclr_digits",)),
    "supmoco": Case("", "SupMoCo", ("experiment=supmoco_digits",)),
    "fast_keys": Case("momentum too low", "keys change as fast as queries", (*SHORT, "method.momentum=0.5")),
    "slow_keys": Case("momentum too high", "momentum for longer runs", (*SHORT, "method.momentum=0.999")),
    "no_rate": Case("learning rate of 0", "learning rate of 0", (*SHORT, "optim.lr=0")),
    "frozen_keys": Case("momentum of 1", "keys never change", (*SHORT, "method.momentum=1.0")),
    "cold": Case("temperature too low", "temperature a hundredth", (*SHORT, "method.temperature=0.005")),
    "hot": Case("temperature too high", "temperature 20 times as high", (*SHORT, "method.temperature=10")),
    "long_queue": Case(
        "queue too long for the data set",
        "queue longer than the data set, own keys not masked",
        (*SHORT, "method.queue_size=2048", "method.mask_own_keys=false"),
    ),
    "stale": Case(
        "stale queue",
        "queue of 32 steps at momentum 0.9",
        (*SHORT, "batch_size=32", "method.queue_size=1024", "method.momentum=0.9"),
    ),
    "early": Case(
        "positive among the negatives", "keys enqueued before the loss", (*SHORT, "method.mask_own_keys=false"), "early"
    ),
    "weak": Case(
        "augmentation too weak", "augmentation off", (*SHORT, "augment.affine_p=0.0", "augment.noise=[0.0,0.0]")
    ),
    "leak": Case(
        "BN leak",
        "keys not shuffled, BN in groups of 2, temperature 0.1",
        ("epochs=10", "evaluate.every_epochs=5", "model.shuffle_keys=false", *PAIRS),
    ),
    "no_leak": Case("", "the same with shuffled keys", ("epochs=10", "evaluate.every_epochs=5", *PAIRS)),
    "jump": Case(
        "learning rate too high",
        "learning rate 200 times as high in every 20th step from 40 on",
        (*SHORT, "epochs=12", *OFTEN),
        "jump",
    ),
    "fast": Case("collapse", "learning rate 10 times as high", (*SHORT, "epochs=8", *OFTEN, "optim.lr=0.6")),
    "wild": Case("collapse", "learning rate 170 times as high", (*SHORT, "optim.lr=10")),
    "unrelated": Case("loss at chance", "the two views show two images", (*SHORT, "epochs=6", *OFTEN), "unrelated"),
    "slow": Case("data starvation", "a batch takes as long to arrive as a step", SHORT, "slow"),
}


def early(patch: Patch) -> None:
    """Enqueue keys before the loss, as a published queue once did: each query's own key is a negative."""
    forward, enqueue = MoCo.forward, MoCo.enqueue

    def hasty(self: MoCo, views: Any, keys: Any, index: Any, start: int = 0) -> Any:
        enqueue(self, torch.stack(list(keys.values()), dim=1), index)
        return forward(self, views, keys, index, start)

    patch(MoCo, "forward", hasty)
    patch(MoCo, "enqueue", lambda self, keys, index: None)


def unrelated(patch: Patch) -> None:
    """Let the two views of a pair show two images: each key is that of the batch's next image."""
    encode = MoCo.encode_keys

    def shifted(self: MoCo, views: Any, shuffles: Any, micro_batch: int) -> Any:
        return encode(self, [view.roll(1, dims=0) for view in views], shuffles, micro_batch)

    patch(MoCo, "encode_keys", shifted)


def slow(patch: Patch) -> None:
    """Delay each batch by the duration of the previous step, independent of the load on the machine."""
    arriving = vars(trainer)["batches"]

    def late(*arguments: Any, **named: Any) -> Iterator[Any]:
        for batch in arriving(*arguments, **named):
            start = time.monotonic()
            yield batch
            time.sleep(time.monotonic() - start)

    patch(trainer, "batches", late)


def jump(patch: Patch) -> None:
    """Multiply the learning rate of every 20th step by 200, from step 40 on."""
    schedule_values = vars(trainer)["schedule_values"]

    def wrong(config: Any, plan: Any, peak_lr: float, step: int) -> dict[str, float]:
        now: dict[str, float] = schedule_values(config, plan, peak_lr, step)
        return now | {"lr": now["lr"] * (200 if step >= 40 and step % 20 == 0 else 1)}

    patch(trainer, "schedule_values", wrong)


DEFECTS: dict[str, Callable[[Patch], None]] = {"early": early, "unrelated": unrelated, "slow": slow, "jump": jump}


@contextmanager
def defect(name: str) -> Iterator[None]:
    """Inject a defect into the code; "" injects none."""
    with pytest.MonkeyPatch.context() as patch:
        if name:
            DEFECTS[name](patch.setattr)
        yield


def command(case: Case, run: Path) -> list[str]:
    """Return the command that runs a case."""
    start = ["tests.analysis.faults", "--inject", case.defect] if case.defect else ["moco.train"]
    return [sys.executable, "-m", *start, *COMMON, *case.overrides, f"run={run}"]


def log_of(name: str, folder: Path) -> str:
    """Return the output of a case, and first run the case if it has no output yet."""
    file = folder / f"{name}.log"
    if not file.is_file():
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        done = subprocess.run(
            command(CASES[name], folder / name), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
        file.with_suffix(".part").write_bytes(done.stdout)
        file.with_suffix(".part").rename(file)
    return file.read_text()


LOGGED = re.compile(r"^doctor, (?:epoch )?([\d.]+|before the first step): ([^:]+): (.*)$", re.MULTILINE)


def row(case: Case, log: str) -> list[str]:
    """Return a row of the table: fault, command line, alarm, epoch, evidence, other alarms."""
    found = {name: (epoch, evidence.split(". Try ")[0]) for epoch, name, evidence in LOGGED.findall(log)}
    how = " ".join(word for word in case.overrides if word not in (*SHORT, *OFTEN) and not word.startswith("epochs="))
    if case.defect:
        how = f"--inject {case.defect} {how}".strip()
    epoch, evidence = found.pop(case.alarm, ("–", "NOT SEEN" if case.alarm else "–"))
    also = "; ".join(f"{name} ({at})" for name, (at, _) in found.items()) or "nothing"
    ended = "" if "─ done ─" in log else f"; ended: {log.strip().splitlines()[-1][:160]}"
    return [case.title, f"`{how}`" if how else "defaults", case.alarm or "none", epoch, evidence, also + ended]


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="directory for the runs and their output")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = [["run", "how", "expected alarm", "in epoch", "evidence", "other alarms"], ["---"] * 6]
    for name in options.only:
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows.append(row(CASES[name], log_of(name, options.folder)))
    print("\n".join("| " + " | ".join(cells) + " |" for cells in rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inject"]:
        injected = sys.argv[2]
        del sys.argv[1:3]
        with defect(injected):
            run_command("train", TrainConfig, train)
    else:
        main()
