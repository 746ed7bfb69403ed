"""Choosing without labels: measures by hand, agreement on made-up orders, what is refused."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from moco.analysis import alpha_req, rank_me, uniformity
from moco.analysis.studies.choose import JUDGES, MEASURES, Point, agreements, choose, taken
from moco.choose import choose as command
from moco.config import AugmentConfig, ConfigError, DataConfig, MethodConfig, ModelConfig, TrainConfig
from moco.config.choose import ChooseConfig
from moco.data.sources import limited, load_source
from moco.evaluation.features import extract
from moco.interop.encoder_file import build, read_encoder
from moco.methods.build import build_method
from moco.runs import checkpoint

AUGMENT = AugmentConfig(size=16, crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0], mean=[0.5] * 3, std=[0.5] * 3)


def run(path: Path, steps: tuple[int, ...] = (1, 2), seed: int = 0, **data: Any) -> Path:
    """A run's checkpoints with random weights, others at each step."""
    model = ModelConfig(backbone="convnet", options={"width": 4}, dim=8, bn="batch")
    told = TrainConfig(
        run=str(path),
        seed=seed,
        data=DataConfig(**data),
        augment=AUGMENT,
        model=model,
        method=MethodConfig(queue_size=16),
    )
    for step in steps:
        torch.manual_seed(100 * seed + step)
        method = build_method(told).state_dict()
        checkpoint.save(path / "checkpoints", step, {"config": asdict(told), "step": step, "method": method}, 9)
    return path


def config(output: Path, *runs: str | Path, **changes: Any) -> ChooseConfig:
    values: dict[str, Any] = {"images": 50, "draws": 3, "device": "cpu"} | changes
    return ChooseConfig(runs=[str(each) for each in runs], output=str(output), **values)


def test_the_measures_are_those_of_the_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = run(tmp_path / "a"), run(tmp_path / "b", (4,), seed=1)
    points = choose(config(tmp_path / "out", tmp_path / "[ab]", first))  # a pattern; and one of them again
    assert [(point.run, point.step) for point in points] == [(str(first), 1), (str(first), 2), (str(second), 4)]
    pictures = limited(load_source("digits").train, 50)
    for point in points:
        encoder = build(read_encoder(Path(point.file)))
        features = extract(encoder.backbone, pictures, 16, 0, [0.5] * 3, [0.5] * 3, torch.device("cpu"))
        projected = encoder.head(features)
        assert point.measures["rank_me"] == pytest.approx(rank_me(features).item(), rel=1e-5)
        assert point.measures["rank_me_projection"] == pytest.approx(rank_me(projected).item(), rel=1e-5)
        assert point.measures["alpha_req"] == pytest.approx(alpha_req(features).item(), rel=1e-4)
        assert point.measures["uniformity"] == pytest.approx(uniformity(features).item(), rel=1e-4)
        assert point.measures["sum"] == point.measures["alignment"] + point.measures["uniformity"]
        assert set(point.subject) == set(JUDGES)
        assert all(10 < value < 100 for value in point.subject.values())  # random features tell some digits apart
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["checkpoints"][1]["measures"] == points[1].measures
    assert written["taken"]["rank_me"] == taken(points, "rank_me").file
    assert written["agreement"]["rank_me"]["knn"]["within"] is None  # no run has three checkpoints
    said = capsys.readouterr().out
    assert "agreement with few-label kNN" in said
    assert f"python -m moco.knn checkpoint={taken(points, 'rank_me').file}" in said


def test_labels_that_are_not_to_be_looked_at_change_no_measure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run(tmp_path / "a")
    without = choose(config(tmp_path / "out", made, labels=False))
    assert [point.subject for point in without] == [{}, {}]
    assert "agreement" not in capsys.readouterr().out
    assert [point.measures for point in choose(config(tmp_path / "out", made))] == [point.measures for point in without]


def point(name: str, step: int, measure: float, knn: float) -> Point:
    return Point(name, f"{name}/{step}", step, dict.fromkeys(MEASURES, measure), dict.fromkeys(JUDGES, knn))


def test_agreement_is_spearmans_and_what_is_lost_counts_in_points() -> None:
    rising = [point("a", step, measure=step, knn=60 + step) for step in (1, 2, 3)]
    falling = [point("b", step, measure=10 + step, knn=50 - step) for step in (1, 2, 3)]
    third = [point("c", step, measure=-step, knn=40) for step in (1, 2, 3)]  # all alike: no order to agree with
    found = agreements([*rising, *falling, *third])["rank_me"]["knn"]
    assert found.within == pytest.approx(0)  # the mean of 1 and -1
    assert found.across == pytest.approx(0.5)  # 3, 13, -3 against 63, 47, 40
    assert found.lost_within == pytest.approx(2 / 3)  # 0, 2 and 0
    assert found.lost_across == pytest.approx(63 - 47)
    assert found.lost_everything == pytest.approx(63 - 47)  # of b the highest measure, step 3
    assert found.everything is not None
    assert agreements([*rising, *falling, *third])["uniformity"]["knn"].within == pytest.approx(0)  # lower is better
    assert agreements(rising)["uniformity"]["probe"].within == pytest.approx(-1)
    equal = [point("a", 1, measure=1, knn=60), point("b", 1, measure=1, knn=70)]
    assert agreements(equal)["rank_me"]["knn"].lost_across == pytest.approx(5)  # no reason for one of the two
    assert agreements([Point("a", "f", 1, dict.fromkeys(MEASURES, 1.0), {})]) == {}


def test_a_collapse_is_never_taken_before_others() -> None:
    collapsed = point("a", 1, measure=math.nan, knn=10.0)
    assert taken([collapsed, point("a", 2, measure=0.5, knn=70.0)], "alpha_req").step == 2
    assert taken([collapsed], "alpha_req") is collapsed
    nearest = [point("a", step, measure=value, knn=1.0) for step, value in enumerate((0.2, 1.3, 1.9))]
    assert taken(nearest, "alpha_req").step == 1


def test_what_cannot_run_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    made, other = run(tmp_path / "a", (1,)), run(tmp_path / "c", (1,), name="folder", root="elsewhere")
    for runs, changes, said in (
        ([], {}, r"say which runs: runs=\[runs/digits\]"),
        ([tmp_path / "x*"], {}, r"runs: .*x\* names no directory"),
        ([tmp_path / "empty"], {}, "empty holds no checkpoint"),
        ([made, other], {}, r"c has data\.name=folder, .*a another"),
        ([made], {"images": 1}, "images=1 must be at least 2"),
        ([made], {"draws": 0}, "draws=0 must be at least 1"),
        ([made], {"output": ""}, "output='' must name a directory"),
    ):
        told = config(tmp_path / "out", *runs)
        for name, value in changes.items():
            setattr(told, name, value)
        with pytest.raises(ConfigError, match=said) as caught:
            command(told)
        assert "\n" not in str(caught.value)
