"""kNN accuracy on the held-out split while training, computed by the functions of `moco.evaluation`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moco.builder import Method
from moco.config import TrainConfig
from moco.data.base import Sources
from moco.data.opening import without_unreadable_references
from moco.data.plan import Plan
from moco.evaluation.features import EvalTransform, Network, extract, pixels
from moco.evaluation.knn_classifier import Accuracy, KnnSettings, knn_accuracy, knn_title
from moco.evaluation.subsets import naming_field

History = list[dict[str, Any]]  # one entry per evaluation: "step", "epoch", "knn" and, at step 0, "raw_pixels"


class LiveKnn:
    """Evaluates the encoder by kNN every few epochs, and keeps the history of the accuracies.

    Without reference or held-out images no evaluation is due. `heartbeat` is called after each batch of work.
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
        self._first = "initialized" if config.init_from else "untrained"  # the name of the encoder at step 0

    def exclude_unreadable(self) -> list[str]:
        """Remove unreadable images from the reference and held-out images; return a line per split with some."""
        self._sources, lines = without_unreadable_references(self._sources, self._config.data, self._heartbeat)
        return lines

    def is_due(self, done: int) -> bool:
        """Return whether to evaluate after `done` steps. An evaluation in the history is not repeated."""
        every = self._config.evaluate.every_epochs
        if not every or self._sources.bank is None or self._sources.held_out is None:
            return False
        epoch, rest = divmod(done, self._plan.steps_per_epoch)
        wanted = done == self._plan.total_steps or (rest == 0 and epoch % every == 0)
        return wanted and all(each["step"] != done for each in self.history)

    def evaluate(self, done: int) -> tuple[dict[str, float], str]:
        """Evaluate after `done` steps, with BN's running statistics averaged over the ranks. Collective.

        Returns:
            The accuracies, by their names in metrics.jsonl, and a line that reports them.
        """
        scores = live_knn(self._config, self._method, self._sources, self._device, done == 0, self._heartbeat)
        epoch, first = done / self._plan.steps_per_epoch, self._first
        self.history.append({"step": done, "epoch": epoch} | {name: list(score) for name, score in scores.items()})
        # The baselines are repeated each time, so that their curves are horizontal lines beside that of training.
        baselines = {first: self.history[0]["knn"], "raw_pixels": self.history[0].get("raw_pixels")}
        curves = {"knn": list(scores["knn"])} | {name: score for name, score in baselines.items() if score}
        names = {"knn": first if done == 0 else f"epoch {epoch:g}", "raw_pixels": "raw pixels"}
        results = ", ".join(f"{names[name]} {score}" for name, score in scores.items())
        accuracies = {f"accuracy/{name}": score[0] for name, score in curves.items()}
        return accuracies, f"{knn_title(self._config.evaluate)}: {results}"


class _WithHeartbeat(nn.Module):
    """Reports progress before each batch. Wraps the network: a forward hook would trigger recompilation."""

    def __init__(self, network: Network, heartbeat: Callable[[], None]) -> None:
        super().__init__()
        self.network, self.heartbeat = network, heartbeat
        self.training = isinstance(network, nn.Module) and network.training  # `extract` restores this mode at its end

    def forward(self, images: Tensor) -> Tensor:
        self.heartbeat()
        features: Tensor = self.network(images)
        return features


def live_knn(
    config: TrainConfig,
    method: Method,
    sources: Sources,
    device: torch.device,
    with_pixels: bool,
    heartbeat: Callable[[], None],
) -> dict[str, Accuracy]:
    """Return the kNN accuracy of the current encoder, "knn"; with `evaluate.raw_pixels` also that of "raw_pixels"."""
    evaluate, augment, bank, held_out = config.evaluate, config.augment, sources.bank, sources.held_out
    assert bank is not None
    assert held_out is not None
    assert bank.labels is not None
    assert held_out.labels is not None
    transform = EvalTransform(augment.size, augment.eval_resize, augment.mean, augment.std)
    settings = KnnSettings(evaluate.k, evaluate.temperature, evaluate.labels_per_class, evaluate.draws)
    networks: dict[str, Any] = {"knn": method.encoder if evaluate.features == "projection" else method.encoder.backbone}
    if with_pixels and evaluate.raw_pixels:
        networks = {"raw_pixels": pixels} | networks
    scores = {}
    for name, network in networks.items():
        wrapped = _WithHeartbeat(network, heartbeat)
        inputs = transform.unnormalized() if network is pixels else transform
        references, queries = (
            extract(wrapped, source, inputs, device, evaluate.batch_size, config.data.workers)
            for source in (bank, held_out)
        )
        with naming_field("evaluate.labels_per_class", evaluate.labels_per_class):
            given = references, bank.labels, queries, held_out.labels
            scores[name] = knn_accuracy(*given, settings, lambda *_: heartbeat())
    return scores
