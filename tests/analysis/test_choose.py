"""Choosing without labels: the measures, agreement computed by hand, refusals."""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from moco.analysis import alpha_req, rank_me, uniformity
from moco.analysis.studies.choose import EVALUATIONS, MEASURES, Point, agreements, choose, chosen
from moco.choose import choose as command
from moco.config import AugmentConfig, ConfigError, DataConfig, ModelConfig, TrainConfig
from moco.config.choose import ChooseConfig
from moco.config.data import SubjectDataConfig
from moco.data.sources import Sources, limited, load_source
from moco.evaluation.features import EvalTransform, Inference, extract
from moco.files import WriteError
from moco.interop.encoder_file import build, read_encoder
from moco.methods.build import build_method
from moco.methods.moco_config import MoCoConfig
from moco.runs import checkpoint
from tests.data.images import folder
from tests.full_disk import full_at

AUGMENT = AugmentConfig(size=16, crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0], mean=[0.5] * 3, std=[0.5] * 3)


def run(path: Path, steps: tuple[int, ...] = (1, 2), seed: int = 0, **data: Any) -> Path:
    """Checkpoints of a run with different random weights at each step."""
    model = ModelConfig(backbone="convnet", options={"width": 4}, dim=8, bn="batch")
    trained = TrainConfig(
        run=str(path),
        seed=seed,
        data=DataConfig(**data),
        augment=AUGMENT,
        model=model,
        method=MoCoConfig(queue_size=16),
    )
    for step in steps:
        torch.manual_seed(100 * seed + step)
        method = build_method(trained).state_dict()
        checkpoint.save(path / "checkpoints", step, {"config": asdict(trained), "step": step, "method": method}, 9)
    return path


def config(output: Path, *runs: str | Path, **changes: Any) -> ChooseConfig:
    values: dict[str, Any] = {"images": 50, "draws": 3, "device": "cpu"} | changes
    return ChooseConfig(runs=[str(each) for each in runs], output=str(output), **values)


def test_measures_equal_those_of_the_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = run(tmp_path / "a"), run(tmp_path / "b", (4,), seed=1)
    points = choose(config(tmp_path / "out", tmp_path / "[ab]", first))  # a pattern, and one of its runs again
    assert [(point.run, point.step) for point in points] == [(str(first), 1), (str(first), 2), (str(second), 4)]
    images = limited(load_source(DataConfig("digits")).train, 50)
    for point in points:
        encoder = build(read_encoder(Path(point.file)))
        features = extract(
            encoder.backbone, images, EvalTransform(16, 0, [0.5] * 3, [0.5] * 3), Inference(torch.device("cpu"))
        )
        projected = encoder.head(features)
        assert point.measures["rank_me"] == pytest.approx(rank_me(features).item(), rel=1e-5)
        assert point.measures["rank_me_projection"] == pytest.approx(rank_me(projected).item(), rel=1e-5)
        assert point.measures["alpha_req"] == pytest.approx(alpha_req(features).item(), rel=1e-4)
        assert point.measures["uniformity"] == pytest.approx(uniformity(features).item(), rel=1e-4)
        assert point.measures["sum"] == point.measures["alignment"] + point.measures["uniformity"]
        assert set(point.accuracies) == set(EVALUATIONS)
        assert all(10 < value < 100 for value in point.accuracies.values())  # random features separate some digits
    written = json.loads((tmp_path / "out" / "choose.json").read_text())
    assert written["checkpoints"][1]["measures"] == points[1].measures
    assert written["checkpoints"][1]["accuracies"] == points[1].accuracies
    assert written["taken"]["rank_me"] == chosen(points, "rank_me").file
    assert written["agreement"]["rank_me"]["knn"]["within"] is None  # no run has three checkpoints
    out = capsys.readouterr().out
    assert "agreement with few-label kNN" in out
    assert (
        f"python -m moco.linear device=cpu checkpoint={written['taken']['rank_me']}" in out
    )  # not the highest accuracy


def test_labels_do_not_change_the_measures_and_evaluations_of_a_run_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run(tmp_path / "a", (1, 2, 3))
    evaluations = made / "results.json"
    evaluations.write_text('[{"command": "knn"}]')
    without, *_ = choose(config(made, made, labels=False))  # the output is the run itself
    assert without.accuracies == {}
    assert "agreement" not in capsys.readouterr().out
    point, *_ = choose(config(made, made))
    assert point.measures == without.measures
    assert point.accuracies
    assert evaluations.read_text() == '[{"command": "knn"}]'
    assert (made / "choose.json").is_file()


