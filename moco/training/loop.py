"""The loop around the step: timing, records, live evaluation, checkpoints. What is trained is the caller's."""

import time
from collections.abc import Callable, Iterator

import torch

from moco.data.loader import Batch
from moco.data.plan import Plan

Values = dict[str, float]


def fit(
    plan: Plan,
    batches: Iterator[Batch],
    start: int,
    step_once: Callable[[int, Batch], dict[str, torch.Tensor] | None],
    settings: Callable[[int], Values],
    log_every: int,
    on_log: Callable[[int, Values], None],
    on_step: Callable[[int], None],
) -> None:
    """Runs every step from `start` to the plan's end.

    Args:
        plan: the length of training and the batch size.
        batches: from step `start` on.
        start: steps done before.
        step_once: one optimizer step: (step, batch) to its measures; None for one that was skipped.
        settings: what a step was told (lr, momentum, ...) and what is cheap to know, for the records.
        log_every: steps between two records.
        on_log: gets the number of steps done and the record.
        on_step: gets the number of steps done, behind every step: the bar, evaluation, checkpoints.
    """
    busy, waited, counted = 0.0, 0.0, 0
    for step in range(start, plan.total_steps):
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        measures = step_once(step, batch)
        # On a GPU the host is at most a step ahead of the device, which the mean over the steps hides.
        busy += time.perf_counter() - before
        counted += 1
        done = step + 1
        if measures and (done % log_every == 0 or done == plan.total_steps or done == 1):
            values = {name if "/" in name else f"train/{name}": value.item() for name, value in measures.items()}
            values |= {f"train/{name}": value for name, value in settings(step).items()}
            values["train/epoch"] = done / plan.steps_per_epoch
            values["speed/images_per_second"] = counted * plan.batch_size / busy
            values["speed/data_wait"] = waited / busy
            on_log(done, values)
            busy, waited, counted = 0.0, 0.0, 0
        on_step(done)
