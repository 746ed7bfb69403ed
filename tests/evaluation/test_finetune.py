"""Fine-tuning from a configuration to its files, on digits and on small folders."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from moco.config import AugmentConfig, ConfigError, DataConfig, ModelConfig, RunWarning
from moco.config.data import SubjectDataConfig
from moco.config.finetune import FinetuneConfig, check_finetune
from moco.config.subject import ImagesConfig
from moco.data.sources import Source, load_source
from moco.evaluation import task as task_module
from moco.evaluation.features import EvalTransform, Inference, extract
from moco.evaluation.finetune import evaluate_finetune, pick, view_of
from moco.evaluation.metrics import mean_interval
from moco.evaluation.subject import open_subject
from moco.evaluation.task import Result, interval_note
from moco.files import WriteError
from moco.interop.encoder_file import ForeignFileError, build, read_encoder, save_encoder
from moco.models.backbones import build_backbone
from moco.runtime.errors import NonFiniteLoss
from tests.full_disk import full_at

RUN = {
    "seed": 0,
    "model": asdict(ModelConfig(backbone="convnet", options={"width": 4})),
    "augment": asdict(
        AugmentConfig(size=16, affine_p=1.0, degrees=10.0, mean=[0.5] * 3, std=[0.5] * 3, second={"degrees": 20.0})
    ),
    "data": asdict(DataConfig(name="digits")),
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("encoder") / "small.safetensors"
    torch.manual_seed(0)
    save_encoder(path, build_backbone("convnet", {"width": 4}), RUN, step=7)
    return str(path)


def configured(encoder: str, output: Path, **changed: Any) -> FinetuneConfig:
    values: dict[str, Any] = {
        "checkpoint": encoder,
        "output": str(output),
        "device": "cpu",
        "encoders": ["pretrained"],
        "epochs": 1,
        "min_steps": 4,
        "lr": 0.05,
    }
    config = FinetuneConfig(**(values | changed))
    check_finetune(config)
    return config


def written(output: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((output / "results.json").read_text())
    return entries


def write_images(folder: Path, per_class: int, classes: str = "ab", side: int = 12) -> Path:
    """Write class folders of small images, each class with its own color."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            color = np.full((side, side, 3), 40 + i, np.uint8)
            color[..., number % 3] = 200
            Image.fromarray(color).save(folder / name / f"{name}_{i}.png")
    return folder


