"""Encoder files: every weight is loaded, or the error names the differences."""

import os
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moco.builder import KeyQueue, MoCo
from moco.config import TrainConfig
from moco.interop.encoder_file import ForeignFileError, build, read_encoder, save_encoder
from moco.interop.exported import save_exported
from moco.methods.moco_config import MoCoConfig
from moco.models.backbones import build_backbone
from moco.models.encoder import build_encoder, projection_head
from moco.runs import checkpoint
from moco.runs.checkpoint import CheckpointError

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def resnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    network = build_backbone("resnet18", {})
    for name, buffer in network.named_buffers():  # as after training: neither zeros nor ones
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn_like(buffer) / 20)
        elif name.endswith("running_var"):
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return network.eval()


def official(network: nn.Module, head: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"module.{prefix}.{name}": value for name, value in (network.state_dict() | head).items()}


def ours(folder: Path, seed: int = 0) -> tuple[Path, MoCo]:
    config = TrainConfig(method=MoCoConfig(), seed=seed)
    config.model.backbone, config.model.options, config.model.dim = "convnet", {"width": 2}, 8
    config.augment.size, config.augment.mean = 16, [0.1, 0.2, 0.3]
    torch.manual_seed(seed)
    method = MoCo(build_encoder("convnet", {"width": 2}, 2, 0, 8, "grouped", 4), KeyQueue(16, 8))
    for parameter in method.momentum_encoder.parameters():
        parameter.data.add_(0.1)
    state = {"config": asdict(config), "step": 7, "method": method.state_dict()}
    return checkpoint.save(folder, 7, state, keep_last=2), method.eval()


# ---- ours ----


@pytest.mark.parametrize("weights", ["encoder", "momentum_encoder"])
def test_a_checkpoint_of_this_project_has_encoder_and_head(tmp_path: Path, weights: str) -> None:
    path, method = ours(tmp_path)
    file = read_encoder(path, weights)
    assert (file.step, file.backbone, file.options) == (7, "convnet", {"width": 2})
    assert file.images == {"size": 16, "resize": 0, "mean": [0.1, 0.2, 0.3], "std": [0.229, 0.224, 0.225]}
    expected = getattr(method, weights)
    encoder = build(file)
    assert torch.equal(encoder(IMAGES), expected(IMAGES))
    assert torch.equal(encoder.backbone(IMAGES), expected.backbone(IMAGES))
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_a_seed_builds_the_initial_network_of_the_run(tmp_path: Path) -> None:
    path, _ = ours(tmp_path, seed=5)
    _, fresh = ours(tmp_path / "again", seed=5)
    untrained = build(read_encoder(path), seed=5)
    assert torch.equal(untrained(IMAGES), fresh.encoder(IMAGES))
    assert not torch.equal(build(read_encoder(path), seed=6)(IMAGES), fresh.encoder(IMAGES))


def test_encoder_safetensors_needs_no_other_settings(tmp_path: Path) -> None:
    path, method = ours(tmp_path)
    config = read_encoder(path).config
    save_encoder(tmp_path / "encoder.safetensors", method.encoder.get_submodule("backbone"), config, 7)
    file = read_encoder(tmp_path / "encoder.safetensors")
    assert (file.step, file.config, file.images) == (7, config, read_encoder(path).images)
    assert torch.equal(build(file).backbone(IMAGES), method.encoder.get_submodule("backbone")(IMAGES))
    assert isinstance(build(file).head, nn.Identity)


def test_an_altered_checkpoint_is_refused(tmp_path: Path) -> None:
    path, _ = ours(tmp_path)
    state = torch.load(path, weights_only=True)
    state["method"]["encoder.backbone.layers.0.weight"][0, 0, 0, 0] += 1e-3
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="was altered"):
        read_encoder(path)


# ---- official files ----