def point(name: str, step: int, measure: float, knn: float) -> Point:
    return Point(name, f"{name}/{step}", step, dict.fromkeys(MEASURES, measure), dict.fromkeys(EVALUATIONS, knn))


def test_a_choice_among_equal_checkpoints_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choose(config(tmp_path / "out", run(tmp_path / "a", (1, 2)), run(tmp_path / "b", (2,), seed=1)))
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("first of 2 equal") == 1
    assert re.search(r"the newest checkpoint.*first of 2 equal.*lost: .* equal choices, their mean", text)


def test_agreement_is_spearmans_and_losses_are_points() -> None:
    rising = [point("a", step, measure=step, knn=60 + step) for step in (1, 2, 3)]
    falling = [point("b", step, measure=10 + step, knn=50 - step) for step in (1, 2, 3)]
    constant = [point("c", step, measure=-step, knn=40) for step in (1, 2, 3)]  # has no rank correlation
    found = agreements([*rising, *falling, *constant])["rank_me"]["knn"]
    assert found.within == pytest.approx(0)  # the mean of 1 and -1
    assert found.across == pytest.approx(0.5)  # 3, 13, -3 against 63, 47, 40
    assert found.lost_within == pytest.approx(2 / 3)  # 0, 2 and 0
    assert found.lost_across == pytest.approx(63 - 47)
    assert found.lost_everything == pytest.approx(63 - 47)  # b's step 3 has the highest measure
    assert found.everything is not None
    assert agreements([*rising, *falling, *constant])["uniformity"]["knn"].within == pytest.approx(0)  # lower is better
    assert agreements(rising)["uniformity"]["probe"].within == pytest.approx(-1)
    equal = [point("a", 1, measure=1, knn=60), point("b", 1, measure=1, knn=70)]
    assert agreements(equal)["rank_me"]["knn"].lost_across == pytest.approx(5)  # the mean of two equal choices
    assert agreements([Point("a", "f", 1, dict.fromkeys(MEASURES, 1.0), {})]) == {}


def test_a_collapsed_checkpoint_is_chosen_only_if_alone() -> None:
    collapsed = point("a", 1, measure=math.nan, knn=10.0)
    assert chosen([collapsed, point("a", 2, measure=0.5, knn=70.0)], "alpha_req").step == 2
    assert chosen([collapsed], "alpha_req") is collapsed
    nearest = [point("a", step, measure=value, knn=1.0) for step, value in enumerate((0.2, 1.3, 1.9))]
    assert chosen(nearest, "alpha_req").step == 1