def test_it_writes_results_and_a_network_that_the_other_commands_read(
    encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(encoder, tmp_path, encoders=["pretrained", "untrained"], fraction=0.1, seeds=2, min_steps=30)
    outcomes = evaluate_finetune(config)
    output = capsys.readouterr().out
    for text in (
        "10 % of labels: 129 of 1,297 images of 10 classes",
        "epochs=1 is raised to 30 to reach min_steps=30; lower min_steps for fewer epochs",
        "30 steps: 30 epochs, steps per epoch: 1, images per step: 128",
        "untrained, seed 1:",
        "pretrained minus untrained, on the same images for each seed:",
        "next: python -m moco.knn ",
    ):
        assert text in output

    entries = written(tmp_path)
    assert [each["encoder"] for each in entries] == ["pretrained", "untrained"]
    entry = entries[0]
    assert (entry["command"], entry["protocol"], entry["labelled"]) == ("finetune", "10 % of labels", 129)
    assert (entry["settings"]["steps"], entry["settings"]["fraction"]) == (30, 0.1)
    assert entry["settings"]["view"] == json.loads(json.dumps(asdict(view_of(config, open_subject(config)))))
    assert (entry["weights"], entry["backbone"], entry["options"]) == ("encoder", "convnet", {"width": 4})
    changed = {name: entry["changed"][name] for name in ("epochs", "lr", "min_steps")}
    assert changed == {"epochs": 1, "lr": 0.05, "min_steps": 30}
    assert entry["changed"].keys().isdisjoint({"fraction", "seeds", "encoders", "data", "run"})
    assert (entry["data"]["training"], entry["data"]["held_out"]) == (1297, 500)
    assert entry["data"]["name"] == "digits"
    each = [one["top1"] for one in entry["per_seed"]]
    mean, half = mean_interval(each)
    assert entry["figures"]["top1"] == pytest.approx(mean)
    assert entry["figures"]["top1_half_width95"] == pytest.approx(half)
    assert mean > 20  # chance is 10
    assert list(tmp_path.glob("events.out.tfevents.*"))

    # Backbone and classifier from their files alone give the last seed's figure again.
    folder = tmp_path / "finetune" / "pretrained_10percent"
    assert outcomes[0].details["saved"] == str(folder)
    file = read_encoder(folder / "encoder.safetensors")
    assert (file.backbone, file.options, file.step) == ("convnet", {"width": 4}, 7 + 30)
    assert file.images == {"size": 16, "resize": 0, "mean": [0.5] * 3, "std": [0.5] * 3}
    assert file.config["data"]["name"] == "digits"
    held_out = load_source(DataConfig("digits")).held_out
    assert held_out is not None
    assert held_out.labels is not None
    backbone = build(file).get_submodule("backbone")
    features = extract(backbone, held_out, EvalTransform(16, 0, (0.5,) * 3, (0.5,) * 3), Inference(torch.device("cpu")))
    with safe_open(folder / "head.safetensors", "pt") as head:
        assert json.loads(head.metadata()["classes"]) == list("0123456789")
        scores = features @ head.get_tensor("weight").T + head.get_tensor("bias")
    assert 100 * float((scores.argmax(dim=1).numpy() == held_out.labels).mean()) == each[-1]
    before = build(read_encoder(Path(encoder))).get_submodule("backbone").state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_the_same_command_gives_the_same_results_and_another_seed_others(encoder: str, tmp_path: Path) -> None:
    def top1(seed: int) -> list[float]:
        (outcome,) = evaluate_finetune(
            configured(encoder, tmp_path, encoders=["untrained"], seed=seed, seeds=2, min_steps=25)
        )
        return [each.top1 for each in outcome.metrics]

    first = top1(0)
    assert top1(0) == first
    assert top1(1)[0] == first[1]  # repeats are seeds
    assert first[0] != first[1]


def test_the_held_out_split_opens_once_per_seed_and_never_in_validation(
    encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[int] = []

    def counted(network: Any, source: Source, *rest: Any) -> torch.Tensor:
        evaluated.append(len(source))
        return extract(network, source, *rest)

    monkeypatch.setattr(task_module, "extract", counted)
    evaluate_finetune(configured(encoder, tmp_path, encoders=["pretrained", "untrained"], seeds=2))
    assert evaluated == [500] * 4
    evaluated.clear()
    evaluate_finetune(configured(encoder, tmp_path, validation=0.2))
    assert evaluated == [259]
    assert written(tmp_path)[-1]["protocol"] == "1 % of labels, validation"
    assert written(tmp_path)[-1]["labelled"] == 10
    assert written(tmp_path)[-1]["settings"]["fraction"] == 0.01  # the default, which the configuration stores as null


def test_a_single_seed_gets_the_interval_of_its_test_images(
    encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (outcome,) = evaluate_finetune(configured(encoder, tmp_path, labels_per_class=2))
    low, high = outcome.metrics[0].interval()
    output = capsys.readouterr().out
    assert f"({low:.1f}–{high:.1f})" in output
    assert "Wilson" in output
    assert "batch_size=128 is lowered to 20" in output
    assert (tmp_path / "finetune" / "pretrained_2perclass" / "encoder.safetensors").is_file()


def test_a_foreign_file_on_folders_with_a_list_of_names(tmp_path: Path) -> None:
    """A plain state dict, streamed images, a list as in SimCLR, bn=frozen, AdamW, MixUp."""
    torch.manual_seed(0)
    torch.save(build_backbone("convnet", {"width": 4}).state_dict(), tmp_path / "plain.pt")
    (tmp_path / "few.txt").write_text("a_1.png\na_4.png\n\nb_0.png\nb_2.png\n")
    config = configured(
        str(tmp_path / "plain.pt"),
        tmp_path / "out",
        backbone="convnet",
        options={"width": 4},
        data=SubjectDataConfig(
            name="folder",
            root=str(write_images(tmp_path / "train", 6)),
            eval_root=str(write_images(tmp_path / "test", 3)),
            labels="folder",
            workers=0,
        ),
        images=ImagesConfig(size=12, resize=12),
        subset_list=str(tmp_path / "few.txt"),
        bn="frozen",
        optimizer="adamw",
        lr=0.003,
        mixup=0.2,
        min_steps=40,
    )
    (outcome,) = evaluate_finetune(config)
    assert outcome.metrics[0].top1 == 100  # two colors
    (entry,) = written(tmp_path / "out")
    assert (entry["labelled"], entry["protocol"]) == (4, "labels of few.txt")
    listed = (tmp_path / "few.txt").read_bytes()
    assert entry["settings"]["subset_list_sha256"] == hashlib.sha256(listed).hexdigest()
    assert entry["settings"]["fraction"] is None
    saved = Path(outcome.details["saved"])
    assert saved.name == "pretrained_list_few"
    file = read_encoder(saved / "encoder.safetensors")
    assert file.images["size"] == 12
    assert file.config["data"]["root"] == config.data.root


def test_the_view_is_the_first_of_the_run_unless_configured(encoder: str, tmp_path: Path) -> None:
    config = configured(encoder, tmp_path, view={"degrees": 3.0, "crop_scale": [0.5, 1.0]})
    view = view_of(config, open_subject(config))
    assert (view.degrees, view.affine_p, view.crop_scale, view.size) == (3.0, 1.0, (0.5, 1.0), 16)
    plain = configured(encoder, tmp_path)
    assert view_of(plain, open_subject(plain)).degrees == 10.0
    assert view_of(plain, open_subject(plain)).mean == (0.5, 0.5, 0.5)


def test_a_vision_transformer_with_layer_decay_and_drop_path_keeps_its_options(tmp_path: Path) -> None:
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2}
    run = RUN | {"model": asdict(ModelConfig(backbone="timm/vit_tiny_patch16_224", options=options))}
    path = tmp_path / "vit.safetensors"
    save_encoder(path, build_backbone("timm/vit_tiny_patch16_224", options), run, step=0)
    settings = {"layer_decay": 0.7, "drop_path": 0.2, "optimizer": "adamw", "lr": 0.001, "label_smoothing": 0.1}
    (outcome,) = evaluate_finetune(configured(str(path), tmp_path, **settings))
    file = read_encoder(Path(outcome.details["saved"]) / "encoder.safetensors")
    assert file.options == options  # drop-path is for training only
    assert build(file).get_submodule("backbone").num_features == 12
    assert outcome.metrics[0].count == 500


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"fraction": 0.0}, "fraction=0.0 must be above 0 and at most 1"),
        ({"fraction": 1.5}, "fraction=1.5 must be above 0 and at most 1"),
        ({"fraction": 0.1, "subset_list": "x.txt"}, "fraction=0.1 and subset_list=x.txt"),
        ({"labels_per_class": -1}, "labels_per_class=-1 must be at least 0"),
        ({"encoders": []}, r"encoders=\[\] must hold"),
        ({"encoders": ["random"]}, "'random' must be one of pretrained, untrained"),
        ({"encoders": ["untrained", "untrained"]}, "must not hold a value twice"),
        ({"lr": 0.0}, "lr=0.0 must be above 0"),
        ({"head_lr_factor": -1.0}, "head_lr_factor=-1.0 must be above 0"),
        ({"lr": float("nan")}, "lr=nan must be a finite number"),
        ({"mixup": -0.1}, "mixup=-0.1 must be at least 0"),
        ({"precision": "fp8"}, "precision='fp8' must be one of fp32, bf16"),
        ({"bn": "grouped"}, "bn='grouped' must be one of sync, frozen"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0 must be"),
        ({"optimizer": "adamw", "nesterov": True}, "nesterov=true needs optimizer=sgd"),
        ({"layer_decay": 0.0}, "layer_decay=0.0 must be above 0"),
        ({"exclude": ["head"]}, "'head' must be one of bias, norm"),
        ({"betas": [0.9]}, "betas=.0.9. must hold 2 values"),
        ({"checkpoint": ""}, "no encoder: set run=DIR"),
    ],
)
def test_an_invalid_configuration_is_refused(changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        configured("x.pt", Path("out"), **changed)


def test_the_batch_must_be_shared_evenly() -> None:
    config = configured("x.pt", Path("out"), batch_size=128)
    with pytest.raises(ConfigError, match="batch_size=128 must be a multiple of the 3 processes: set batch_size=129"):
        check_finetune(config, processes=3)


@pytest.mark.parametrize(
    ("changed", "kind", "sentence"),
    [
        ({"layer_decay": 0.7}, ConfigError, "layer_decay=0.7 needs .*convnet"),
        ({"drop_path": 0.1}, ConfigError, "drop_path=0.1 needs .*convnet"),
        ({"labels_per_class": 500}, ConfigError, "labels_per_class=500: .* 12"),
        ({"view": {"size": 8}}, ConfigError, "view.size .* images.size"),
        ({"view": {"flip": 1}}, ConfigError, "view.flip is not a field .*affine_p"),
        ({"view": {"flip_p": 2}}, ConfigError, "view.flip_p=2 must lie in 0 ... 1"),
        ({"subset_list": "/nowhere/list.txt"}, FileNotFoundError, "subset_list=/nowhere/list.txt does not exist"),
        ({"options": {"width": 5}}, ForeignFileError, "does not fit backbone=convnet"),
        ({"lr": 1e30, "min_steps": 20}, NonFiniteLoss, "step .* of 20 .*loss .*lr=1e.30"),
        ({"head_lr_factor": 1e30, "min_steps": 20}, NonFiniteLoss, "step .* of 20 .*head_lr_factor=1e.30"),
        (
            {"data": SubjectDataConfig(name="folder", root="/nowhere", labels="folder")},
            FileNotFoundError,
            "data.root=/nowhere does not exist",
        ),
    ],
)
def test_a_value_that_does_not_fit_the_files_is_refused(
    encoder: str, tmp_path: Path, changed: dict[str, Any], kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence) as caught:
        evaluate_finetune(configured(encoder, tmp_path, **changed))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "results.json").exists()


