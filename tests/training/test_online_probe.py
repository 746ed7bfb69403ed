"""The online linear probe: updates against a loop, no gradient to the encoder, two processes, exact resume, reports."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.builder import KeyQueue, MoCo
from moco.config import ConfigError, TrainConfig
from moco.data.base import Sources
from moco.data.loader import Batch
from moco.data.plan import Plan
from moco.data.sources import ArraySource
from moco.digest import digest
from moco.distributed import broadcast_module, rank, world_size, wrap_ddp
from moco.methods.moco_config import MoCoConfig
from moco.methods.simclr import SimCLR
from moco.models.encoder import build_encoder
from moco.runs import checkpoint
from moco.training.checks import check_against_data
from moco.training.online_probe import EPSILON, LEARNING_RATE, OnlineProbe
from moco.training.step import StepSettings, train_step
from moco.training.trainer import pretrain
from tests.distributed.launch import run_ranks

CPU, SAMPLES, CLASSES, BATCH = torch.device("cpu"), 40, 3, 16
LABELS = np.where(np.arange(SAMPLES) % 5 == 4, -1, np.arange(SAMPLES) % CLASSES)  # a fifth is unlabeled


def made(kind: str) -> Any:
    torch.manual_seed(0)
    encoder = build_encoder("convnet", {"width": 2}, 2, 8, 4, "grouped", 4)
    return SimCLR(encoder) if kind == "simclr" else MoCo(encoder, KeyQueue(32, 4), symmetric=kind == "symmetric")


def train(kind: str, steps: int, accumulate: int = 1, probed: bool = True) -> dict[str, Any]:
    """Return the probe and what it reported, with the features that it saw, and the method's final state."""
    method = made(kind)
    broadcast_module(method)
    probe = OnlineProbe(method.encoder.backbone, LABELS, CLASSES, CPU) if probed else None
    forward = wrap_ddp(method, CPU)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    share = BATCH // world_size()
    mine = slice(rank() * share, (rank() + 1) * share)
    found, seen, states = [], [], []
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        views = [torch.randn(BATCH, 3, 8, 8, generator=generator)[mine] for _ in range(2)]
        index = torch.randperm(SAMPLES, generator=generator)[:BATCH][mine]
        settings = StepSettings(0.05, 0.9, accumulate)
        train_step(method, forward, optimizer, scaler, Batch(index, views), None, settings)
        if probe is not None:
            seen.append([each.clone() for each in probe._seen])
            found.append(probe.step(index, accumulate))
            states.append({name: value.clone() for name, value in probe.classifier.state_dict().items()})
    return {"found": found, "seen": seen, "states": states, "method": method.state_dict()}


