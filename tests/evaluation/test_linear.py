"""The linear probe from a configuration to its files: results, a choice without the held-out split, refusals."""

import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import moco.evaluation.linear as linear_module
import moco.evaluation.task as task_module
from moco.composition import compose
from moco.config import ConfigError, DataConfig, RunWarning, config_dir
from moco.config.linear import LinearConfig, check_linear
from moco.data.sources import load_source
from moco.distributed import on_rank_zero
from moco.evaluation.features import EvalTransform, Inference, extract
from moco.evaluation.linear_probe import load_head
from moco.evaluation.metrics import compute_metrics
from moco.evaluation.subject import open_labeled
from moco.interop.encoder_file import build, read_encoder, save_encoder
from moco.models.backbones import build_backbone

CPU = torch.device("cpu")
AUGMENT = {"crop_scale": [1.0, 1.0], "affine_p": 1.0, "degrees": 5.0}


def encoder_file(folder: Path, data: dict[str, Any] | None = None) -> Path:
    """Write the encoder.safetensors of a tiny network, as a run does."""
    torch.manual_seed(0)
    config = {
        "seed": 0,
        "model": {"backbone": "convnet", "options": {"width": 2, "pool": 2}},
        "augment": {"size": 16, "eval_resize": 0, "mean": [0.5] * 3, "std": [0.5] * 3},
        "data": data or {"name": "digits"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    backbone = build_backbone("convnet", {"width": 2, "pool": 2})
    for layer in backbone.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data.mul_(4)  # untrained features fade from layer to layer: a head would learn for long
    on_rank_zero(lambda: save_encoder(folder / "encoder.safetensors", backbone, config, 12))
    return folder / "encoder.safetensors"


def write_images(folder: Path, counts: dict[str, int], shade: int = 0) -> Path:
    """Write noisy images; each class has its own brightness."""
    rng = np.random.default_rng(shade)
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 60, (16, 16, 3)) + 60 * number
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def swept(folder: Path, **fields: Any) -> LinearConfig:
    config = LinearConfig(checkpoint=str(encoder_file(folder)), output=str(folder), epochs=4, batch_size=256, **fields)
    config.sweep.lrs, config.sweep.weight_decays = [0.01, 0.1, 1.0], [0.0, 0.01]
    return config


def official(folder: Path, **fields: Any) -> LinearConfig:
    config = LinearConfig(checkpoint=str(encoder_file(folder)), output=str(folder), epochs=2, batch_size=256, **fields)
    config.protocol, config.kind, config.augment = "moco_v2", "official", dict(AUGMENT)
    return config


def on_folders(config: LinearConfig, train: Path, test: Path | None) -> LinearConfig:
    config.data.name, config.data.root, config.data.labels, config.data.workers = "folder", str(train), "folder", 0
    config.data.eval_root = "" if test is None else str(test)
    return config


def run(config: LinearConfig) -> list[dict[str, Any]]:
    check_linear(config, 1)
    with contextlib.redirect_stdout(io.StringIO()):
        linear_module.evaluate_linear(config)
    return json.loads((Path(config.output) / "results.json").read_text())  # type: ignore[no-any-return]


# ---- results ----


def test_a_sweep_with_baselines_writes_table_results_image_and_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = swept(tmp_path, compare=["untrained", "pixels"])
    config.sweep.layers = ["layers.8", "output"]
    check_linear(config, 1)
    linear_module.evaluate_linear(config)
    text = capsys.readouterr().out
    assert re.search(r"pretrained.*untrained.*pixels.*used\s+once.*results\.json", text, re.S)
    entries = json.loads((tmp_path / "results.json").read_text())
    assert [(each["command"], each["encoder"], each["protocol"]) for each in entries] == [
        ("linear", "pretrained", "sweep"),
        ("linear", "untrained", "sweep"),
        ("linear", "pixels", "sweep"),
    ]
    figures, chosen = entries[0]["figures"], entries[0]["chosen"][0]
    assert figures["count"] == 500
    assert 15 < figures["top1"] <= figures["top5"] <= 100
    assert figures["interval95"][0] < figures["top1"] < figures["interval95"][1]
    assert len(figures["per_class"]) == 10
    assert np.sum(figures["confusion"]) == 500
    assert np.trace(figures["confusion"]) == pytest.approx(figures["top1"] * 5)
    assert chosen["layer"] in ("layers.8", "output")
    assert chosen["lr"] in config.sweep.lrs
    assert chosen["validation_count"] == pytest.approx(0.2 * 1297, abs=5)
    assert entries[2]["chosen"][0]["layer"] == "pixels"
    assert entries[2]["figures"]["top1"] > 80
    with Image.open(tmp_path / "confusion_linear.png") as image:
        assert image.width > 400


@pytest.mark.parametrize("make", [swept, official])
@pytest.mark.parametrize("normalize", ["standard", "l2"])
def test_the_saved_head_reproduces_the_accuracy(make: Any, normalize: str, tmp_path: Path) -> None:
    config = make(tmp_path)
    if config.kind == "sweep":
        config.sweep.normalize = normalize
    figures = run(config)[0]["figures"]
    head, sources = load_head(next(tmp_path.glob("linear*.safetensors"))), load_source(DataConfig("digits"))
    assert sources.held_out is not None
    backbone = build(read_encoder(tmp_path / "encoder.safetensors")).get_submodule("backbone")
    features = extract(backbone, sources.held_out, EvalTransform(**head.about["look"]), Inference(CPU))
    right = head(features).argmax(dim=1).numpy() == sources.held_out.labels
    assert 100 * right.mean() == pytest.approx(figures["top1"])
    assert head.about["classes"] == list("0123456789")


def test_several_seeds_give_a_mean_and_students_interval(tmp_path: Path) -> None:
    for config in (official(tmp_path, seeds=3), swept(tmp_path, seeds=3)):
        entry = run(config)[-1]
        scores = [each["top1"] for each in entry["each_seed"]]
        assert len(set(scores)) > 1
        assert entry["figures"]["top1"] == pytest.approx(np.mean(scores))
        half = 4.302652729911275 * np.std(scores, ddof=1) / np.sqrt(3)  # Student's 97.5 % quantile with 2 degrees
        assert entry["figures"]["top1_half_width95"] == pytest.approx(half)


def test_cached_features_give_the_same_results_and_are_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = swept(tmp_path)
    first = run(config)[0]
    config.sweep.cache = "disk"
    second = run(config)[1]
    assert len(list((tmp_path / "features").glob("*.npy"))) == 2
    monkeypatch.setattr(linear_module, "stream", None)  # nothing is computed any more
    third = run(config)[2]
    for entry in (second, third):
        assert (entry["figures"], entry["chosen"]) == (first["figures"], first["chosen"])


def test_a_batch_larger_than_the_data_is_lowered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write_images(tmp_path / "train", {"dark": 11, "light": 10})
    config = on_folders(official(tmp_path), train, write_images(tmp_path / "test", {"dark": 3, "light": 4}, 1))
    linear_module.evaluate_linear(config)
    assert "batch_size=256 is lowered to 16: the training split has 21 images" in capsys.readouterr().out
    entry = json.loads((tmp_path / "results.json").read_text())[0]
    assert entry["settings"]["batch_size"] == 16
    assert entry["figures"]["count"] == 7
    assert entry["figures"]["top5"] is None


def test_milestones_beyond_the_last_epoch_warn(tmp_path: Path) -> None:
    config = official(tmp_path)
    config.official.milestones = [60, 80]
    with pytest.warns(RunWarning, match=r"milestones=\[60, 80\] .* epochs=2"):
        run(config)


def test_the_table_is_shown_before_the_files_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> Any:
        raise OSError("no space left")

    monkeypatch.setattr(task_module, "record_results", full)
    with pytest.raises(OSError, match="no space left"):
        linear_module.evaluate_linear(swept(tmp_path))
    assert "Linear probe, sweep" in capsys.readouterr().out


def test_an_unwritable_output_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = swept(tmp_path)
    config.output = str(tmp_path / "encoder.safetensors" / "out")
    monkeypatch.setattr(linear_module, "encoders", None)
    with pytest.raises(ConfigError, match=r"output=.* cannot be written to"):
        linear_module.evaluate_linear(config)


# ---- the held-out split chooses nothing ----


def test_random_held_out_labels_change_the_accuracy_and_not_the_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = run(swept(tmp_path))[0]

    def shuffled(*arguments: Any) -> Any:
        train, held_out = open_labeled(*arguments)
        mixed = held_out.subset(np.arange(len(held_out)))
        assert mixed.labels is not None
        mixed.labels[:] = np.random.default_rng(0).permutation(mixed.labels)
        return train, mixed

    monkeypatch.setattr(task_module, "open_labeled", shuffled)
    blind = run(swept(tmp_path))[1]
    assert blind["chosen"] == honest["chosen"]
    assert blind["figures"]["top1"] < 20 < honest["figures"]["top1"]


# ---- refusals ----


@pytest.mark.parametrize(
    ("kind", "changes", "processes", "sentence"),
    [
        ("official", {"batch_size": 255}, 2, "batch_size=255 must be a multiple of the 2 processes"),
        ("official", {"official.lr": 0.0}, 1, r"official\.lr=0\.0 must be above 0"),
        ("official", {"official.schedule": "linear"}, 1, r"official\.schedule='linear' must be one of"),
        ("official", {"augment": {"size": 8}}, 1, r"augment\.size .* set images\.size"),
        ("official", {"compare": ["pixels"]}, 1, "set protocol=sweep"),
        ("official", {"sweep.layers": ["layer3"]}, 1, r"sweep\..* protocol=moco_v2"),
        ("sweep", {"official.lr": 3.0}, 1, r"official\..* protocol=sweep"),
        ("sweep", {"sweep.lrs": []}, 1, r"sweep\.lrs=\[\]"),
        ("sweep", {"sweep.lrs": [0.1, -1.0]}, 1, r"sweep\.lrs=.*: -1\.0 must be above 0"),
        ("sweep", {"sweep.weight_decays": []}, 1, r"sweep\.weight_decays=\[\]"),
        ("sweep", {"sweep.layers": []}, 1, r"sweep\.layers=\[\]"),
        ("sweep", {"sweep.layers": ["a", "a"]}, 1, r"sweep\.layers=.* twice"),
        ("sweep", {"sweep.validation": 0.0}, 1, r"sweep\.validation=0\.0 must be above 0 and below 1"),
        ("sweep", {"sweep.validation": 1.0}, 1, r"sweep\.validation=1\.0 must be above 0 and below 1"),
        ("sweep", {"sweep.normalize": "max"}, 1, r"sweep\.normalize='max' must be one of standard, l2, none"),
        ("sweep", {"sweep.cache": "ram"}, 1, r"sweep\.cache='ram' must be one of memory, disk"),
        ("sweep", {"compare": ["random"]}, 1, "'random' must be one of untrained, pixels"),
        ("sweep", {"epochs": 0}, 1, "epochs=0 must be at least 1"),
        ("sweep", {"momentum": 1.0}, 1, r"momentum=1\.0 must be"),
        ("sweep", {"kind": "other"}, 1, "kind='other' must be one of sweep, official"),
        ("sweep", {"official.lr": 1.0}, 1, "no effect with protocol=sweep: set protocol=moco_v2"),
        ("sweep", {"official.lr": 1.0, "protocol": "moco_v2"}, 1, "kind=sweep: set kind=official, or protocol=sweep"),
        ("official", {"sweep.lrs": [1.0]}, 1, "no effect with protocol=moco_v2: set protocol=sweep"),
        ("official", {"sweep.lrs": [1.0], "protocol": "sweep"}, 1, "kind=official: set protocol=moco_v2"),
    ],
)
def test_an_invalid_value_is_refused(kind: str, changes: dict[str, Any], processes: int, sentence: str) -> None:
    config = LinearConfig(checkpoint="x.pt")
    if kind == "official":
        config.kind, config.protocol = "official", "moco_v2"
    else:
        config.sweep.lrs, config.sweep.weight_decays = [0.1], [0.0]
    for name, value in changes.items():
        *path, last = name.split(".")
        setattr(getattr(config, path[0]) if path else config, last, value)
    with pytest.raises(ConfigError, match=sentence) as caught:
        check_linear(config, processes)
    assert "\n" not in str(caught.value)


def test_an_unknown_layer_is_refused_with_a_list_of_layers(tmp_path: Path) -> None:
    config = swept(tmp_path)
    config.sweep.layers = ["layers.99"]
    with pytest.raises(ConfigError, match=r"sweep\.layers: .*'layers\.99'.* output, layers"):
        linear_module.evaluate_linear(config)


@pytest.mark.parametrize("augment", [{"flips": 0.5}, {"flip_p": 2.0}, {"crop_scale": [0.0, 1.0]}])
def test_an_invalid_view_is_refused(augment: dict[str, Any], tmp_path: Path) -> None:
    config = official(tmp_path)
    config.augment = augment
    with pytest.raises(ConfigError, match=rf"augment\.{next(iter(augment))}"):
        linear_module.evaluate_linear(config)


def test_classes_with_one_image_allow_no_choice(tmp_path: Path) -> None:
    train = write_images(tmp_path / "train", {"dark": 1, "light": 1})
    test = write_images(tmp_path / "test", {"dark": 2, "light": 2}, 1)
    with pytest.raises(ConfigError, match=r"every class has only one image, .*set protocol=moco_v2"):
        linear_module.evaluate_linear(on_folders(swept(tmp_path), train, test))


@pytest.mark.parametrize("make", [swept, official])
def test_an_unreadable_image_is_named(make: Any, tmp_path: Path) -> None:
    train = write_images(tmp_path / "train", {"dark": 5, "light": 5})
    test = write_images(tmp_path / "test", {"dark": 2, "light": 2}, 1)
    (train / "light" / "3.png").write_bytes(b"no image")
    config = on_folders(make(tmp_path), train, test)
    config.batch_size = 4
    with pytest.raises(ValueError, match=r"light/3\.png"):
        linear_module.evaluate_linear(config)


def test_a_head_that_was_not_trained_is_reported() -> None:
    good = compute_metrics(torch.arange(4).repeat(50)[:, None], np.tile(np.arange(4), 50), 4)
    guess = compute_metrics(torch.zeros(200, 1, dtype=torch.int64), np.tile(np.arange(4), 50), 4)
    assert linear_module._problem("pretrained", 30.0, [2.0, 1.0], good) == ""
    rose = linear_module._problem("pretrained", 30.0, [16.6, 57.6], good)
    assert "rose from 16.6 to 57.6, so official.lr=30 " in rose
    chance = linear_module._problem("pretrained", 30.0, [2.0, 1.0], guess)
    assert "top-1 is 25.0 %, and a guess has 25.0 %" in chance
    assert "although the training loss fell to 1, " in chance
    assert all("protocol=sweep" in each for each in (rose, chance))
    assert "lower official.lr" in rose
    assert "er official.lr" not in chance


@pytest.mark.parametrize(
    ("losses", "fix"),
    [
        ([1.39, 1.38], "a higher official.lr, or more epochs"),  # ln 4 = 1.386
        ([1.386, 1.387], "a higher official.lr, or more epochs"),  # it rose by noise
        ([1.386, 9.0], "a lower official.lr"),
        ([16.0, 5.0], "a lower official.lr"),
    ],
)
def test_the_advice_for_a_head_that_guesses_follows_from_its_loss(losses: list[float], fix: str) -> None:
    guess = compute_metrics(torch.zeros(200, 1, dtype=torch.int64), np.tile(np.arange(4), 50), 4)
    assert f"; set {fix}, or protocol=sweep" in linear_module._problem("pretrained", 0.1, losses, guess)


def test_a_small_learning_rate_is_reported_and_named_in_the_title(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    config = official(tmp_path)
    config.official.lr = 1e-6
    linear_module.evaluate_linear(config)
    out = " ".join(capsys.readouterr().out.split())
    assert "set a higher official.lr, or more epochs, or protocol=sweep" in out
    assert "Linear probe, moco_v2 (epochs=2, official.lr=1e-06, " in out


# ---- the image of the confusion matrix ----


def test_the_image_grows_with_the_number_of_classes(tmp_path: Path) -> None:
    widths = []
    for count in (2, 25, 100):
        confusion = np.eye(count, dtype=np.int64) * 7
        linear_module.draw_confusion(confusion, [f"class {i}" for i in range(count)], "title", tmp_path / "c.png")
        with Image.open(tmp_path / "c.png") as image:
            widths.append(image.width)
    assert 400 < widths[0] < widths[1] < widths[2]


@pytest.mark.parametrize("protocol", sorted(path.stem for path in Path(config_dir(), "protocol").glob("*.yaml")))
def test_settings_that_differ_from_the_protocol_are_named(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(*overrides: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["linear", "run=x", f"protocol={protocol}", *overrides])
        (composed,) = compose("linear", LinearConfig)
        return linear_module.changed_settings(composed)

    assert changed() == {}
    assert changed("epochs=2", "seed=5") == {"epochs": 2, "seed": 5}
    if protocol == "sweep":
        assert changed("sweep.layers=[layer4]") == {"sweep.layers": ["layer4"]}
    else:
        assert changed("official.lr=0.2", "+augment.blur_p=0.5") == {"official.lr": 0.2, "+augment.blur_p": 0.5}


def test_a_protocol_of_ones_own_has_no_usual_settings() -> None:
    assert linear_module.changed_settings(LinearConfig(protocol="mine", epochs=3)) == {}
