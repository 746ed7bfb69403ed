"""Live evaluation while training: kNN on the held-out split, by the code that `moco.evaluation` holds."""

from typing import Any

import torch

from moco.config import EvaluateConfig, TrainConfig
from moco.data.sources import Sources
from moco.engine.step import Method
from moco.evaluation.features import extract, pixels
from moco.evaluation.knn import Accuracy, knn_accuracy


def live_knn(
    config: TrainConfig, method: Method, sources: Sources, device: torch.device, with_pixels: bool
) -> dict[str, Accuracy]:
    """kNN accuracy of the encoder as it is, {} without labels; with the raw pixels' where the config asks."""
    if sources.bank is None or sources.held_out is None:
        return {}
    setting, look = config.evaluate, config.augment
    networks: dict[str, Any] = {"knn": method.encoder if setting.features == "projection" else method.encoder.backbone}
    if with_pixels and setting.raw_pixels:
        networks = {"raw_pixels": pixels} | networks
    scores = {}
    for name, network in networks.items():
        bank, queries = (
            extract(
                network,
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
        )
    return scores


def knn_title(setting: EvaluateConfig) -> str:
    """What the live accuracy is, in words."""
    if setting.labels_per_class:
        labels = f"{setting.labels_per_class} label{'s' * (setting.labels_per_class > 1)} a class"
        return f"held-out kNN, {labels}, {setting.draws} draws"
    return f"held-out kNN (k {setting.k})"