def batch_of(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    for _ in range(2):
        torch.randn(BATCH, 3, 8, 8, generator=generator)
    return torch.randperm(SAMPLES, generator=generator)[:BATCH]


@pytest.mark.parametrize(("kind", "views"), [("plain", 1), ("symmetric", 2), ("simclr", 2)])
def test_the_updates_are_those_of_a_linear_classifier(kind: str, views: int) -> None:
    run = train(kind, steps=3)
    reference = nn.Linear(16, CLASSES)
    nn.init.zeros_(reference.weight)
    nn.init.zeros_(reference.bias)
    optimizer = torch.optim.Adam(reference.parameters(), LEARNING_RATE / 4)  # 16 features
    for number in range(3):
        features = torch.cat(run["seen"][number])
        assert len(features) == views * BATCH
        labels = [int(LABELS[i]) for i in batch_of(number)] * views
        losses, correct = [], []
        for x, label in zip(features, labels, strict=True):
            if label >= 0:
                logits = reference((x - features.mean(dim=0)) / (features.var(dim=0, correction=0) + EPSILON).sqrt())
                losses.append(F.cross_entropy(logits[None], torch.tensor([label])))
                correct.append(int(logits.argmax()) == label)
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert run["found"][number]["probe_loss"].item() == pytest.approx(loss.item(), rel=1e-5)
        assert run["found"][number]["probe_accuracy"].item() == pytest.approx(sum(correct) / len(correct))
        torch.testing.assert_close(run["states"][number]["weight"], reference.weight.detach(), rtol=1e-4, atol=1e-5)


def test_evaluation_uses_running_averages() -> None:
    method = made("plain")
    probe = OnlineProbe(method.encoder.backbone, LABELS, CLASSES, CPU)
    generator, features = torch.Generator().manual_seed(0), []
    for number in range(12):
        features.append(torch.randn(BATCH, 16, generator=generator) * 3 + 5)
        probe._seen = [features[-1]]
        probe.step(batch_of(number), 1)
    mean, var = torch.zeros(16), torch.zeros(16)
    for number, x in enumerate(features):
        weight = max(0.1, 1 / (number + 1))
        mean = (1 - weight) * mean + weight * x.mean(dim=0)
        var = (1 - weight) * var + weight * x.var(dim=0, correction=0)
    x = torch.cat(features)
    found = probe.classifier((x - mean) / (var + EPSILON).sqrt()).argmax(dim=1)
    labels = torch.arange(len(x)) % CLASSES
    expected = 100 * (found == labels).float().mean().item()
    assert probe.accuracy(x, labels.numpy()) == pytest.approx(expected, abs=0.6)  # one of 192 may round differently


def test_micro_batches_belong_to_their_images() -> None:
    one, two = train("symmetric", steps=2), train("symmetric", steps=2, accumulate=2)
    assert len(two["seen"][0]) == 2 * len(one["seen"][0])
    for a, b in zip(one["states"], two["states"], strict=True):
        torch.testing.assert_close(a["weight"], b["weight"], rtol=1e-3, atol=1e-4)


def test_the_encoder_is_trained_as_without_it() -> None:
    assert digest(train("plain", 3)["method"]) == digest(train("plain", 3, probed=False)["method"])


@cache
def on(world: int) -> list[dict[str, Any]]:
    return run_ranks(world, train, "symmetric", 3)


def test_two_processes_equal_one() -> None:
    (alone,) = on(1)
    for each in on(2):
        for name in ("found", "states"):
            for one, other in zip(alone[name], each[name], strict=True):
                for key in one:
                    torch.testing.assert_close(one[key], other[key], rtol=1e-3, atol=1e-4)


def test_evaluation_and_passes_without_gradient_are_not_kept() -> None:
    method = made("plain")
    probe = OnlineProbe(method.encoder.backbone, LABELS, CLASSES, CPU)
    images = torch.randn(BATCH, 3, 8, 8)
    with torch.no_grad():
        method.encoder(images)
    method.eval()
    method.encoder(images)
    assert probe._seen == []
    method.train()
    method.encoder(images)
    assert len(probe._seen) == 1
    probe.discard()
    assert probe._seen == []


def test_it_works_in_a_compiled_encoder() -> None:
    method = made("plain")
    probe = OnlineProbe(method.encoder.backbone, LABELS, CLASSES, CPU)
    method.encoder.compile(backend="eager")
    method.encoder(torch.randn(BATCH, 3, 8, 8))
    assert [tuple(each.shape) for each in probe._seen] == [(BATCH, 16)]


# ---- in a run ----


def config(run: Path) -> TrainConfig:
    made = TrainConfig(
        method=MoCoConfig(queue_size=256, momentum=0.9), run=str(run), epochs=2, batch_size=128, device="cpu", threads=1
    )
    made.augment.size, made.augment.crop_scale, made.log_every, made.analyse_every = 16, [0.5, 1.0], 5, 0
    made.model.backbone, made.model.options, made.model.dim = "convnet", {"width": 2}, 8
    made.evaluate.online_probe, made.evaluate.k, made.checkpoint.keep_last = True, 20, 9
    return made


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a run keeps its lock open
def test_a_run_reports_it_and_resumes_bit_for_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, cut = tmp_path / "full", tmp_path / "cut"
    pretrain(config(full))
    out = capsys.readouterr().out
    assert "online linear probe" in out
    assert "trained online" in out
    shutil.copytree(full, cut)
    for file in checkpoint.list_checkpoints(cut / "checkpoints")[:-1]:
        file.unlink()
    pretrain(config(cut))
    one, other = (checkpoint.load(checkpoint.list_checkpoints(run / "checkpoints")[0]) for run in (full, cut))
    assert one["step"] == other["step"] == 20
    assert digest(one["probe"]) == digest(other["probe"])
    assert one["history"] == other["history"]
    assert [("probe" in each) for each in one["history"]] == [False, True, True]
    records = [json.loads(line) for line in (full / "metrics.jsonl").read_text().splitlines()]
    names = {name for record in records for name in record}
    assert {"accuracy/probe", "train/probe_loss", "train/probe_accuracy"} <= names
    losses = [each["train/probe_loss"] for each in records if "train/probe_loss" in each]
    assert losses[0] == pytest.approx(np.log(10), rel=1e-3)  # all classes equally likely
    assert losses[-1] < 0.9 * losses[0]
    off = config(tmp_path / "off")
    off.evaluate.online_probe = False
    pretrain(off)
    without = checkpoint.load(checkpoint.list_checkpoints(tmp_path / "off" / "checkpoints")[0])
    assert "probe" not in without
    assert digest(without["method"]) == digest(one["method"])


def test_images_without_labels_are_refused() -> None:
    made = config(Path("x"))
    images = torch.zeros(256, 3, 16, 16, dtype=torch.uint8)
    for labels in (None, np.full(256, -1)):
        source = ArraySource(images, [str(i) for i in range(256)], labels, ("a",) if labels is not None else ())
        with pytest.raises(ConfigError, match=r"evaluate\.online_probe=true, but .* have no labels"):
            check_against_data(made, Plan(256, 128, 1, 0), Sources(source))
