"""Starting a run from a published encoder: it has the same features, and other networks are refused."""

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.builder import UNKNOWN, KeyQueue, MoCo
from moco.config import ConfigError, RunWarning, TrainConfig
from moco.interop.encoder_file import ForeignFileError, read_encoder, save_encoder
from moco.methods.moco_config import MoCoConfig
from moco.methods.moco_v3 import MoCoV3
from moco.models.backbones import build_backbone, with_channels
from moco.models.encoder import build_encoder, build_predictor, projection_head
from moco.models.first_layer import first_convolution
from moco.runs import checkpoint
from moco.training.init_from import load_initial_weights
from moco.training.trainer import pretrain
from tests.interop.networks import IMAGES, VIT, prefixed, saved, trained

TINY_VIT = "timm/vit_tiny_patch16_224"


def configured(path: Path, backbone: str = "resnet18", options: dict[str, Any] | None = None) -> TrainConfig:
    config = TrainConfig(method=MoCoConfig(), init_from=str(path))
    config.model.backbone, config.model.options, config.model.dim = backbone, options or {}, 8
    config.augment.size = 32
    return config


def method(config: TrainConfig, head_layers: int = 2) -> MoCo:
    torch.manual_seed(1)
    model = config.model
    return MoCo(
        build_encoder(model.backbone, model.options, head_layers, 0, model.dim, "grouped", 2), KeyQueue(16, model.dim)
    )


def official(path: Path, head: nn.Module) -> Path:
    """Write both networks in the format of MoCo v2; their heads differ."""
    state = prefixed("module.encoder_q.", trained(seed=0).state_dict() | prefixed("fc.", head.state_dict()))
    doubled = {name: 2 * value for name, value in head.state_dict().items()}
    state |= prefixed("module.encoder_k.", trained(seed=1).state_dict() | prefixed("fc.", doubled))
    return saved(path, {"arch": "resnet18", "state_dict": state})


def features(network: nn.Module, images: Tensor = IMAGES) -> Tensor:
    with torch.no_grad():
        out: Tensor = network.eval()(images)
    return out


@pytest.mark.parametrize("fits", [True, False])
def test_both_networks_of_an_official_file(tmp_path: Path, fits: bool) -> None:
    head = projection_head(512, 0, 8, 2)
    path = official(tmp_path / "moco.pth.tar", head)
    config = configured(path)
    new = method(config, 2 if fits else 1)
    before = copy.deepcopy(new)
    line = load_initial_weights(config, new)
    for network, seed in ((new.encoder, 0), (new.momentum_encoder, 1)):
        torch.testing.assert_close(features(network.get_submodule("backbone")), features(trained(seed=seed)))
    assert torch.equal(new.queue.keys, before.queue.keys)
    assert "momentum encoder from its own weights" in line
    weight = "head.0.weight"
    if fits:
        assert "backbone and head;" in line
        assert torch.equal(new.encoder.get_parameter(weight), head.state_dict()["0.weight"])
        assert torch.equal(new.momentum_encoder.get_parameter(weight), 2 * head.state_dict()["0.weight"])
    else:
        assert "the head does not fit and has random weights" in line
        assert torch.equal(new.encoder.get_parameter(weight), before.encoder.get_parameter(weight))
        assert torch.equal(new.momentum_encoder.get_parameter(weight), before.encoder.get_parameter(weight))


