"""Pretraining: one attempt at a run, from its newest checkpoint or its first step to its end.

`Trainer._loop` takes the steps. One step, in this order:

    read a batch                                             `moco.data.loader.batches`
    compute the loss and its gradient, update the weights    `moco.training.step.train_step`
    log                                                      `Trainer._log`
    evaluate                                                 `Trainer._evaluate`
    save a checkpoint, if one is due                         `Trainer._save_if_due`
    after a signal or at the time limit: save and stop       `Trainer._save_and_stop_if_requested`
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter

import torch

import moco
from moco import plugins
from moco.analysis.doctor import Doctor
from moco.config import TrainConfig
from moco.data.keyed import step_seed
from moco.data.loader import Batch, batches
from moco.data.opening import build_views
from moco.data.plan import Plan
from moco.data.unreadable import UnreadableImages
from moco.distributed import (
    DelayedMaxOverRanks,
    averaged_running_statistics,
    broadcast_module,
    is_rank_zero,
    max_over_ranks,
    on_rank_zero,
    rank,
    restore_running_statistics,
    world_size,
)
from moco.interop.encoder_file import save_encoder, with_bits
from moco.optim.schedules import scaled_lr, schedule_values
from moco.runs import checkpoint
from moco.runs.directory import refuse_difference, refuse_missing_plugins
from moco.runs.metrics import MetricsLogger, check_loggers
from moco.runtime.console import Display
from moco.runtime.errors import NonFiniteLoss
from moco.runtime.memory import explain_out_of_memory, keep_freed_memory, training_fix
from moco.runtime.preemption import Preempted, PreemptionHandler, Reason, keeping
from moco.runtime.provenance import commit
from moco.runtime.sharding import full_state, full_weights
from moco.runtime.watchdog import Watchdog, watched_context
from moco.training import build
from moco.training.checkpoint_schedule import CheckpointSchedule
from moco.training.checks import check_against_data
from moco.training.consistency import record_names, refuse_other_data, refuse_other_settings
from moco.training.init_from import load_initial_weights
from moco.training.live_evaluation import LiveEvaluation
from moco.training.nonfinite import NonFiniteGuard
from moco.training.step import Measures, train_step
from moco.training.summary import announce, show_views, summarize
from moco.training.throughput import Profile, Throughput


def pretrain(config: TrainConfig, preemption: PreemptionHandler | None = None) -> None:
    """Train as `moco.train.train` does. If `preemption` is None, this function catches the signals itself."""
    if preemption is None:
        with PreemptionHandler(config.stop_after) as preemption:
            return pretrain(config, preemption)
    kept = keeping("checkpoints", lambda: bool(checkpoint.list_checkpoints(Path(config.run, "checkpoints"))))
    with kept, watched_context(config) as (device, watchdog):
        if device.type == "cpu":
            keep_freed_memory()
        Trainer(config, preemption, watchdog, device).run()


class Trainer:
    """One attempt at a pretraining run.

    The constructor builds the parts of the run in the order in which they depend on each other, and restores the newest
    checkpoint. Every rank has all parts, except that only rank 0 has the lock, metrics log, doctor and profile.
    """

    def __init__(
        self, config: TrainConfig, preemption: PreemptionHandler, watchdog: Watchdog, device: torch.device
    ) -> None:
        self.config, self.preemption, self.watchdog, self.device = config, preemption, watchdog, device
        self.path = Path(config.run)
        self._check_settings()

        # The images, their views, and the samples of each step.
        self.views = build_views(config.augment, config.data)
        self.sources, self.data_identity = build.open_data(config, watchdog)
        self._stop_if_signaled()
        train, ranks = self.sources.train, (rank(), world_size())
        self.plan = Plan(len(train), config.batch_size, config.epochs, config.seed, *ranks, train.draws)
        check_against_data(config, self.plan, self.sources)

        # The precision, the peak learning rate, and the method with the weights of the newest checkpoint.
        self.method = build.make_method(config, self.sources.train.labels, device)
        self.lock = build.open_directory(config)
        state = build.load_state(config)
        self.precision, self.precision_reason = build.choose_precision(config, state, self.method.encoder, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.peak_lr = scaled_lr(config.optim.lr, config.batch_size, config.optim.base_batch)
        self.start = 0
        self.notes = self._restore(state)
        on_rank_zero(lambda: record_names(self.path, self.sources.train, resumed=bool(state)))
        broadcast_module(self.method)

        # Output: terminal, metrics, checkpoints.
        unfinished = self.start < self.plan.total_steps
        self.computed_on = build.devices_used(state, device, unfinished)
        self.display = Display(self.plan.total_steps, self.plan.steps_per_epoch, self.start)
        self.throughput = Throughput(config, self.method, device, self.precision, self.display.log, unfinished)
        logs_metrics = is_rank_zero() and unfinished
        self.metrics_log = MetricsLogger(self.path, self.start, config.logger) if logs_metrics else None
        facts = build.doctor_facts(config, self.plan, self.sources.train.images is not None)
        self.doctor = Doctor(facts, self.path / "metrics.jsonl", self.display.log) if self.metrics_log else None
        self.saver = checkpoint.Saver(self.path / "checkpoints", config.checkpoint.keep_last)
        self.commit = commit() if is_rank_zero() else None
        self.profile: Profile | None = None

        # Training, its checks, and its evaluations. Each step sets the learning rate of the optimizer.
        self.forward = build.distribute(config, self.method, device)  # DDP copies rank 0's buffers to all ranks
        self.optimizer = build.make_optimizer(config, self.method, state)
        restore_running_statistics(self.method, state.get("statistics"))
        self.guard = self._build_guard(state.get("skipped", 0))
        self.settings = build.step_settings(config, self.method, device, self.precision, self.guard.in_step)
        self.monitor = build.make_monitor(config, self.method, self.sources.train.labels, device, self.precision)
        self.unreadable: UnreadableImages | None = None
        if config.data.on_bad_image == "replace":
            self.unreadable = UnreadableImages(self.sources.train, self.path / "bad_images.csv", config.data.max_bad)
        parts = config, self.method, self.sources, device, self.plan
        self.live = LiveEvaluation(*parts, state.get("history", []), watchdog.heartbeat)
        self.live.restore_probe(state.get("probe"))
        if self.unreadable and config.evaluate.every_epochs and unfinished:
            self.notes += self.live.exclude_unreadable(self.unreadable.note)
        if config.evaluate.every_epochs and self.start == 0:
            self.notes += self.live.count_copies()
        self.delayed_max = DelayedMaxOverRanks(device)  # of the reasons to stop, and of `CheckpointSchedule.is_late`
        self.late = False  # whether the last checkpoint is older than `checkpoint.every_minutes`
        self.schedule = CheckpointSchedule(config.checkpoint, self.plan.steps_per_epoch, state.get("seconds", 0.0))

    def _check_settings(self) -> None:
        """Refuse settings that differ between ranks, missing plug-ins and unknown loggers; stop after a signal."""
        refuse_other_settings(asdict(self.config) | {"plugins": plugins.versions()})
        on_rank_zero(lambda: refuse_missing_plugins(self.path))
        check_loggers(self.config.logger)
        self._stop_if_signaled()

    def _restore(self, state: checkpoint.Checkpoint) -> list[str]:
        """Restore a checkpoint; without one, load the weights of `init_from`, if any. Return lines to print."""
        if state:
            if is_rank_zero():
                plugins.warn_of_other_versions(state.get("versions", {}).get("plugins"))
            with checkpoint.refuse_misfit(self.path / "checkpoints"):
                refuse_difference(self.path, state["config"], asdict(self.config), asdict(TrainConfig()))
                refuse_other_data(self.path, state, self.data_identity, self.config.data, self.sources.train)
                build.load_weights(self.config, self.method, state)
                self.scaler.load_state_dict(state["scaler"])
                self.start = state["step"]
                if self.start > self.plan.total_steps:
                    raise ValueError(f"step {self.start} is beyond the {self.plan.total_steps} steps of the run")
            self.watchdog.finished(self.start)
        elif self.config.init_from:
            return [load_initial_weights(self.config, self.method)]
        return []

    def _build_guard(self, skipped: int) -> NonFiniteGuard:
        limit, folder = self.config.optim.skip_nonfinite, self.path / "nonfinite"
        in_step = self.device.type != "cuda" or self.scaler.is_enabled() or limit > 0
        return NonFiniteGuard(self.plan, in_step, limit, skipped, folder, self._training_state, self.display.log)

    # ---- steps

    def run(self) -> None:
        """Take all steps that are left, export the encoder, and print a summary."""
        announce(self)
        if self.start < self.plan.total_steps:
            self._train()
        with averaged_running_statistics(self.method):
            weights = full_weights(self.method.encoder.get_submodule("backbone"))
            config = with_bits(asdict(self.config), self.sources.train.pixel_format.bits)
            on_rank_zero(
                lambda: save_encoder(self.path / "encoder.safetensors", weights, config, self.plan.total_steps)
            )
        summarize(self)
        if self.lock is not None:
            self.lock.close()

    def _train(self) -> None:
        """Start to read batches, evaluate before the first step, and take the steps."""
        config, train = self.config, self.sources.train
        build.set_batch_norm_calls(self.method, config.accumulate)
        self.method.train()
        note = self.unreadable.note if self.unreadable else None
        if self.metrics_log:
            show_views(self.metrics_log, self.path, train, self.plan, self.views, self.device, note)
        places = config.method.uses_places
        stream = batches(train, self.plan, self.views, self.device, config.data.workers, self.start, note, places)
        if config.profile and is_rank_zero():
            self.profile = Profile(self.path / "profile", self.device, self.display.log)
        on_gpu = self.device.type == "cuda"
        group = config.model.bn_group_size if config.model.bn == "grouped" else None
        fix = training_fix(config.batch_size, world_size(), config.accumulate, group, on_gpu, self.precision)
        try:
            if self.doctor:
                self.doctor.check()  # reports unsuitable settings before the first step
            with self.saver, explain_out_of_memory(self.device, fix), closing(stream):
                self._stop_if_signaled()
                self._evaluate_at_start()
                with self.preemption.stepping():
                    self._loop(stream)
                    on_rank_zero(self.saver.join)
        finally:
            for part in (self.profile, self.display, self.metrics_log):
                if part is not None:
                    part.close()

    def _loop(self, stream: Iterator[Batch]) -> None:
        """Take all steps that are left; see the top of this file."""
        total, every = self.plan.total_steps, self.config.log_every
        for step in range(self.start, total):
            began = perf_counter()
            batch = next(stream)
            arrived = perf_counter()
            measures = self._step(step, batch)
            self.throughput.add_step(began, arrived)
            done = step + 1
            if measures and (done % every == 0 or done in (1, total)):
                self._log(done, measures)
            self._finish_step(done)

    def _step(self, step: int, batch: Batch) -> Measures | None:
        """Train on one batch. Return its measures, or None if it was skipped for a non-finite loss or gradient."""
        config, method = self.config, self.method
        values = schedule_values(config, self.plan, self.peak_lr, step)
        method.temperature = values.get("temperature", method.temperature)
        method.step = step
        # Only dropout and drop-path, in timm models, draw from torch's generator. A resumed run draws the same masks,
        # because each step has its own seed. The masks differ between ranks.
        torch.manual_seed(step_seed(config.seed, step * world_size() + rank()))
        settings = replace(self.settings, lr=values["lr"], momentum=values["momentum"])
        shuffles = self.plan.shuffles(step, len(self.views)) if config.model.shuffle_keys else None
        monitor = self.monitor if self.monitor.is_due(step + 1) else None
        try:
            measures = train_step(method, self.forward, self.optimizer, self.scaler, batch, shuffles, settings, monitor)
        except NonFiniteLoss as error:
            self.guard.skip(step, batch.index, error)
            if self.live.probe:
                self.live.probe.discard()
            return None
        self.guard.check(step, batch.index, measures)
        return measures | (self.live.probe.step(batch.index, config.accumulate) if self.live.probe else {})

    def _finish_step(self, done: int) -> None:
        """Evaluate, save and stop after `done` steps, each only if it is due."""
        self.watchdog.finished(done)
        if self.profile is not None:
            self.profile.step()
        self.display.step(done)
        last = done == self.plan.total_steps
        # An evaluation may take longer than a launcher waits after its signal: save first, evaluate when resumed.
        evaluate = self.live.is_due(done)
        reason = max_over_ranks(self.preemption.reason()) if evaluate else Reason.NONE
        if reason and last:
            self._save(done)  # only the evaluation is left
        if evaluate and (last or not reason):
            self._evaluate(done)
        if self.doctor and (done % self.plan.steps_per_epoch == 0 or last):
            self.doctor.check()
        saved = self._save_if_due(done)
        if not last:
            self._save_and_stop_if_requested(done, reason, saved)

    # ---- checkpoints

    def _save_if_due(self, done: int) -> bool:
        """Save after the last step and at the intervals of `config.checkpoint`. Return whether a checkpoint was saved.

        With `keep_best`, also save after an evaluation with the best result so far.
        """
        best = self._is_best(done)
        due = done == self.plan.total_steps or best or self.late or self.schedule.is_due(done)
        if due:
            self._save(done, self.schedule.keeps(done), best)
        return due

    def _is_best(self, done: int) -> bool:
        return self.config.checkpoint.keep_best and checkpoint.is_best(self.live.history, done)

    def _save(self, done: int, keep: bool = False, best: bool = False) -> None:
        """Save a checkpoint after `done` steps; see `moco.runs.checkpoint.save`."""
        self.guard.check_pending()
        self._synchronize_unreadable()
        with averaged_running_statistics(self.method) as statistics:
            state = self._state(done) | statistics  # on all ranks, see `full_state`
            on_rank_zero(lambda: self.saver.save(done, state, keep, best))
        self.schedule.saved()

    def _state(self, done: int) -> checkpoint.Checkpoint:
        """Return all that a resumed run needs."""
        versions = {"moco": moco.__version__, "torch": str(torch.__version__), "commit": self.commit}
        return self._training_state() | {
            "step": done,
            "history": self.live.history,
            "measured": self.live.title,
            "seconds": self.schedule.record(),
            "scaler": self.scaler.state_dict(),
            "versions": versions | plugins.recorded(),
            "world_size": world_size(),
            "skipped": self.guard.skipped,
            "precision": self.precision,
            "computed_on": self.computed_on,
            "data": self.data_identity,
            "bits": self.sources.train.pixel_format.bits,
        }

    def _training_state(self) -> checkpoint.Checkpoint:
        method, optimizer = full_state(self.method, self.optimizer)
        return {"config": asdict(self.config), "method": method, "optimizer": optimizer} | self.live.probe_state()

    # ---- stopping before the end

    def _save_and_stop_if_requested(self, done: int, reason: int, saved: bool) -> None:
        """Save and stop if any rank has received a signal, reached its time limit, or failed to save.

        Args:
            done: number of finished steps.
            reason: why to stop, if the ranks have agreed on that already.
            saved: whether there is a checkpoint of these steps.

        Raises:
            Preempted: on all ranks, once the checkpoint is on disk.
        """
        reason_here = Reason.NOT_SAVED if self.saver.failed() else self.preemption.reason()
        late_here = is_rank_zero() and self.schedule.is_late()
        reason_anywhere, late = divmod(self.delayed_max(2 * reason_here + late_here), 2)  # one reduction for both
        self.late = bool(late) and not saved  # several ranks measured `late` before that save
        if reason := max(reason, reason_anywhere):
            if not saved:
                self._save(done)  # if the previous save failed, this raises its error, on all ranks
            on_rank_zero(self.saver.join)
            raise Preempted(Reason(reason), done, self.plan.total_steps)

    def _stop_if_signaled(self) -> None:
        """Stop all ranks, without saving, if one of them has received a signal. Not for use after a step."""
        self.watchdog.heartbeat()
        if reason := max_over_ranks(self.preemption.signal_received()):
            raise Preempted(Reason(reason))

    # ---- evaluation and logging

    def _evaluate_at_start(self) -> None:
        """Evaluate before the first step, or if the previous attempt was stopped before it could evaluate."""
        if self.live.is_due(self.start):
            self._evaluate(self.start)
            self._stop_if_signaled()
            if self.start:
                self._save(self.start, self.schedule.keeps(self.start), self._is_best(self.start))

    def _evaluate(self, done: int) -> None:
        """Evaluate the encoder after `done` steps."""
        self.guard.check_pending()
        with explain_out_of_memory(self.device, self.live.memory_fix), averaged_running_statistics(self.method):
            results, line = self.live.evaluate(done)
        self._record(done, results)
        self.display.log(line)

    def _log(self, done: int, measures: Measures) -> None:
        """Write the measures of a step to metrics.jsonl, the loggers and the terminal."""
        numbers = torch.stack(list(measures.values())).tolist()  # one copy to the host
        values = {name if "/" in name else f"train/{name}": x for name, x in zip(measures, numbers, strict=True)}
        schedules = schedule_values(self.config, self.plan, self.peak_lr, done - 1)
        values |= {f"train/{name}": value for name, value in schedules.items()}
        values["train/epoch"] = done / self.plan.steps_per_epoch
        if self.method.queue is not None:
            values["train/queue_fill"] = self.method.queue.filled() / self.method.queue.size
        values |= self.throughput.record()
        self._synchronize_unreadable()
        self._record(done, values)
        if self.metrics_log:
            for name, counts in self.monitor.histograms.items():
                self.metrics_log.log_histogram(f"similarity/{name}", counts, done)
            self.monitor.histograms = {}
        self.display.step(done, values)

    def _record(self, done: int, values: dict[str, float]) -> None:
        if self.metrics_log and self.doctor:
            self.metrics_log.log(done, values)
            self.doctor.record(values)

    def _synchronize_unreadable(self) -> None:
        """Share the unreadable images that each rank has found; log a line when the first ones are found."""
        unreadable = self.unreadable
        if unreadable is not None and (new := unreadable.synchronize()) and new == len(unreadable.found):
            self.display.log(f"unreadable images are replaced by others and listed in {unreadable.file}: {new} so far")
