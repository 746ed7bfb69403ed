"""Live evaluation while training: kNN on the held-out split, by the code that `moco.evaluation` holds."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moco.analysis.doctor import Doctor
from moco.builder import Method
from moco.config import TrainConfig
from moco.data.plan import Plan
from moco.data.sources import Sources
from moco.evaluation.features import Network, extract, pixels
from moco.evaluation.knn_classifier import Accuracy, knn_accuracy, knn_title
from moco.runs.metrics import MetricsLogger


class _Signing(nn.Module):
    """A network that gives a sign of life with each batch. Around it, for a hook would have it compiled anew."""

    def __init__(self, network: Network, heartbeat: Callable[[], None]) -> None:
        super().__init__()
        self.network, self.heartbeat = network, heartbeat
        self.training = isinstance(network, nn.Module) and network.training  # the mode that is put back at the end

    def forward(self, images: Tensor) -> Tensor:
        self.heartbeat()
        features: Tensor = self.network(images)
        return features


class LiveKnn:
    """The accuracy now and then, and what becomes of it: a line, a record, a place in the history.

    Args:
        config: the run's.
        method: what is trained.
        sources: with the reference and the held-out pictures; without them nothing is due.
        device: where.
        plan: the length of training.
        history: the evaluations so far, which a checkpoint holds; gets the new ones.
        metrics_log, doctor: of rank 0; get the accuracies.
        say: gets a line.
        alive: called with each part of the work.
    """

    def __init__(
        self,
        config: TrainConfig,
        method: Method,
        sources: Sources,
        device: torch.device,
        plan: Plan,
        history: list[dict[str, Any]],
        metrics_log: MetricsLogger | None,
        doctor: Doctor | None,
        log: Callable[[str], None],
        heartbeat: Callable[[], None],
    ) -> None:
        self._config, self._method, self._sources, self._device = config, method, sources, device
        self._plan, self._history, self._metrics_log, self._doctor = plan, history, metrics_log, doctor
        self._log, self._alive = log, heartbeat
        self._first = "initialized" if config.init_from else "untrained"  # what the run starts with

    def due(self, done: int) -> bool:
        """Whether the accuracy behind so many steps is wanted, and not known yet."""
        every = self._config.evaluate.every_epochs
        if not every or self._sources.bank is None or self._sources.held_out is None:
            return False
        epoch, rest = divmod(done, self._plan.steps_per_epoch)
        wanted = done == self._plan.total_steps or (rest == 0 and epoch % every == 0)
        return wanted and all(each["step"] != done for each in self._history)

    def evaluate(self, done: int) -> None:
        """Measures it behind so many steps. Collective; BN's running statistics are averaged over ranks by then."""
        scores = live_knn(
            self._config, self._method, self._sources, self._device, with_pixels=done == 0, heartbeat=self._alive
        )
        epoch, first = done / self._plan.steps_per_epoch, self._first
        self._history.append({"step": done, "epoch": epoch} | {name: list(score) for name, score in scores.items()})
        if self._metrics_log:
            # The baselines again each time: flat lines in the picture to hold the curve against.
            baselines = {first: self._history[0]["knn"], "raw_pixels": self._history[0].get("raw_pixels")}
            curves = {"knn": list(scores["knn"])} | {name: score for name, score in baselines.items() if score}
            accuracies = {f"accuracy/{name}": score[0] for name, score in curves.items()}
            self._metrics_log.log(done, accuracies)
            if self._doctor:
                self._doctor.record(accuracies)
        names = {"knn": first if done == 0 else f"epoch {epoch:g}", "raw_pixels": "raw pixels"}
        said = ", ".join(f"{names[name]} {score}" for name, score in scores.items())
        self._log(f"{knn_title(self._config.evaluate)}: {said}")


def live_knn(
    config: TrainConfig,
    method: Method,
    sources: Sources,
    device: torch.device,
    with_pixels: bool,
    heartbeat: Callable[[], None],
) -> dict[str, Accuracy]:
    """kNN accuracy of the encoder as it is; with the raw pixels' where the config asks."""
    assert sources.bank is not None
    assert sources.held_out is not None
    setting, look = config.evaluate, config.augment
    networks: dict[str, Any] = {"knn": method.encoder if setting.features == "projection" else method.encoder.backbone}
    if with_pixels and setting.raw_pixels:
        networks = {"raw_pixels": pixels} | networks
    scores = {}
    for name, network in networks.items():
        bank, queries = (
            extract(
                _Signing(network, heartbeat),
                source,
                look.size,
                look.eval_resize,
                look.mean if network is not pixels else (0.0,) * 3,
                look.std if network is not pixels else (1.0,) * 3,
                device,
                setting.batch_size,
                config.data.workers,
            )
            for source in (sources.bank, sources.held_out)
        )
        assert sources.bank.labels is not None
        assert sources.held_out.labels is not None
        scores[name] = knn_accuracy(
            bank,
            sources.bank.labels,
            queries,
            sources.held_out.labels,
            setting.k,
            setting.temperature,
            setting.labels_per_class,
            setting.draws,
            lambda *_: heartbeat(),
        )
    return scores
