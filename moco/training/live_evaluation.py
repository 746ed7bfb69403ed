"""Evaluation during training: kNN accuracy on a labeled held-out split, else instance retrieval."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from moco.builder import Method
from moco.config import EvaluateConfig, TrainConfig
from moco.data.base import Sources
from moco.data.duplicates import copies_message, count_copies
from moco.data.opening import without_unreadable_evaluation_images
from moco.data.plan import Plan
from moco.data.unreadable import OnUnreadable
from moco.evaluation.features import EvalTransform, Inference, Network, extract, pixels
from moco.evaluation.instance_retrieval import images_used, instance_retrieval
from moco.evaluation.knn_classifier import Accuracy, KnnSettings, knn_accuracy, knn_title
from moco.evaluation.subject import labels_of
from moco.evaluation.subsets import naming_field
from moco.methods.build import encoder_of
from moco.runtime.device import float64_device
from moco.runtime.precision import PRECISIONS
from moco.runtime.sharding import whole_weights
from moco.training.online_probe import OnlineProbe

# One entry per evaluation: "step", "epoch" and the result of the encoder, "knn" (and "probe") or "retrieval". The entry
# of step 0 may also have the baseline "raw_pixels". If the run measures "retrieval" and the encoder starts from trained
# weights, that entry has the baseline "untrained" too.
History = list[dict[str, Any]]
BASELINES = {"raw_pixels": "raw pixels", "untrained": "untrained", "initialized": "initialized"}


class LiveEvaluation:
    """Evaluates the encoder every few epochs and keeps the history of the results.

    With labeled reference and held-out images, the result is the accuracy of the kNN classifier. Without such images,
    the result is the retrieval at 1 of `moco.evaluation.instance_retrieval`, on training images.

    `heartbeat` is called regularly during an evaluation.
    """

    def __init__(
        self,
        config: TrainConfig,
        method: Method,
        sources: Sources,
        device: torch.device,
        plan: Plan,
        history: History,
        heartbeat: Callable[[], None],
    ) -> None:
        self._config, self._method, self._sources, self._device = config, method, sources, device
        self._plan, self.history, self._heartbeat = plan, history, heartbeat
        labeled = sources.bank is not None and sources.held_out is not None
        self.measure = "knn" if labeled else "retrieval"
        self._short_title = ""  # set once the full title was printed
        self._on_unreadable: OnUnreadable | None = None
        self.probe: OnlineProbe | None = None
        if config.evaluate.online_probe:
            known = [labels_of(each) for each in (sources.train, sources.held_out) if each and each.labels is not None]
            classes = 1 + max(int(labels.max()) for labels in known)
            backbone = method.encoder.get_submodule("backbone")
            self.probe = OnlineProbe(backbone, labels_of(sources.train), classes, float64_device(device))

    @property
    def title(self) -> str:
        """What is measured, with its settings."""
        if self.measure == "knn" and self._sources.bank is not None:
            return knn_title(self._config.evaluate, len(self._sources.bank)) + self._noise()
        used = images_used(self._plan.length, self._plan.batch_size)
        count = f"{used:,} images" if used == self._plan.length else f"{used:,} of the {self._plan.length:,} images"
        return f"two crops of an image find each other among {count} (± standard error)"

    @property
    def memory_fix(self) -> str:
        """What to change if an evaluation needs more memory than there is."""
        if self.measure == "knn":
            return f"set evaluate.batch_size below {self._config.evaluate.batch_size}, or a smaller evaluate.bank_size"
        return f"set batch_size below {self._config.batch_size}"

    def _noise(self) -> str:
        """Return the largest possible standard error of a kNN accuracy, as text; "" below one point."""
        held_out = self._sources.held_out
        if held_out is None or self._config.evaluate.labels_per_class:  # then the spread over the draws is shown
            return ""
        error = 50 / math.sqrt(len(held_out))  # that of an accuracy of 50 %
        return f", standard error up to {error:.1f} points" if error >= 1 else ""

    def probe_state(self) -> dict[str, Any]:
        """Return the online probe's entry of a checkpoint, {"probe": ...}; {} without a probe."""
        return {} if self.probe is None else {"probe": self.probe.state_dict()}

    def restore_probe(self, state: dict[str, Any] | None) -> None:
        """Restore the online probe from a checkpoint's entry "probe"."""
        if self.probe is not None and state:
            self.probe.load_state_dict(state)

    def exclude_unreadable(self, on_unreadable: OnUnreadable) -> list[str]:
        """Remove unreadable images from the reference and held-out images; return a line for each split that had any.

        Retrieval uses the training images: it replaces unreadable ones and reports them to `on_unreadable`.
        """
        self._on_unreadable = on_unreadable
        self._sources, lines = without_unreadable_evaluation_images(self._sources, self._config.data, self._heartbeat)
        return lines

    def count_copies(self) -> list[str]:
        """Return a line about held-out images that are reference images too, if there are any. Collective."""
        bank, held_out = self._sources.bank, self._sources.held_out
        if bank is None or held_out is None:
            return []
        count = count_copies(bank, held_out, self._heartbeat)
        return [copies_message(count, len(held_out))] if count else []

    def is_due(self, done: int) -> bool:
        """Return whether to evaluate after `done` steps. An evaluation in the history is not repeated."""
        every = self._config.evaluate.every_epochs
        if not every:
            return False
        epoch, rest = divmod(done, self._plan.steps_per_epoch)
        wanted = done == self._plan.total_steps or (rest == 0 and epoch % every == 0)
        return wanted and all(each["step"] != done for each in self.history)

    def evaluate(self, done: int) -> tuple[dict[str, float], str]:
        """Evaluate after `done` steps; BN's running statistics must be equal on all ranks. Collective.

        Returns:
            The results, by their names in metrics.jsonl, and a line that reports them.
        """
        start, epoch = done == 0, done / self._plan.steps_per_epoch
        with whole_weights(self._method.encoder):
            if self.measure == "knn":
                given = self._config, self._method, self._sources, self._device, start, self._heartbeat
                scores = live_knn(*given, None if start else self.probe)
            else:
                scores = self._retrieval(start)
        self.history.append({"step": done, "epoch": epoch} | {name: list(score) for name, score in scores.items()})
        # The baselines are repeated each time, so that their curves are horizontal lines beside the encoder's curve.
        group = {"knn": "accuracy", "retrieval": "retrieval"}[self.measure]
        found = {name: score for name, score in scores.items() if name in (self.measure, "probe")}
        curves = baselines(self.history, self._config.starts_trained) | found
        names = BASELINES | {"probe": "online linear probe"}
        names[self.measure] = _initial_name(self._config.starts_trained) if start else f"epoch {epoch:g}"
        results = ", ".join(f"{names[name]} {score}" for name, score in scores.items())
        line = f"{self._short_title or self.title}: {results}"
        self._short_title = {"knn": "held-out kNN", "retrieval": "two crops find each other"}[self.measure]
        return {f"{group}/{name}": score.mean for name, score in curves.items()}, line

    def _untrained_encoder(self) -> nn.Module:
        """Return the encoder with random weights: the baseline of a run that starts from trained ones."""
        options = {name: value for name, value in self._config.model.options.items() if name != "pretrained"}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._config.seed)
            return encoder_of(replace(self._config.model, options=options), self._config.data.channels).to(self._device)

    def _retrieval(self, start: bool) -> dict[str, Accuracy]:
        """Return the retrieval at 1 of the encoder, and at the start also of the baselines."""
        config, augment = self._config, self._config.augment
        networks: dict[str, Network] = {}
        if start:
            networks["raw_pixels"] = pixels
            if config.starts_trained:
                networks["untrained"] = evaluated_network(self._untrained_encoder(), config.evaluate)
        networks["retrieval"] = evaluated_network(self._method.encoder, config.evaluate)
        return instance_retrieval(
            networks,
            self._sources.train,
            EvalTransform(augment.size, mean=augment.mean, std=augment.std),
            Inference(self._device, config.batch_size, config.data.workers, PRECISIONS[config.evaluate.precision]),
            on_unreadable=self._on_unreadable,
            heartbeat=self._heartbeat,
        )


