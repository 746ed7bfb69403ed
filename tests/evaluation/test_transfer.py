"""The transfer command from a configuration to its files: sets, encoders, resuming, refusals."""

import contextlib
import io
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import moco.evaluation.transfer as transfer
import moco.evaluation.transfer_measures as measures
from moco.config import ConfigError
from moco.config.finetune import FinetuneConfig
from moco.config.transfer import TransferConfig, check_transfer
from moco.data.decode import ImageError
from moco.evaluation.features import Inference, extract
from moco.evaluation.finetune import evaluate_finetune
from moco.evaluation.logistic_regression import STRENGTHS
from moco.evaluation.subject import open_subject
from moco.evaluation.transfer_data import open_set
from moco.evaluation.transfer_measures import class_mean_half_width
from moco.evaluation.transfer_results import result_file
from moco.files import WriteError
from moco.interop.encoder_file import build
from moco.runs.comparison import placed
from tests.data.test_transfer_sets import write_caltech, write_pets, write_voc
from tests.evaluation.test_linear import encoder_file, write_images
from tests.full_disk import full_at

COUNTS = {"dark": 12, "middle": 9, "light": 15}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_strengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try every fourth strength of the protocol: the tests run on one core."""
    monkeypatch.setattr(measures, "STRENGTHS", STRENGTHS[::4])


def config(folder: Path, sets: list[str], **fields: Any) -> TransferConfig:
    place = folder / "encoder.safetensors"
    file = place if place.is_file() else encoder_file(folder)
    made = TransferConfig(checkpoint=str(file), output=str(folder), sets=sets, device="cpu", **fields)
    made.encoders = made.encoders or ["pretrained"]
    made.data.workers = 0
    return made


def run(settings: TransferConfig) -> tuple[list[Any], str]:
    check_transfer(settings)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        found = transfer.evaluate_transfer(settings)
    return found, printed.getvalue()


def folders(root: Path, validation: bool = False) -> str:
    for seed, (part, counts) in enumerate({"train": COUNTS, "test": dict.fromkeys(COUNTS, 6)}.items()):
        write_images(root / part, counts, seed)
    if validation:
        write_images(root / "val", dict.fromkeys(COUNTS, 4), 7)
    return str(root)


# ---- results ----


def test_digits_and_folders_give_one_table_with_a_mean_and_scikit_learns_accuracy(tmp_path: Path) -> None:
    sets = ["data", folders(tmp_path / "images", validation=True)]
    settings = config(tmp_path / "out", sets, encoders=["pretrained", "untrained"])
    found, printed = run(settings)
    assert "mean of 2" in printed
    few_shot = next(line for line in printed.splitlines() if "next: python -m moco.transfer" in line)
    overrides = shlex.split(few_shot.partition(" moco.transfer ")[2].partition("  (")[0])
    episodes = {each.partition("=")[0]: each.partition("=")[2] for each in overrides}
    assert (episodes["mode"], episodes["ways"], episodes["queries"]) == ("few_shot", "3", "1")  # of 6 test images each
    for each, name in zip(found, sets, strict=True):
        assert list(each.encoders) == ["pretrained", "untrained"]
        subject = open_subject(settings)
        splits = open_set(name, settings, subject)
        train, held = splits.with_validation(settings)
        assert (splits.validation is None) == (name == "data")
        backbone = build(subject.file).backbone
        x, v, t = (
            extract(backbone, part.source, subject.transform, Inference(CPU)).double().numpy()
            for part in (train, held, splits.test)
        )
        result = each.encoders["pretrained"]
        chosen = result["chosen"]["strength"]
        assert len(result["chosen"]["validation"]) == 12
        assert chosen == STRENGTHS[::4][int(np.argmax(result["chosen"]["validation"]))]
        fitted = LogisticRegression(C=1 / chosen, tol=1e-6, max_iter=3000)
        fitted.fit(np.concatenate([x, v]), np.concatenate([train.labels, held.labels]))
        assert result["value"] == pytest.approx(100 * fitted.score(t, splits.test.labels), abs=0.2)
        assert result["interval95"][0] < result["value"] <= result["interval95"][1]
    entries = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(each["command"], each["encoder"]) for each in entries] == 2 * [
        ("transfer", "pretrained"),
        ("transfer", "untrained"),
    ]
    assert len({each[1:3] for each in placed(entries)}) == 2  # a row per data set
    assert entries[0]["protocol"] == "linear, data"
    assert re.fullmatch(r"linear, images_[0-9a-f]{8}", entries[2]["protocol"])  # without its path, for a model card
    folder = Path(entries[2]["data"]["root"])
    assert (entries[2]["data"]["name"], folder.name, folder.is_absolute()) == ("folder", "images", True)
    assert entries[0]["data"]["name"] == "digits"
    assert entries[0]["changed"] == {}
    assert entries[0]["figures"]["top1"] == found[0].encoders["pretrained"]["value"]


def test_unreadable_images_are_left_out_on_request(tmp_path: Path) -> None:
    root = folders(tmp_path / "images", validation=True)
    complete, _ = run(config(tmp_path / "complete", [root]))
    for split in ("train", "val", "test"):
        Path(root, split, next(iter(COUNTS)), "unreadable.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"unreadable\.png"):
        run(config(tmp_path / "stopped", [root]))
    skipped, printed = run(config(tmp_path / "skipped", [root], on_bad_image="skip"))
    assert [each.encoders["pretrained"]["value"] for each in skipped] == [
        each.encoders["pretrained"]["value"] for each in complete
    ]
    for split in ("training", "validation", "test"):
        assert re.search(rf"on_bad_image=skip: 1 of the [0-9]+ {split} images cannot be read", printed)


def test_pets_count_each_class_equally(tmp_path: Path) -> None:
    write_pets(tmp_path / "data")
    ((result,), _) = run(config(tmp_path / "out", ["pets"], root=str(tmp_path / "data"), validation=0.4))
    figures = result.encoders["pretrained"]["figures"]
    assert result.about["measure"] == "mean_per_class"
    assert result.encoders["pretrained"]["value"] == pytest.approx(np.mean(figures["per_class"]))
    assert result.encoders["pretrained"]["half_width95"] > 0


def test_half_width_of_the_mean_over_classes() -> None:
    half = class_mean_half_width([50.0, 100.0, None], np.array([10, 20, 0]))
    variance = (0.5 * 0.5 / 14 + 22 / 24 * 2 / 24 / 24) / 4
    assert half == pytest.approx(100 * 1.959963984540054 * variance**0.5)


def test_caltech_draws_thirty_training_images_per_class(tmp_path: Path) -> None:
    write_caltech(tmp_path / "data", each=33)
    settings = config(tmp_path / "out", ["caltech101"], root=str(tmp_path / "data"))
    subject = open_subject(settings)
    splits = open_set("caltech101", settings, subject)
    assert np.bincount(splits.train.labels).tolist() == [30, 30]
    assert np.bincount(splits.test.labels).tolist() == [3, 3]
    settings.seed = 5  # the split is part of the data set
    again = open_set("caltech101", settings, subject)
    assert again.digest() == splits.digest()


def test_an_incomplete_set_is_refused_by_its_name(tmp_path: Path) -> None:
    write_caltech(tmp_path / "data", each=4)
    with pytest.raises(ConfigError, match="sets=caltech101: the smallest class has 4 images, fewer than 30"):
        run(config(tmp_path / "out", ["caltech101"], root=str(tmp_path / "data")))


def test_an_output_in_a_folder_of_sets_is_refused_by_that_field(tmp_path: Path) -> None:
    images = folders(tmp_path / "images")
    with pytest.raises(ConfigError, match=f"output={images}/out lies in sets={images}, .*: set output to a directory"):
        run(config(Path(images, "out"), [images]))


def test_voc_is_measured_by_the_mean_average_precision(tmp_path: Path) -> None:
    write_voc(tmp_path / "data")
    ((result,), printed) = run(config(tmp_path / "out", ["voc07"], root=str(tmp_path / "data")))
    figures = result.encoders["pretrained"]["figures"]
    assert result.about["measure"] == "voc_map"
    assert sum(each is not None for each in figures["per_class_ap"]) == 1  # of dogs; all cats of training are cats
    assert "mAP" in printed


def test_few_shots_give_a_mean_and_its_interval(tmp_path: Path) -> None:
    settings = config(tmp_path, ["data"], mode="few_shot", episodes=30, encoders=["pretrained", "untrained"])
    ((result,), printed) = run(settings)
    one = result.encoders["pretrained"]
    assert one["half_width95"] == one["figures"]["top1_half_width95"] > 0
    assert one["figures"]["episodes"] == 30
    assert "5-way 5-shot" in printed
    assert (tmp_path / "transfer" / "few_shot_data.json").is_file()


def test_fine_tuning_equals_that_of_moco_finetune(tmp_path: Path) -> None:
    images = folders(tmp_path / "images", validation=True)
    fields: dict[str, Any] = {"epochs": 2, "batch_size": 16, "lr": 0.1, "seeds": 2}
    made = config(tmp_path / "out", [images], mode="finetune", finetune=fields, encoders=["pretrained", "untrained"])
    shutil.rmtree(Path(images, "val/middle"))  # a validation split may lack a class
    ((result,), printed) = run(made)
    assert "transfer, fine-tuned" in printed
    # moco.finetune on the same images: validation images are training images too.
    finetune = FinetuneConfig(checkpoint=made.checkpoint, output=str(tmp_path / "finetune"), device="cpu", **fields)
    finetune.encoders, finetune.fraction = ["pretrained", "untrained"], 1.0
    finetune.data.name, finetune.data.root, finetune.data.labels = "folder", f"{images}/train", "folder"
    finetune.data.more_roots, finetune.data.eval_root, finetune.data.workers = [f"{images}/val"], f"{images}/test", 0
    with contextlib.redirect_stdout(io.StringIO()):
        expected = evaluate_finetune(finetune)
    for each in expected:
        assert result.encoders[each.encoder]["value"] == pytest.approx(each.top1)
        assert result.encoders[each.encoder]["training"]["images"] == 36 + 8


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"fraction": 0.1}, r"finetune\.fraction cannot be set: use the fields seeds, epochs"),
        ({"lr": -1.0}, r"finetune\.lr=-1\.0 must be above 0"),
        ({"lr": "x"}, r"finetune\.lr='x' must be a number"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov=true needs optimizer=sgd"),
    ],
)
def test_fields_of_fine_tuning_are_checked(fields: dict[str, Any], error: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=error):
        check_transfer(config(tmp_path, ["data"], finetune=fields))


def test_another_file_is_an_encoder_like_the_first(tmp_path: Path) -> None:
    other = encoder_file(tmp_path / "other")
    images = folders(tmp_path / "images")
    ((result,), printed) = run(config(tmp_path / "out", [images], encoders=["pretrained", str(other)]))
    assert str(other) in printed.replace("\n", "")
    first, second = result.encoders["pretrained"], result.encoders[str(other)]
    assert first == second


@pytest.mark.parametrize("order", [["pretrained", "OTHER"], ["OTHER", "pretrained"], ["OTHER"]])
def test_results_are_below_the_directory_of_the_configured_encoder(order: list[str], tmp_path: Path) -> None:
    other = encoder_file(tmp_path / "other", {"name": "folder", "root": folders(tmp_path / "images")})
    names = [str(other) if each == "OTHER" else each for each in order]
    settings = config(tmp_path / "own", ["data"], encoders=names, mode="few_shot", ways=3, queries=5, episodes=2)
    settings.output = ""
    run(settings)
    entries = json.loads((tmp_path / "own" / "results.json").read_text())
    assert [each["encoder"] for each in entries] == names
    assert {each["data"]["name"] for each in entries} == {"digits"}  # data=: that of the configured encoder
    assert not (tmp_path / "other" / "results.json").exists()


# ---- resuming ----


def test_an_interrupted_call_continues_with_the_missing_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (folders(tmp_path / name) for name in ("first", "second"))
    settings = config(tmp_path / "out", [first, second], encoders=["pretrained", "untrained"])
    complete = run(config(tmp_path / "whole", [first, second], encoders=["pretrained", "untrained"]))[0]
    extracted: list[Any] = []

    def counting(*arguments: Any) -> torch.Tensor:
        if len(extracted) == limit:
            raise KeyboardInterrupt
        extracted.append(arguments[1])
        return extract(*arguments)

    limit = 9  # three parts of three pairs of a set and an encoder
    monkeypatch.setattr(measures, "extract", counting)
    with pytest.raises(KeyboardInterrupt):
        run(settings)
    extracted.clear()
    found, printed = run(settings)
    assert len(extracted) == 3
    assert "2 of 2 encoders are already in" in printed
    assert "1 of 2 encoders are already in" in printed
    for each, expected in zip(found, complete, strict=True):
        assert each.encoders == expected.encoders
    extracted.clear()
    run(settings)
    assert extracted == []


def test_changed_settings_images_and_weights_are_evaluated_again_with_one_sentence(tmp_path: Path) -> None:
    images = folders(tmp_path / "images")
    settings = config(tmp_path / "out", [images])
    run(settings)
    settings.validation = 0.4
    assert "was made with validation=0.2, so all encoders are evaluated again" in run(settings)[1]
    shutil.copytree(Path(images, "test", "dark"), Path(images, "train", "dark"), dirs_exist_ok=True)
    with pytest.warns(match="training images"):
        assert "other images or another split" in run(settings)[1]
    settings.images.resize = 20
    with pytest.warns(match="training images"):
        assert "pretrained has other weights, or another preparation of images" in run(settings)[1]


def test_the_file_of_a_name_does_not_depend_on_folders_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("data", "pets", "other"):
        (tmp_path / name).mkdir()
    assert result_file(tmp_path, "data", "linear").name == "linear_data.json"
    assert result_file(tmp_path, "pets", "linear").name == "linear_pets.json"
    assert re.fullmatch(r"linear_pets_[0-9a-f]{8}\.json", result_file(tmp_path, "./pets", "linear").name)
    assert result_file(tmp_path, "other", "linear") == result_file(tmp_path, f"{tmp_path}/other/", "linear")


def test_a_named_set_need_not_be_there_when_its_results_are(tmp_path: Path) -> None:
    write_pets(tmp_path / "data")
    settings = config(tmp_path / "out", ["pets"], root=str(tmp_path / "data"), validation=0.4)
    run(settings)
    shutil.rmtree(tmp_path / "data")
    assert "1 of 1 encoders are already in" in run(settings)[1]


def test_a_damaged_results_file_is_refused(tmp_path: Path) -> None:
    settings = config(tmp_path, ["data"])
    (tmp_path / "transfer").mkdir()
    for text in ("{", "[]", '{"name": 3}', '{"name": "a", "mode": "b", "settings": []}'):
        (tmp_path / "transfer" / "linear_data.json").write_text(text)
        with pytest.raises(ConfigError, match=r"linear_data\.json is damaged .*: remove it"):
            run(settings)


# ---- refusals ----


@pytest.mark.parametrize(
    ("train", "test", "error"),
    [
        ({"a": 4, "b": 4, "c": 4}, {"a": 2, "b": 2}, "the test split has no image of c: add one or more"),
        ({"a": 4, "b": 4}, {"a": 2, "b": 2, "c": 2}, "has images of c, and training has no such class"),
        ({"a": 1, "b": 1}, {"a": 1, "b": 1}, "validation=0.2: every class has only one image"),
        ({"a": 4}, {"a": 4}, "one class folder only"),
        ({"a": 1, "b": 1}, {}, "every class has only one image"),
        ({"a": 1, "b": 6}, {}, "the test split has no image of a: add one or more"),
    ],
)
def test_splits_that_cannot_be_evaluated_are_refused(
    train: dict[str, int], test: dict[str, int], error: str, tmp_path: Path
) -> None:
    root = tmp_path / "images"
    write_images(root / "train" if test else root, train)
    if test:
        write_images(root / "test", test, 1)
    with pytest.raises((ConfigError, ValueError), match=error):
        run(config(tmp_path / "out", [str(root)]))


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"sets": ["petz"]}, "sets=petz is neither a folder nor a known data set: did you mean pets"),
        ({"sets": ["gone/images"]}, "sets=gone/images does not exist: name a folder of images"),
        ({"sets": ["pets"], "root": "nowhere"}, "sets=pets was not found in root=nowhere .* set download=true"),
        ({"sets": ["cifar10"], "root": "nowhere"}, "sets=cifar10 was not found in root=nowhere"),
        ({"sets": ["data"], "encoders": ["gone.pt"]}, "encoders=gone.pt: checkpoint=gone.pt does not exist"),
        (
            {"sets": ["data"], "mode": "few_shot", "ways": 11},
            "sets=data: ways=11 classes of an episode need 20 test images each",
        ),
    ],
)
def test_refusals_name_the_field(fields: dict[str, Any], error: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, FileNotFoundError), match=error):
        run(config(tmp_path, **fields))


@pytest.mark.parametrize("mode", ["few_shot", "finetune"])
def test_images_with_several_labels_are_refused_by_other_modes(mode: str, tmp_path: Path) -> None:
    write_voc(tmp_path / "data")
    with pytest.raises(ConfigError, match="sets=voc07 has images with several labels"):
        run(config(tmp_path / "out", ["voc07"], root=str(tmp_path / "data"), mode=mode))


def test_a_download_is_made_on_request_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("moco.evaluation.transfer_data.download", lambda name, root: asked.append((name, root)))
    root = str(tmp_path / "data")
    for wanted in (False, True):
        settings = config(tmp_path / "out", ["pets"], root=root, download=wanted)
        with pytest.raises(FileNotFoundError, match="sets=pets was not found"):
            run(settings)
    assert asked == [("pets", root)]


def test_a_result_is_printed_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full_at(monkeypatch, "results.json")
    with pytest.raises(WriteError, match=r"results\.json cannot be written"):
        transfer.evaluate_transfer(config(tmp_path / "out", [folders(tmp_path / "images")]))
    assert re.search(r"images, pretrained: [0-9.]+ \([0-9.]+–[0-9.]+\) %", capsys.readouterr().out)
