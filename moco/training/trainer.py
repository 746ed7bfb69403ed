"""Pretraining from a configuration to a summary: set up, build, resume, train, evaluate."""

from contextlib import closing, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

import moco
from moco.analysis.doctor import Doctor, facts_of
from moco.config import TrainConfig, require
from moco.data.loader import Batch, batches
from moco.data.opening import build_views, open_sources, without_unreadable_references
from moco.data.plan import Plan
from moco.data.unreadable import UnreadableImages
from moco.distributed import (
    DelayedMaxOverRanks,
    average_running_statistics,
    broadcast_module,
    is_rank_zero,
    max_over_ranks,
    on_rank_zero,
    process_group,
    rank,
    world_size,
    wrap_ddp,
)
from moco.interop.encoder_file import save_encoder
from moco.methods.build import build_method
from moco.models.norm import set_calls_per_step
from moco.optim.optimizers import build_optimizer, load_optimizer
from moco.optim.schedules import scaled_lr
from moco.runs import checkpoint
from moco.runs.directory import open_run, refuse_difference
from moco.runs.metrics import MetricsLogger
from moco.runtime.console import Display
from moco.runtime.device import pick_device
from moco.runtime.memory import explain_out_of_memory, keep_freed_memory, training_fix
from moco.runtime.precision import PRECISIONS, pick_precision
from moco.runtime.preemption import Preempted, PreemptionHandler, Reason
from moco.runtime.provenance import commit
from moco.runtime.watchdog import Watchdog, rendezvous_store
from moco.training.build import check_against_data
from moco.training.checkpoint_schedule import CheckpointSchedule
from moco.training.consistency import open_consistently, refuse_other_data, refuse_other_settings
from moco.training.init_from import load_initial_weights
from moco.training.live_knn import LiveKnn
from moco.training.loop import Values, fit
from moco.training.monitor import Monitor
from moco.training.nonfinite import NonFiniteGuard
from moco.training.schedules import schedule_values
from moco.training.speed import Speed, start_profile
from moco.training.step import train_step
from moco.training.summary import announce, show_views, summarize
from moco.training.throughput import Profile


def pretrain(config: TrainConfig, stop: PreemptionHandler | None = None) -> None:
    """See `moco.train.train`.

    Args:
        config: the run's.
        stop: what hears signals already; None: they are heard from here on.
    """
    if stop is None:
        with PreemptionHandler(config.stop_after) as stop:
            return pretrain(config, stop)
    device = pick_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    if device.type == "cpu":
        keep_freed_memory()
    patience = max(10.0, config.hang_after + 5)  # the watch is to speak first
    with (
        process_group(device, timeout_minutes=patience),
        Watchdog(config.hang_after, rendezvous_store(), rank(), world_size()) as watch,
    ):
        _pretrain(config, device, stop, watch)


