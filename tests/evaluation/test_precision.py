"""With precision=bf16, the encoder of every evaluation computes in bfloat16; results record it."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from moco.builder import KeyQueue, MoCo
from moco.config import ConfigError, DataConfig, TrainConfig
from moco.config.convert import ConvertConfig, check_convert
from moco.config.data import SubjectDataConfig
from moco.config.embed import EmbedConfig
from moco.config.finetune import FinetuneConfig
from moco.config.knn import KnnConfig, check_knn
from moco.config.search import SearchConfig
from moco.config.transfer import TransferConfig
from moco.data.base import Sources
from moco.data.plan import Plan
from moco.data.sources import load_source
from moco.evaluation.features import EvalTransform, Inference, extract
from moco.evaluation.finetune import evaluate_finetune
from moco.evaluation.instance_retrieval import instance_retrieval
from moco.evaluation.knn import evaluate_knn
from moco.evaluation.linear import evaluate_linear
from moco.evaluation.transfer import evaluate_transfer
from moco.methods.moco_config import MoCoConfig
from moco.models.encoder import build_encoder
from moco.retrieval.embed import embed
from moco.retrieval.search import search
from moco.training.live_evaluation import LiveEvaluation, live_knn
from tests.data.images import folder
from tests.evaluation.test_features import in_memory
from tests.evaluation.test_linear import encoder_file, official, swept

CPU = torch.device("cpu")


@contextmanager
def formats() -> Iterator[set[torch.dtype]]:
    """Yield a set that receives the number formats of the outputs of all convolutions.

    Passes of a single image, or on the device "meta", are left out: they only determine the shape of the features.
    """
    seen: set[torch.dtype] = set()

    def hook(layer: nn.Module, _: Any, output: Any) -> None:
        if isinstance(layer, nn.Conv2d) and len(output) > 1 and not output.is_meta:
            seen.add(output.dtype)

    handle = register_module_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())


def test_features_are_float32_and_near_those_of_fp32(network: nn.Module) -> None:
    source, transform = in_memory(5), EvalTransform(6)
    found: dict[torch.dtype, Tensor] = {}
    for precision in (torch.float32, torch.bfloat16):
        with formats() as seen:
            found[precision] = extract(network, source, transform, Inference(CPU, 2, precision=precision))
        assert seen == {precision}
    exact, rounded = found.values()
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=2**-6, atol=2**-6)


def test_crops_are_compared_in_the_chosen_precision(network: nn.Module) -> None:
    with formats() as seen:
        inference = Inference(CPU, 2, precision=torch.bfloat16)
        found = instance_retrieval({"network": network}, in_memory(8), EvalTransform(6), inference)
    assert seen == {torch.bfloat16}
    assert found["network"].mean > 100 / 8


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_evaluation_while_training_has_a_precision_of_its_own(precision: str) -> None:
    config = TrainConfig(method=MoCoConfig(), precision="bf16")
    config.augment.size, config.augment.mean, config.augment.std = 16, [0.5] * 3, [0.5] * 3
    config.evaluate.precision, config.data.workers = precision, 0
    method = MoCo(build_encoder("convnet", {"width": 2}, 2, 0, 8, "grouped", 4), KeyQueue(16, 8))
    sources = load_source(DataConfig("digits"))
    beats: list[int] = []
    with formats() as seen:
        labeled = live_knn(config, method, sources, CPU, with_pixels=False, heartbeat=lambda: beats.append(1))
        plan = Plan(len(sources.train), 64, 1, 0)
        live = LiveEvaluation(config, method, Sources(sources.train), CPU, plan, [], lambda: None)
        unlabeled = live.evaluate(0)[0]
    assert seen == {torch.float32 if precision == "fp32" else torch.bfloat16}
    assert 10 < labeled["knn"].mean <= 100
    assert 0 < unlabeled["retrieval/retrieval"] <= 100
    assert beats


def knn(output: Path, precision: str) -> None:
    evaluate_knn(KnnConfig(checkpoint=str(encoder_file(output)), output=str(output), precision=precision))


def sweep(output: Path, precision: str, cache: str = "memory") -> None:
    config = swept(output, precision=precision)
    config.sweep.cache = cache
    evaluate_linear(config)


def cached_sweep(output: Path, precision: str) -> None:
    sweep(output, precision, "disk")


def official_probe(output: Path, precision: str) -> None:
    evaluate_linear(official(output, precision=precision))


def transfer(output: Path, precision: str) -> None:
    few: dict[str, Any] = {"mode": "few_shot", "ways": 3, "shots": 1, "queries": 2, "episodes": 4}
    given = {"sets": ["data"], "encoders": ["pretrained"], "precision": precision} | few
    evaluate_transfer(TransferConfig(checkpoint=str(encoder_file(output)), output=str(output), **given))


def end_to_end(output: Path, precision: str) -> None:
    given: dict[str, Any] = {"encoders": ["pretrained"], "epochs": 1, "labels_per_class": 1, "precision": precision}
    evaluate_finetune(FinetuneConfig(checkpoint=str(encoder_file(output)), output=str(output), **given))


@pytest.mark.parametrize("command", [knn, sweep, cached_sweep, official_probe, transfer, end_to_end])
def test_every_evaluation_computes_in_the_chosen_precision_and_records_it(
    command: Callable[[Path, str], None], tmp_path: Path
) -> None:
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with formats() as seen:
            command(tmp_path, precision)
        assert seen <= {dtype}  # empty if results are reused
        results = json.loads((tmp_path / "results.json").read_text())
        assert results[-1]["settings"]["precision"] == precision
        assert results[-1]["changed"].get("precision", "fp32") == precision
    assert {each["settings"]["precision"] for each in results} == {"fp32", "bf16"}


def test_an_index_remembers_its_precision(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", 6)
    given: dict[str, Any] = {"checkpoint": str(encoder_file(tmp_path)), "precision": "bf16"}
    given["data"] = SubjectDataConfig("folder", str(images), workers=0)
    index = tmp_path / "index"
    with formats() as seen:
        embed(EmbedConfig(output=str(index), **given))
    assert seen == {torch.bfloat16}
    with pytest.raises(ConfigError, match=r"features of precision=bf16 \(now fp32\)"):
        embed(EmbedConfig(output=str(index), **given | {"precision": "fp32"}))
    others = sorted(folder(tmp_path / "others", 2).iterdir())
    with formats() as seen:
        search(SearchConfig(index=str(index), query=list(map(str, others))))
    assert seen == {torch.bfloat16}
    assert np.load(index / "features.npy").dtype == np.float32


def test_where_it_cannot_be_used() -> None:
    with pytest.raises(ConfigError, match=r"device=mps does not support precision=bf16"):
        check_knn(KnnConfig(run="x", device="mps", precision="bf16"))
    with pytest.raises(ConfigError, match=r"precision=bf16 has no effect"):
        check_convert(ConvertConfig(checkpoint="x", to="onnx", output="x.onnx", precision="bf16"))