def test_refusals_name_the_field(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    made, other = run(tmp_path / "a", (1,)), run(tmp_path / "c", (1,), name="folder", root="elsewhere")
    for runs, changes, message in (
        ([], {}, r"runs=\[runs/digits\]"),
        ([tmp_path / "x*"], {}, r"runs: .*x\* "),
        ([tmp_path / "empty"], {}, r"runs=.*empty .*checkpoint"),
        ([made, other], {}, r"c has data\.name=folder.*a has digits"),
        ([made], {"images": 1}, "images=1"),
        ([made], {"draws": 0}, "draws=0"),
        ([made], {"output": ""}, "output=''"),
    ):
        invalid = config(tmp_path / "out", *runs)
        for name, value in changes.items():
            setattr(invalid, name, value)
        with pytest.raises(ConfigError, match=message) as caught:
            command(invalid)
        assert "\n" not in str(caught.value)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[DataConfig]:
    """Record which data is opened, and open the digits instead."""
    configs: list[DataConfig] = []

    def open_digits(data: DataConfig, bank_size: int, keep_unreadable: bool) -> Sources:
        configs.append(data)
        return load_source(DataConfig("digits"))

    monkeypatch.setattr("moco.evaluation.subject.open_sources", open_digits)
    return configs


HUB: dict[str, Any] = {"name": "huggingface", "root": "user/images", "image_column": "photo", "download": True}


def test_images_of_a_hub_are_fetched_only_if_the_person_names_them(tmp_path: Path, opened: list[DataConfig]) -> None:
    runs = [run(tmp_path / name, (1,), **HUB) for name in "ab"]
    with pytest.raises(ConfigError, match=r"user/images.*to use them, add data\.root=user/images"):
        choose(config(tmp_path / "out", *runs))
    assert opened == []
    choose(config(tmp_path / "out", *runs, labels=False, data=SubjectDataConfig(root="user/images")))
    assert opened == [DataConfig(**HUB | {"download": False})]


def test_given_data_replaces_that_of_the_runs(
    tmp_path: Path, opened: list[DataConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = run(tmp_path / "a", (1,), name="folder", root="one"), run(tmp_path / "b", (1,), name="folder", root="two")
    with pytest.raises(ConfigError, match=r"b has data\.root=two, but .*a has one"):
        choose(config(tmp_path / "out", *runs))
    choose(config(tmp_path / "out", *runs, labels=False, data=SubjectDataConfig(root="moved")))
    assert [(data.name, data.root) for data in opened] == [("folder", "moved")]
    assert re.search(r"next: python -m moco\.embed .*data\.root=moved", capsys.readouterr().out)
    with pytest.raises(ConfigError, match=r"data\.hold_out=0\.1"):
        command(config(tmp_path / "out", *runs, data=SubjectDataConfig(hold_out=0.1)))


@pytest.mark.parametrize("given", [{"name": "folder", "root": "moved"}, {"root": "moved"}, {"name": "digits"}])
def test_data_of_the_runs_is_not_compared_if_the_command_names_other_data(
    tmp_path: Path, opened: list[DataConfig], given: dict[str, Any]
) -> None:
    labels: dict[str, Any] = {"labels": "folder", "eval_root": "test"}
    runs = [
        run(tmp_path / "a", (1,), name="folder", root="one", **labels),
        run(tmp_path / "b", (1,), name="folder", root="two", more_roots=["three"]),
        run(tmp_path / "c", (1,), name="folder", root="one", label_file="labels.csv"),
    ]
    choose(config(tmp_path / "out", *runs, labels=False, data=SubjectDataConfig(**given)))
    [data] = opened
    assert (data.labels, data.eval_root, data.more_roots, data.label_file) == ("none", "", [], "")
    with pytest.raises(ConfigError, match=r"b has data\.root=two, but .*a has one"):
        choose(config(tmp_path / "out", *runs[:2], data=SubjectDataConfig(name="folder")))
    with pytest.raises(ConfigError, match=r"c has data\.eval_root='', but .*a has test"):
        choose(config(tmp_path / "out", runs[0], runs[2]))
    with pytest.raises(ConfigError, match=r"digits has data\.name=digits, but .*a has folder"):
        choose(config(tmp_path / "out", runs[0], run(tmp_path / "digits", (1,), name="digits")))


def test_several_labels_leave_the_measures_and_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"{i:02}.png" for i in range(8)]
    folder(tmp_path / "images", len(names))
    rows = [f"{name},{('a|b', 'a', 'b', '')[i % 4]},{'test' if i > 4 else 'train'}" for i, name in enumerate(names)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label,split", *rows]))
    table: dict[str, Any] = {"label_file": str(tmp_path / "labels.csv"), "label_separator": "|"}
    made = run(tmp_path / "a", (1, 2, 3), name="folder", root=str(tmp_path / "images"), workers=0, **table)
    points = choose(config(tmp_path / "out", made))
    assert [point.accuracies for point in points] == [{}] * 3
    text = capsys.readouterr().out
    assert "no accuracy is measured here; moco.knn and moco.linear measure the mAP" in text
    assert "next: python -m moco.embed" in text


def test_a_run_without_a_checkpoint_gets_no_command_that_is_refused(tmp_path: Path) -> None:
    made = tmp_path / "a"
    (made / "checkpoints").mkdir(parents=True)
    (made / "config.yaml").write_text("epochs: 3\n")
    with pytest.raises(ConfigError, match=r"runs=.*a has no checkpoint yet: run its command .*; or leave it out"):
        choose(config(tmp_path / "out", made))


def test_two_checkpoints_of_one_run_are_no_choice(tmp_path: Path) -> None:
    made = run(tmp_path / "a", (1, 2))
    with pytest.raises(ConfigError, match=r"a has only 2 checkpoints") as refused:
        choose(config(tmp_path / "out", made))
    kept = int(str(refused.value).partition("checkpoint.keep_epochs=")[2].partition(",")[0])
    epochs = read_encoder(tmp_path / "a" / "checkpoints" / "step_00000002.pt").config["epochs"]
    assert epochs // kept >= 3


def test_the_choice_is_printed_if_the_disk_becomes_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full_at(monkeypatch, "choose.json")
    with pytest.raises(WriteError, match=r"choose\.json cannot be written \(No space left on device\)"):
        choose(config(tmp_path / "out", run(tmp_path / "a", (1, 2, 3)), labels=False))
    assert "RankMe" in capsys.readouterr().out


def test_an_output_that_cannot_be_written_is_refused_before_the_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_at(monkeypatch, "check")
    with pytest.raises(ConfigError, match=r"^output=.*/out cannot be written to \(No space left .*: set output=DIR"):
        choose(config(tmp_path / "out", run(tmp_path / "a", (1, 2, 3))))