def test_invalid_lists(encoder: str, tmp_path: Path) -> None:
    train = load_source(DataConfig("folder", str(write_images(tmp_path / "train", 3, "abc")), labels="folder")).train
    for text, sentence in {
        "": "is empty",
        "a_0.png\nz.png\n": r"few.txt: 1 .* not in the training split \(z.png\)",
        "a_0.png\nc_1.png\n": "lists no image of b",
        "a\\a_0.png\n": "write / between folders",
        "a/a_0.png 0\n": "only the path on each line",
    }.items():
        (tmp_path / "few.txt").write_text(text)
        with pytest.raises(ValueError, match=sentence):
            pick(configured(encoder, tmp_path, subset_list=str(tmp_path / "few.txt")), train, seed=0)
    (tmp_path / "few.txt").write_text("a_0.png\nb_0.png\nc_0.png\n", encoding="utf-8-sig")  # as Windows editors do
    assert len(pick(configured(encoder, tmp_path, subset_list=str(tmp_path / "few.txt")), train, seed=0)) == 3
    (tmp_path / "few.txt").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ConfigError, match=r"subset_list=.*text"):
        pick(configured(encoder, tmp_path, subset_list=str(tmp_path / "few.txt")), train, seed=0)


def test_validation_leaves_each_class_a_labeled_image(encoder: str, tmp_path: Path) -> None:
    test = write_images(tmp_path / "test", 1)

    def attempt(root: Path) -> list[Result]:
        data = SubjectDataConfig(name="folder", root=str(root), eval_root=str(test), labels="folder", workers=0)
        images = ImagesConfig(size=12, resize=12)
        return evaluate_finetune(configured(encoder, tmp_path / "out", data=data, images=images, validation=0.9))

    two = write_images(tmp_path / "two", 2)
    (outcome,) = attempt(two)
    assert outcome.metrics[0].count == 2  # 0.9 of two would be both
    (two / "b" / "b_1.png").unlink()
    (outcome,) = attempt(two)
    assert outcome.metrics[0].count == 1  # the only image of b stays in training
    (two / "a" / "a_1.png").unlink()
    with pytest.raises(ConfigError, match=r"validation=0.9: every class has only one image"):
        attempt(two)


def test_a_damaged_results_file_is_refused_before_training(encoder: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("[")
    with pytest.raises(ConfigError, match=r"results.json is damaged"):
        evaluate_finetune(configured(encoder, tmp_path))
    assert not (tmp_path / "finetune").exists()


def test_frozen_bn_without_pretraining_warns(encoder: str, tmp_path: Path) -> None:
    with pytest.warns(RunWarning, match=r"bn=frozen .*untrained"):
        evaluate_finetune(configured(encoder, tmp_path, encoders=["untrained"], bn="frozen", min_steps=1))


def test_the_interval_of_fewer_than_three_seeds_is_called_uncertain() -> None:
    assert ["means little" in interval_note(seeds) for seeds in (1, 2, 3, 5)] == [False, True, False, False]


def test_the_results_are_printed_if_the_disk_becomes_full(
    encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full_at(monkeypatch, "results.json")
    with pytest.raises(WriteError, match=r"results\.json cannot be written"):
        evaluate_finetune(configured(encoder, tmp_path, min_steps=1))
    assert "each seed" in capsys.readouterr().out