def _initial_name(starts_trained: bool) -> str:
    """Return the name of the encoder before the first step."""
    return "initialized" if starts_trained else "untrained"


def baselines(history: History, starts_trained: bool) -> dict[str, Accuracy]:
    """Return the results before the first step, by name; empty if the run was not evaluated then."""
    first = history[0] if history and history[0]["step"] == 0 else {}
    encoder = _initial_name(starts_trained)
    names = {"raw_pixels": "raw_pixels", "untrained": "untrained", "knn": encoder, "retrieval": encoder}
    return {name: Accuracy(*first[key]) for key, name in names.items() if key in first}


def evaluated_network(encoder: nn.Module, evaluate: EvaluateConfig) -> nn.Module:
    """Return the part of an encoder that computes the features of `evaluate.features`."""
    return encoder if evaluate.features == "projection" else encoder.get_submodule("backbone")


def live_knn(
    config: TrainConfig,
    method: Method,
    sources: Sources,
    device: torch.device,
    with_pixels: bool,
    heartbeat: Callable[[], None],
    probe: OnlineProbe | None = None,
) -> dict[str, Accuracy]:
    """Return accuracies by name: "knn" of the current encoder, and "probe" of the online probe unless it is None.

    If `with_pixels` and evaluate.raw_pixels are true, the result also has the accuracy of raw pixels, "raw_pixels".
    """
    evaluate, augment, bank, held_out = config.evaluate, config.augment, sources.bank, sources.held_out
    assert bank is not None
    assert held_out is not None
    transform = EvalTransform(augment.size, augment.eval_resize, augment.mean, augment.std)
    settings = KnnSettings(evaluate.k, evaluate.temperature, evaluate.labels_per_class, evaluate.draws)
    networks: dict[str, Network] = {"knn": evaluated_network(method.encoder, evaluate)}
    if with_pixels and evaluate.raw_pixels:
        networks = {"raw_pixels": pixels} | networks
    inference = Inference(device, evaluate.batch_size, config.data.workers, PRECISIONS[evaluate.precision])
    scores = {}
    for name, network in networks.items():
        inputs = transform.unnormalized() if network is pixels else transform
        references, queries = (extract(network, source, inputs, inference, heartbeat) for source in (bank, held_out))
        with naming_field("evaluate.labels_per_class", evaluate.labels_per_class):
            given = references, labels_of(bank), queries, labels_of(held_out)
            scores[name] = knn_accuracy(*given, settings, lambda *_: heartbeat())
    if probe is not None:
        if evaluate.features != "backbone":
            backbone = method.encoder.get_submodule("backbone")
            queries = extract(backbone, held_out, transform, inference, heartbeat)
        scores["probe"] = Accuracy(probe.accuracy(queries, labels_of(held_out)), 0.0, 1)
    return scores
