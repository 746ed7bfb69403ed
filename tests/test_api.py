"""The Python interface: what `load_encoder` returns, and that `import moco` imports little."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import moco
from moco.config import ConfigError, RunWarning
from moco.config.embed import EmbedConfig
from moco.interop.encoder_file import build, read_encoder, save_encoder
from moco.models.backbones import build_backbone
from moco.retrieval.embed import embed
from moco.training.trainer import pretrain
from tests.evaluation.runs import trained, write_images
from tests.training.test_bad_images import config


def embedded(images: Path, output: Path, **source: str) -> np.ndarray:
    config = EmbedConfig(output=str(output), normalize=False, **source)  # type: ignore[arg-type]
    config.data.name, config.data.root, config.data.labels, config.data.workers = "folder", str(images), "none", 0
    config.dtype, config.threads = "float32", 1
    embed(config)
    features: np.ndarray = np.load(output / "features.npy")
    return features


@pytest.mark.parametrize("kind", ["run", "checkpoint", "encoder.safetensors"])
def test_features_are_those_of_moco_embed(tmp_path: Path, kind: str) -> None:
    images = write_images(tmp_path / "images", {"a": 2, "b": 1})
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 23, 3), np.uint8)).save(images / "a" / "tall.png")
    color = Image.fromarray(np.random.default_rng(3).integers(0, 255, (20, 20, 4), np.uint8), "RGBA")
    for mode in ("RGBA", "LA", "P"):
        color.convert("RGB" if mode == "P" else mode).convert(mode).save(images / "a" / f"{mode}.png")
    Image.fromarray(np.random.default_rng(2).integers(0, 255, (9, 30), np.uint8)).save(images / "b" / "gray.png")
    run = trained(tmp_path / "run")
    source = run if kind == "run" else next((run / "checkpoints").glob("*.pt"))
    if kind == "encoder.safetensors":
        source = tmp_path / kind
        file = read_encoder(next((run / "checkpoints").glob("*.pt")))
        save_encoder(source, build(file).backbone, file.config, file.step)
    expected = embedded(images, tmp_path / "features", **{"run" if kind == "run" else "checkpoint": str(source)})

    encoder = moco.load_encoder(source)

    files = sorted(images.rglob("*.png"))
    prepared = torch.stack([encoder.transform(Image.open(file)) for file in files])
    features = encoder(prepared).numpy()
    assert features.shape == (8, encoder.num_features)
    np.testing.assert_allclose(features, expected, rtol=1e-6, atol=1e-6)
    assert encoder.info["backbone"] == "convnet"
    assert encoder.info["images"]["size"] == 16
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_a_file_of_another_project_takes_the_named_network_and_size(tmp_path: Path) -> None:
    network = build_backbone("resnet18", {})
    torch.save(network.state_dict(), tmp_path / "resnet18.pt")
    encoder = moco.load_encoder(tmp_path / "resnet18.pt", backbone="resnet18", size=64, resize=72)
    image = torch.randint(0, 256, (3, 80, 100), dtype=torch.uint8)
    prepared = encoder.transform(image)[None]
    assert prepared.shape == (1, 3, 64, 64)
    torch.testing.assert_close(encoder(prepared), network.eval()(prepared), rtol=0, atol=0)
    assert torch.equal(encoder.transform(image.permute(1, 2, 0).numpy()), prepared[0])
    assert encoder.transform(Image.new("CMYK", (90, 90))).shape == (3, 64, 64)
    with pytest.raises(ValueError, match=r"shape \(4, 80, 100\) .* of 3 channels"):
        encoder.transform(torch.zeros(4, 80, 100, dtype=torch.uint8))


def test_the_bits_of_a_run_apply_to_its_images_and_to_others(tmp_path: Path) -> None:
    rng, images, others = np.random.default_rng(0), tmp_path / "images", tmp_path / "others"
    for folder, top, count in ((images, 4096, 16), (others, 512, 2)):
        folder.mkdir()
        for i in range(count):
            Image.fromarray(rng.integers(0, top, (20, 20), np.uint16)).save(folder / f"{i:02}.png")
    made = config(images, tmp_path / "run")
    made.data.labels, made.epochs, made.evaluate.every_epochs, made.data.on_bad_image = "none", 1, 0, "raise"
    with pytest.warns(RunWarning, match=r"data\.bits=12"):
        pretrain(made)
    state = torch.load(next((tmp_path / "run" / "checkpoints").glob("*.pt")), weights_only=True)
    assert (state["bits"], state["config"]["data"]["bits"]) == (12, None)
    for folder in (images, others):  # the highest value of the others fits into 10 bits
        expected = embedded(folder, tmp_path / f"features_{folder.name}", run=str(tmp_path / "run"))
        for source in (tmp_path / "run", tmp_path / "run" / "encoder.safetensors"):
            encoder = moco.load_encoder(source)
            assert encoder.info["config"]["data"]["bits"] == 12
            prepared = torch.stack([encoder.transform(Image.open(file)) for file in sorted(folder.iterdir())])
            np.testing.assert_allclose(encoder(prepared).numpy(), expected, rtol=1e-5, atol=1e-5)
    darker = moco.load_encoder(tmp_path / "run", bits=16).transform(images / "00.png")
    assert darker.mean() < encoder.transform(images / "00.png").mean()
    with pytest.raises(ConfigError, match="bits=4 must be within 8"):
        moco.load_encoder(tmp_path / "run", bits=4)


def test_errors_name_the_argument(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        moco.load_encoder(tmp_path / "nowhere")
    run = trained(tmp_path / "run")
    with pytest.raises(ValueError, match=r"run.*: remove backbone=resnet18"):
        moco.load_encoder(run, backbone="resnet18")
    with pytest.raises(AttributeError, match="load_encoder"):
        moco.load_model  # noqa: B018  # the access is the test


def test_importing_moco_does_not_import_torch() -> None:
    code = "import sys, moco; dir(moco); assert 'torch' not in sys.modules; moco.losses; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_exists() -> None:
    assert all(getattr(moco, name) is not None for name in moco.__all__)
    assert moco.losses.info_nce is moco.losses.queue.info_nce


def test_pretrain_does_what_the_command_does(tmp_path: Path) -> None:
    overrides = [
        "epochs=1",
        "optim.warmup_epochs=0",
        "batch_size=256",
        "model.options.width=4",
        "evaluate.every_epochs=0",
        "threads=1",
    ]
    arguments = list(sys.argv)
    run = moco.pretrain([*overrides, f"run={tmp_path / 'run'}"])
    assert sys.argv == arguments
    assert moco.load_encoder(run).info["step"] == 1437 // 256
    config = moco.train_config([*overrides, f"run={tmp_path / 'twin'}"])
    config.seed = 1
    twin = moco.load_encoder(moco.pretrain(config))
    assert twin.info["config"]["seed"] == 1


def test_pretrain_refuses_what_is_not_one_run(tmp_path: Path) -> None:
    for overrides, named in [(["epoch=1"], "epoch"), ("epochs=1", r"\['epochs=1'\]"), (["--cfg", "job"], "--cfg")]:
        with pytest.raises(ConfigError, match=named):
            moco.pretrain(overrides)