@pytest.mark.parametrize(
    ("keys", "layers", "line"),
    [
        (16, 2, "; queue from the file"),
        (24, 2, "; the queue in the file is not used (it is 24 x 8, not 16 x 8)"),
        (16, 1, "; the queue in the file is not used (the head does not fit)"),
        (0, 2, "momentum encoder from its own weights"),
    ],
)
def test_the_queue_of_an_official_file(tmp_path: Path, keys: int, layers: int, line: str) -> None:
    """Stored as (C, K) with a pointer to the oldest key; here the oldest key is replaced first."""
    path = official(tmp_path / "moco.pth.tar", projection_head(512, 0, 8, 2))
    queue = F.normalize(torch.randn(8, keys, generator=torch.Generator().manual_seed(0)), dim=0)
    if keys:
        file = torch.load(path)
        file["state_dict"] |= {"module.queue": queue, "module.queue_ptr": torch.tensor([5])}
        torch.save(file, path)
    config = configured(path)
    new = method(config, layers)
    before = new.queue.keys.clone()
    assert load_initial_weights(config, new).endswith(line)
    if "from the file" not in line:
        assert torch.equal(new.queue.keys, before)
        return
    torch.testing.assert_close(new.queue.keys, queue.T.roll(-5, 0))
    assert new.queue.filled() == 16
    assert new.queue.index.eq(UNKNOWN).all()
    new.queue.enqueue(torch.ones(1, 8), torch.tensor([3]))
    torch.testing.assert_close(new.queue.keys[1:], queue.T.roll(-5, 0)[1:])  # the oldest is gone


def test_the_queue_of_our_checkpoint_is_loaded_once_it_is_full(tmp_path: Path) -> None:
    config = configured(tmp_path / "x.pt")
    old = method(config)
    for step, enqueued in ((1, 10), (2, 16)):
        old.queue.enqueue(F.normalize(torch.randn(enqueued, 8)), torch.arange(enqueued))
        state = {"config": asdict(config), "method": old.state_dict(), "step": step}
        config.init_from = str(checkpoint.save(tmp_path, step, state, keep_last=9))
        new = method(config)
        assert ("queue from the file" in load_initial_weights(config, new)) == (step == 2)
    torch.testing.assert_close(new.queue.keys, old.queue.keys.roll(-10, 0))


@pytest.mark.parametrize(("hidden", "taken"), [(16, True), (24, False)])
def test_the_predictor_of_an_official_v3_file(tmp_path: Path, hidden: int, taken: bool) -> None:
    head, predictor = projection_head(512, 16, 8, 2, norm=True), build_predictor(8, hidden, 2, False, "batch", 0)
    state: dict[str, Tensor] = {}
    for name in ("base_encoder", "momentum_encoder"):
        state |= prefixed(f"module.{name}.", trained().state_dict() | prefixed("fc.", head.state_dict()))
    state |= prefixed("module.predictor.", predictor.state_dict())
    path = saved(tmp_path / "v3.pth.tar", {"arch": "resnet18", "state_dict": state})
    config = configured(path)
    encoder = build_encoder("resnet18", {}, 2, 16, 8, "sync", 0, head_norm=True)
    new = MoCoV3(encoder, build_predictor(8, 16, 2, False, "sync", 0))
    line = load_initial_weights(config, new)
    assert ("; predictor from the file" in line) == taken
    assert ("the predictor in the file is not used" in line) != taken
    assert torch.equal(new.predictor.state_dict()["0.weight"], predictor.state_dict()["0.weight"]) == taken
    line = load_initial_weights(config, method(config))
    assert "the predictor in the file is not used (the method has none)" in line


def test_the_checkpoint_of_the_official_notebook(tmp_path: Path) -> None:
    """`encoder_q.net.N.*`: the children of a CIFAR ResNet-18 without max-pooling, and the linear layer as number 9."""
    state: dict[str, Tensor] = {}
    numbers = {"conv1": 0, "bn1": 1, "layer1": 3, "layer2": 4, "layer3": 5, "layer4": 6}
    networks, head = [trained(options={"stem": "cifar"}, seed=each) for each in (0, 1)], nn.Linear(512, 8)
    for encoder, network in zip(("encoder_q", "encoder_k"), networks, strict=True):
        for name, value in network.state_dict().items():
            layer, rest = name.split(".", 1)
            state[f"{encoder}.net.{numbers[layer]}.{rest}"] = value
        state |= prefixed(f"{encoder}.net.9.", head.state_dict())
    state |= {"queue": F.normalize(torch.randn(8, 16), dim=0), "queue_ptr": torch.zeros(1, dtype=torch.long)}
    path = saved(tmp_path / "model_last.pth", {"epoch": 200, "state_dict": state, "optimizer": {}})
    config = configured(path, options={"stem": "cifar"})
    new = method(config, head_layers=1)
    line = load_initial_weights(config, new)
    assert "official MoCo CIFAR-10 notebook: resnet18): backbone and head" in line
    assert line.endswith("queue from the file")
    for mine, theirs in zip((new.encoder, new.momentum_encoder), networks, strict=True):
        torch.testing.assert_close(features(mine.get_submodule("backbone")), features(theirs))
        assert torch.equal(mine.get_parameter("head.0.weight"), head.weight)
    file = read_encoder(path, backbone="resnet18")
    assert file.options == {"stem": "cifar"}
    with pytest.raises(ForeignFileError, match="does not name its network"):
        read_encoder(path)