def _pretrain(config: TrainConfig, device: torch.device, stop: PreemptionHandler, watch: Watchdog) -> None:
    def leave_if_told() -> None:
        """Before the first step, where all ranks are: one of them may have heard a signal."""
        watch.heartbeat()
        if reason := max_over_ranks(stop.signal_received()):
            raise Preempted(Reason(reason))

    refuse_other_settings(asdict(config))
    leave_if_told()
    path = Path(config.run)
    views = build_views(config.augment)
    replacing = config.data.on_bad_image == "replace"
    fetching = config.data.download or config.data.name == "huggingface"  # by somebody else's code, without a sign
    with watch.paused() if fetching else nullcontext():
        sources, pictures = open_consistently(
            lambda: open_sources(config.data, config.evaluate.bank_size, replacing, watch.heartbeat)
        )
    leave_if_told()
    plan = Plan(len(sources.train), config.batch_size, config.epochs, config.seed, rank(), world_size())
    check_against_data(config, plan)
    require(
        sources.held_out is not None or not config.checkpoint.keep_best,
        f"checkpoint.keep_best=true needs the live kNN accuracy, and data.name={config.data.name} has no labeled "
        "held-out part: set checkpoint.keep_best=false",
    )

    queue_size = config.method.queue_size
    torch.manual_seed(config.seed)  # initial weights and the random queue
    with explain_out_of_memory(
        device, f"set a smaller model than {config.model.backbone} or method.queue_size={queue_size}"
    ):
        method = build_method(config, sources.train.labels).to(device)
        if config.channels_last:
            method.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(method, config.optim)
    lock: list[IO[str]] = []  # held by rank 0 until the process ends
    on_rank_zero(lambda: lock.append(open_run(path, asdict(config), asdict(TrainConfig()))))
    state = on_rank_zero(lambda: checkpoint.load_newest(path / "checkpoints"))
    if state is not None and config.precision == "auto":
        precision, why = state.get("precision", "fp32"), "as before"
    else:
        precision, why = on_rank_zero(
            lambda: pick_precision(config.precision, method.encoder, config.augment.size, device)
        )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    start, history, seconds, skipped, initialized = 0, [], 0.0, 0, ""
    if state is not None:
        refuse_difference(path, state["config"], asdict(config), asdict(TrainConfig()))
        refuse_other_data(path, state, pictures, config.data)
        method.load_state_dict(state["method"])
        load_optimizer(optimizer, state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        start, history, seconds = state["step"], state["history"], state["seconds"]
        skipped = state.get("skipped", 0)
        watch.finished(start)
    elif config.init_from:
        initialized = load_initial_weights(config, method)
    broadcast_module(method)
    display = Display(plan.total_steps, plan.steps_per_epoch, start, quiet=not is_rank_zero())
    speed = Speed(config, method, device, precision, display, start < plan.total_steps)
    if config.compile:
        for name, network in method.named_children():
            if name not in ("queue", "learned_temperature"):
                network.compile()
    forward = wrap_ddp(method, device)

    queue = method.queue
    metrics_log = MetricsLogger(path, start) if is_rank_zero() and start < plan.total_steps else None
    peak_lr = scaled_lr(config.optim.lr, config.batch_size, config.optim.base_batch)
    announce(display, config, method, sources, plan, device, peak_lr, start, f"{precision} ({why})")
    if initialized:
        display.log(initialized)
    bad = UnreadableImages(sources.train, path / "bad_images.csv", config.data.max_bad) if replacing else None
    if replacing and config.evaluate.every_epochs and start < plan.total_steps:
        sources, left_out = without_unreadable_references(sources, config.data, watch.heartbeat)
        for line in left_out:
            display.log(line)
    clock = CheckpointSchedule(seconds, config.checkpoint, plan.steps_per_epoch)
    saver = checkpoint.Saver(path / "checkpoints", config.checkpoint.keep_last)
    over_ranks = DelayedMaxOverRanks(device)
    versions = {
        "moco": moco.__version__,
        "torch": str(torch.__version__),
        "commit": commit() if is_rank_zero() else None,
    }

    late = device.type == "cuda" and not scaler.is_enabled() and not config.optim.skip_nonfinite
    finite = NonFiniteGuard(
        plan,
        late,
        config.optim.skip_nonfinite,
        skipped,
        path / "nonfinite",
        lambda: {"config": asdict(config), "method": method.state_dict(), "optimizer": optimizer.state_dict()},
        display.log,
    )

    labels = sources.train.labels
    observer = Monitor(
        method,
        None if labels is None else torch.from_numpy(labels).to(device),
        config.batch_size * method.passes,
        config.model.shuffle_keys and config.model.bn == "grouped",
        PRECISIONS[precision],
    )
    look_every = config.log_every * config.analyse_every
    if config.batch_size // world_size() // config.accumulate < 2:
        look_every = 0  # of one sample there is no spread
    facts = facts_of(config.method, config.batch_size, plan.length)
    doctor = Doctor(facts, path / "metrics.jsonl", display.log) if metrics_log else None

    def step_once(step: int, batch: Batch) -> dict[str, Tensor] | None:
        now = schedule_values(config, plan, peak_lr, step)
        method.temperature = now.get("temperature", method.temperature)
        method.step = step
        # Only dropout and drop-path, where a timm model is told to have them, still draw from torch's generator:
        # a seed of its own for each step makes their resume exact too. Their masks differ between ranks.
        torch.manual_seed((config.seed + (step * world_size() + rank() + 1) * 0x9E3779B97F4A7C15) % 2**63)
        shuffles = plan.shuffles(step, len(views)) if config.model.shuffle_keys else None
        train = partial(
            train_step,
            method,
            forward,
            optimizer,
            scaler,
            batch.views,
            batch.index,
            shuffles,
            now["lr"],
            now["momentum"],
            config.accumulate,
            PRECISIONS[precision],
            config.optim.clip_grad,
            wait=not late,
            look=observer if look_every and (step + 1) % look_every == 0 else None,
        )
        return finite.run(step, batch.index, train)

    live = LiveKnn(config, method, sources, device, plan, history, metrics_log, doctor, display.log, watch.heartbeat)

    def evaluate(done: int) -> None:
        finite.settle()
        average_running_statistics(method)
        fix = f"set a smaller evaluate.batch_size={config.evaluate.batch_size} or evaluate.bank_size"
        with explain_out_of_memory(device, fix):
            live.evaluate(done)

    def settle_bad() -> None:
        if bad is not None and (new := bad.synchronize()) and new == len(bad.found):
            display.log(f"pictures that cannot be read are replaced and listed in {bad.file}: {new} so far")

    def save(done: int, keep: bool, best: bool) -> None:
        finite.settle()
        settle_bad()
        average_running_statistics(method)
        on_rank_zero(
            lambda: saver.save(
                done,
                {
                    "config": asdict(config),
                    "step": done,
                    "history": history,
                    "seconds": clock.total(),
                    "method": method.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                    "versions": versions,
                    "world_size": world_size(),
                    "skipped": finite.skipped,
                    "precision": precision,
                    "data": pictures,
                },
                keep,
                best,
            )
        )
        clock.saved()

    def on_log(done: int, values: Values) -> None:
        settle_bad()
        if queue is not None:
            values["train/queue_fill"] = queue.filled() / queue.size
        speed.complete(values)
        if metrics_log and doctor:
            metrics_log.log(done, values)
            doctor.record(values)
            for name, counts in observer.histograms.items():
                metrics_log.log_histogram(f"similarity/{name}", counts, done)
            observer.histograms = {}
        display.step(done, values)

    def is_best(done: int) -> bool:
        return config.checkpoint.keep_best and checkpoint.is_best(history, done)

    profile: Profile | None = None

    def on_step(done: int) -> None:
        watch.finished(done)
        if profile is not None:
            profile.step()
        display.step(done)
        last = done == plan.total_steps
        # An evaluation may take longer than a launcher waits for the end: nobody begins one who has been told to stop.
        evaluating = live.due(done)
        told_to = max_over_ranks(stop.reason()) if evaluating else Reason.NONE
        if told_to and last:
            save(done, False, False)  # behind which nothing is lost; the evaluation is all that is left
        if evaluating and (last or not told_to):
            evaluate(done)
        if doctor and (done % plan.steps_per_epoch == 0 or last):
            doctor.check()
        best = is_best(done)
        timed = done % min(config.log_every, 10) == 0
        due = last or best or clock.is_due(done) or (timed and on_rank_zero(clock.is_late))
        if due:
            save(done, clock.keeps(done), best)
        reason = max(told_to, over_ranks(Reason.NOT_SAVED if saver.failed() else stop.reason()))
        if reason and not last:
            if not due:
                save(done, False, False)  # raises what the writer failed with, on all ranks
            on_rank_zero(saver.join)
            raise Preempted(Reason(reason), done, plan.total_steps)

    if start < plan.total_steps:
        set_calls_per_step(method, method.passes * config.accumulate)
        method.train()
        if metrics_log:
            show_views(metrics_log, path, sources, plan, views, device, bad.note if bad else None)
        stream = batches(sources.train, plan, views, device, config.data.workers, start, bad.note if bad else None)
        profile = start_profile(config, device, display)
        fix = training_fix(config.batch_size, world_size(), config.accumulate, device.type == "cuda", precision)
        enough = explain_out_of_memory(device, fix)
        settings = partial(schedule_values, config, plan, peak_lr)
        try:
            with saver, enough, closing(stream):
                leave_if_told()
                if live.due(start):  # before the first step; or the run was stopped in place of it
                    evaluate(start)
                    leave_if_told()
                    if start:
                        save(start, clock.keeps(start), is_best(start))
                with stop.stepping():
                    fit(plan, stream, start, step_once, settings, config.log_every, on_log, on_step)
                    on_rank_zero(saver.join)
        finally:
            if profile is not None:
                profile.close()
            display.close()
            if metrics_log:
                metrics_log.close()
    if is_rank_zero():
        save_encoder(
            path / "encoder.safetensors", method.encoder.get_submodule("backbone"), asdict(config), plan.total_steps
        )
    finished_before = start == plan.total_steps
    summarize(
        display, config, method, plan, history, clock.total(), finished_before, bad, finite.skipped, speed.row(), doctor
    )
    for each in lock:
        each.close()