MLP = projection_head(512, 0, 16, 2).state_dict()
LINEAR = projection_head(512, 0, 16, 1).state_dict()
EXTRAS: dict[str, Any] = {"epoch": 200, "arch": "resnet18", "optimizer": {"state": {}, "param_groups": []}}


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("weights", ["encoder", "momentum_encoder"])
def test_moco_v1_and_v2_files(tmp_path: Path, version: str, weights: str) -> None:
    """The published layout: DDP's prefix, both encoders, queue and pointer, epoch and optimizer."""
    query, key = resnet(0), resnet(1)
    head = {f"fc.{name}": value for name, value in (MLP if version == "v2" else LINEAR).items()}
    if version == "v1":
        head = {name.replace("fc.0.", "fc."): value for name, value in head.items()}
    state = official(query, head, "encoder_q") | official(key, head, "encoder_k")
    state |= {"module.queue": torch.randn(16, 32), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    torch.save(EXTRAS | {"state_dict": state}, tmp_path / "moco.pth.tar")
    file = read_encoder(tmp_path / "moco.pth.tar", weights)
    assert (file.layout, file.backbone, file.trained) == ("official MoCo v1/v2", "resnet18", ", epoch 200")
    encoder = build(file)
    expected = (query if weights == "encoder" else key)(IMAGES)
    assert torch.equal(encoder.backbone(IMAGES), expected)
    reference = projection_head(512, 0, 16, 2 if version == "v2" else 1)
    reference.load_state_dict(MLP if version == "v2" else LINEAR)
    assert torch.equal(encoder(IMAGES), reference(expected))


def test_moco_v3_resnet_file(tmp_path: Path) -> None:
    base, momentum = resnet(0), resnet(1)
    head = {f"fc.{name}": value for name, value in projection_head(512, 64, 16, 2, norm=True).state_dict().items()}
    state = official(base, head, "base_encoder") | official(momentum, head, "momentum_encoder")
    state |= {"module.predictor.0.weight": torch.randn(64, 16)}
    torch.save(EXTRAS | {"state_dict": state}, tmp_path / "r18.pth.tar")
    assert torch.equal(build(read_encoder(tmp_path / "r18.pth.tar")).backbone(IMAGES), base(IMAGES))
    file = read_encoder(tmp_path / "r18.pth.tar", "momentum_encoder")
    assert file.layout == "official MoCo v3"
    assert torch.equal(build(file).backbone(IMAGES), momentum(IMAGES))


def test_a_plain_state_dict_needs_backbone(tmp_path: Path) -> None:
    network = resnet()
    classifier = {"fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}
    wrapped = {f"_orig_mod.module.{name}": value for name, value in (network.state_dict() | classifier).items()}
    torch.save(wrapped, tmp_path / "plain.pth")
    with pytest.raises(ForeignFileError, match="does not name its network: set backbone=NAME"):
        read_encoder(tmp_path / "plain.pth")
    file = read_encoder(tmp_path / "plain.pth", backbone="resnet18", options={})
    assert torch.equal(build(file).backbone(IMAGES), network(IMAGES))
    with pytest.raises(ForeignFileError, match="no momentum encoder"):
        read_encoder(tmp_path / "plain.pth", "momentum_encoder", "resnet18", {})


def test_plain_safetensors_without_metadata(tmp_path: Path) -> None:
    network = resnet()
    save_file(network.state_dict(), tmp_path / "plain.safetensors")
    with pytest.raises(ForeignFileError, match="does not name its network"):
        read_encoder(tmp_path / "plain.safetensors")
    file = read_encoder(tmp_path / "plain.safetensors", backbone="resnet18")
    assert torch.equal(build(file).backbone(IMAGES), network(IMAGES))


# ---- files that do not fit ----


def saved(folder: Path, state: dict[str, Tensor], arch: str) -> Path:
    torch.save({"arch": arch, "state_dict": state}, folder / "file.pth.tar")
    return folder / "file.pth.tar"


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    state = official(resnet(), {}, "encoder_q")
    del state["module.encoder_q.layer1.0.conv1.weight"]
    with pytest.raises(ForeignFileError, match=r"1 of 100 weights are missing \(layer1\.0\.conv1\.weight\)"):
        build(read_encoder(saved(tmp_path, state, "resnet18")))


def test_weights_of_a_larger_network_are_refused(tmp_path: Path) -> None:
    """A ResNet-101's file has every weight of a ResNet-50, with the same shapes."""
    state = official(build_backbone("resnet101", {}), {}, "encoder_q")
    with pytest.raises(ForeignFileError, match=r"255 weights in the file are unknown \(layer3\.10\.bn1\.bias"):
        build(read_encoder(saved(tmp_path, state, "resnet50")))


def test_another_shape_is_named(tmp_path: Path) -> None:
    state = official(build_backbone("resnet18", {"stem": "cifar"}), {}, "encoder_q")
    with pytest.raises(ForeignFileError, match=r"conv1\.weight is \(64, 3, 3, 3\), not \(64, 3, 7, 7\)"):
        build(read_encoder(saved(tmp_path, state, "resnet18")))


def test_weights_of_an_unrelated_network_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ForeignFileError,
        match=r"no weight of backbone=resnet18 in any known layout.*its names are state_dict\.module\.encoder_q\.a\.b",
    ):
        build(read_encoder(saved(tmp_path, {"module.encoder_q.a.b": torch.zeros(3)}, "resnet18")))


def test_a_seed_ignores_weights_that_do_not_fit(tmp_path: Path) -> None:
    file = read_encoder(saved(tmp_path, {"module.encoder_q.conv1.weight": torch.zeros(3)}, "resnet18"))
    assert build(file, seed=0).backbone(IMAGES).shape == (2, 512)


def test_a_plain_vit_small_of_unknown_heads_is_refused(tmp_path: Path) -> None:
    torch.save({"cls_token": torch.zeros(1, 1, 384)}, tmp_path / "deit_small.pth")
    with pytest.raises(ForeignFileError, match=r"how many heads its ViT has.*timm/vit_small_patch16_224"):
        read_encoder(tmp_path / "deit_small.pth", backbone="vit_small")
    save_file({"cls_token": torch.zeros(1, 1, 384)}, tmp_path / "deit_small.safetensors")
    with pytest.raises(ForeignFileError, match="how many heads its ViT has"):
        read_encoder(tmp_path / "deit_small.safetensors", backbone="vit_small")


def test_options_in_a_file_cannot_load_other_weights(tmp_path: Path) -> None:
    import timm

    weights = timm.create_model("resnet18", num_classes=0).state_dict()
    for options in ('{"pretrained": true}', '{"checkpoint_path": "nowhere.pth"}'):
        save_file(weights, tmp_path / "g.safetensors", {"backbone": "timm/resnet18", "options": options})
        assert build(read_encoder(tmp_path / "g.safetensors")).backbone(IMAGES).shape == (2, 512)


@pytest.mark.parametrize("kind", ["complex", "integer", "nan", "sparse"])
def test_invalid_weights_are_refused(tmp_path: Path, kind: str) -> None:
    state = official(resnet(), {}, "encoder_q")
    name = "module.encoder_q.conv1.weight"
    as_kind = {
        "complex": lambda x: x.to(torch.complex64),
        "integer": lambda x: x.long(),
        "nan": lambda x: x * float("nan"),
        "sparse": lambda x: x.to_sparse(),
    }
    state[name] = as_kind[kind](state[name])
    with pytest.raises(ForeignFileError, match=r"1 weights are not finite numbers .* \(conv1\.weight\)"):
        build(read_encoder(saved(tmp_path, state, "resnet18")))


@pytest.mark.parametrize(
    "about",
    [
        {"options": "[1, 2]"},
        {"options": "5"},
        {"options": "[" * 100000},
        {"step": "abc"},
        {"options": '{"width": 1e9}'},
    ],
)
def test_invalid_metadata_is_refused(tmp_path: Path, about: dict[str, str]) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", {"backbone": "convnet"} | about)
    with pytest.raises(ValueError, match=r"x\.safetensors|^options") as caught:
        build(read_encoder(tmp_path / "x.safetensors"))
    assert "\n" not in str(caught.value)


def test_invalid_names_and_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {1: torch.zeros(3), ("a", "b"): torch.zeros(3)}}, tmp_path / "numbers.pth")
    with pytest.raises(ForeignFileError, match="holds no weights"):
        read_encoder(tmp_path / "numbers.pth", backbone="resnet18")
    states: list[dict[str, Any]] = [{"config": 3, "method": 5}, {"config": {"model": {}}, "method": {}}]
    for step, state in enumerate(states):
        path = checkpoint.save(tmp_path, step, state, keep_last=9)
        with pytest.raises(ValueError, match=r"is not a (complete )?checkpoint of moco\.train"):
            read_encoder(path)