def test_weights_of_timm_warn_if_the_run_normalizes_images_in_another_way(tmp_path: Path) -> None:
    network = build_backbone("timm/test_vit", {"img_size": 32})
    config = configured(saved(tmp_path / "vit.pth", network.state_dict()), options={"img_size": 32})
    config.model.backbone, config.augment.size = "timm/test_vit", 32
    with pytest.warns(RunWarning, match=r"vit\.pth were trained .* set augment\.mean=\[0\.5,0\.5,0\.5\]"):
        load_initial_weights(config, method(config))


@pytest.mark.filterwarnings("error::moco.config.RunWarning")
@pytest.mark.parametrize("channels", [1, 4, 13])
@pytest.mark.parametrize("backbone", ["resnet18", "convnet", TINY_VIT])
def test_another_number_of_channels_keeps_the_sum_of_the_first_layer(
    tmp_path: Path, backbone: str, channels: int
) -> None:
    options = VIT if backbone == TINY_VIT else {}
    path = saved(tmp_path / "rgb.pth", trained(backbone, options).state_dict())
    config = configured(path, backbone, options)
    config.data.channels = channels
    config.augment.mean = config.augment.std = [0.1] * channels
    new = MoCo(build_encoder(backbone, with_channels(options, channels), 2, 0, 8, "grouped", 2), KeyQueue(16, 8))
    line = load_initial_weights(config, new)
    assert f"first layer adapted from 3 to {channels} channels (equal weights, with the same sum" in line
    gray = IMAGES[:, :1]
    for network in (new.encoder, new.momentum_encoder):
        mine, rgb = network.get_submodule("backbone"), trained(backbone, options)
        (name, first), (_, old) = (layer for each in (mine, rgb) if (layer := first_convolution(each)))
        expected = old.weight.double().sum(dim=1)
        assert first.weight.shape[1] == channels
        # one rounding to float32 per channel, of at most half a unit in the last place of the sum's share
        assert ((first.weight.double().sum(dim=1) - expected).abs() <= expected.abs() * 2**-24 * 1.01).all()
        share = (expected / channels).float()
        assert all(torch.equal(first.weight[:, channel], share) for channel in range(channels))
        for module in (first, old):
            module.double()
        with torch.no_grad():
            response = first(gray.double().expand(-1, channels, -1, -1))
            torch.testing.assert_close(response, old(gray.double().expand(-1, 3, -1, -1)), rtol=1e-6, atol=1e-7)
        for module in (first, old):
            module.float()
        others = {key: value for key, value in mine.state_dict().items() if key != f"{name}.weight"}
        assert all(torch.equal(value, rgb.state_dict()[key]) for key, value in others.items())
        several = gray.expand(-1, channels, -1, -1)
        torch.testing.assert_close(
            features(mine, several), features(rgb, gray.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5
        )


def test_parts_that_are_not_read_are_named(tmp_path: Path) -> None:
    state = prefixed("backbone.", trained().state_dict()) | {"projector.0.weight": torch.ones(2, 2)}
    state |= {"classifier.weight": torch.ones(2, 2), "backbone.fc.weight": torch.ones(2, 2)}
    config = configured(saved(tmp_path / "solo.ckpt", {"state_dict": state}))
    assert load_initial_weights(config, method(config)).endswith("; not used: classifier, fc, projector")


def test_a_file_with_one_network_initializes_both_encoders(tmp_path: Path) -> None:
    """The file does not describe its network; the configuration does, also by timm's name of the same network."""
    path = saved(tmp_path / "x.pth", trained().state_dict())
    for backbone in ("resnet18", "timm/resnet18"):
        config = configured(path, backbone)
        new = method(config)
        line = load_initial_weights(config, new)
        for network in (new.encoder, new.momentum_encoder):
            torch.testing.assert_close(features(network.get_submodule("backbone")), features(trained()))
        assert "the head is not in the file and has random weights; momentum encoder from the same weights" in line


def test_a_method_without_a_momentum_encoder(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self, encoder: nn.Module) -> None:
            super().__init__()
            self.encoder = encoder

    config = configured(saved(tmp_path / "x.pth", trained().state_dict()))
    new = Plain(method(config).encoder)
    assert "momentum" not in load_initial_weights(config, new)
    torch.testing.assert_close(features(new.encoder.get_submodule("backbone")), features(trained()))


def test_another_network_is_refused_with_what_differs(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", {"arch": "resnet18", "state_dict": trained().state_dict()})
    config = configured(path, "resnet34")
    with pytest.raises(
        ForeignFileError, match=r"resnet18\) does not fit model\.backbone=resnet34: .*weights are missing"
    ):
        load_initial_weights(config, method(config))
    config = configured(tmp_path / "step_30.pt")
    (tmp_path / "step_00000030.keep.pt").touch()
    with pytest.raises(
        ConfigError, match=r"init_from=.*/step_30\.pt does not exist; .* contains step_00000030\.keep\.pt$"
    ):
        load_initial_weights(config, method(config))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000001.pt").touch()
    config.init_from = str(tmp_path / "checkpoints")
    with pytest.raises(
        ConfigError, match=r"is a folder: name a file, such as init_from=.*/checkpoints/step_00000001\.pt$"
    ):
        load_initial_weights(config, method(config))


def test_another_number_of_attention_heads_is_refused(tmp_path: Path) -> None:
    config = configured(tmp_path / "vit.safetensors", TINY_VIT, VIT)
    about = {
        "model": {"backbone": TINY_VIT, "options": VIT},
        "augment": {"size": 32, "eval_resize": 0, "mean": [0.5] * 3, "std": [0.25] * 3},
    }
    save_encoder(tmp_path / "vit.safetensors", trained(TINY_VIT, VIT), about, 1)
    load_initial_weights(config, method(config))
    config.model.options = VIT | {"num_heads": 6}
    with pytest.raises(ConfigError, match=r"model\.backbone=.*'num_heads': 6"):
        load_initial_weights(config, method(config))


# A run keeps its lock open until the process ends.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_starts_from_the_file_and_a_resumed_run_does_not_read_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = trained("convnet", {"width": 2})
    path = saved(tmp_path / "x.pth", network.state_dict())
    config = configured(path, "convnet", {"width": 2})
    config.run, config.epochs, config.batch_size, config.threads = str(tmp_path / "run"), 1, 256, 1
    config.augment.size, config.method, config.model.dim = 16, MoCoConfig(queue_size=300), 8
    config.optim.lr = 0.0  # the weights stay as loaded
    config.evaluate.draws, config.evaluate.raw_pixels = 2, False
    pretrain(config)
    output = capsys.readouterr().out
    assert f"starting from {path} (plain state dict: convnet): backbone" in " ".join(output.split())
    assert "untrained" not in output
    assert "initialized" in output
    state = checkpoint.load(checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[0])
    assert state["step"] == 5
    for name, parameter in network.named_parameters():
        assert torch.equal(state["method"][f"encoder.backbone.{name}"], parameter)
        assert torch.allclose(state["method"][f"momentum_encoder.backbone.{name}"], parameter, rtol=0, atol=1e-6)
    path.unlink()
    pretrain(config)
    assert "already finished" in capsys.readouterr().out
    assert read_encoder(tmp_path / "run" / "encoder.safetensors").step == 5
    config.init_from = ""
    with pytest.raises(ConfigError, match="init_from"):
        pretrain(config)