def test_an_official_file_with_another_stem_or_an_unknown_head(tmp_path: Path) -> None:
    cifar = build_backbone("resnet18", {"stem": "cifar"}).eval()
    path = saved(tmp_path, official(cifar, {}, "encoder_q"), "resnet18")
    assert torch.equal(build(read_encoder(path, options={"stem": "cifar"})).backbone(IMAGES), cifar(IMAGES))
    path = saved(tmp_path, official(cifar, {"fc.bias": torch.zeros(3)}, "encoder_q"), "resnet18")
    with pytest.raises(ForeignFileError, match=r"the projection head in .* is unknown"):
        build(read_encoder(path, options={"stem": "cifar"}))


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch EVIL",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pth", "bare.pkl"):
        with pytest.raises(ForeignFileError, match="is refused"):
            read_encoder(tmp_path / name)
    assert not (tmp_path / "EVIL").exists()


@pytest.mark.parametrize(("content", "words"), [(b"", "cannot be read"), (b"no weights at all", "is refused")])
def test_invalid_files_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises((ForeignFileError, CheckpointError), match=words):
        read_encoder(tmp_path / "x.pth")
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ForeignFileError, match="cannot be read as safetensors"):
        read_encoder(tmp_path / "x.safetensors")


def test_truncated_and_empty_files_are_refused(tmp_path: Path) -> None:
    path, _ = ours(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        read_encoder(path)
    torch.save({"epoch": 3}, tmp_path / "y.pth")
    with pytest.raises(ForeignFileError, match=r"holds no weights .keys: epoch"):
        read_encoder(tmp_path / "y.pth")
    with pytest.raises(FileNotFoundError, match=r"z\.pth does not exist"):
        read_encoder(tmp_path / "z.pth")


def test_an_exported_program_is_refused_with_a_fix(tmp_path: Path) -> None:
    network = build_backbone("convnet", {"width": 2}).eval()
    save_exported(tmp_path / "enc.pt2", network, {"size": 8, "mean": [0.5] * 3})
    torch.jit.script(network).save(tmp_path / "enc.pt")
    for path in (tmp_path / "enc.pt2", tmp_path / "enc.pt"):
        with pytest.raises(ForeignFileError, match=r"is refused: .* save only its state dict"):
            read_encoder(path)


def test_saving_leaves_no_temporary_file(tmp_path: Path) -> None:
    network = resnet()
    config = asdict(TrainConfig(method=MoCoConfig()))
    save_encoder(tmp_path / "e.safetensors", network, config, 0)
    assert [each.name for each in tmp_path.iterdir()] == ["e.safetensors"]
    assert load_file(tmp_path / "e.safetensors").keys() == network.state_dict().keys()
