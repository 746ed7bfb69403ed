"""Reports: finished and unfinished runs, with and without labels, one and two runs; refused input."""

import base64
import csv
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moco.config import ConfigError
from moco.config.data import SubjectDataConfig
from moco.config.report import ReportConfig, check_report
from moco.reporting.report import report
from moco.reporting.run_record import findings, open_run
from moco.runs import checkpoint
from tests.full_disk import full_at
from tests.reporting.runs import EVIL, images, run


def config(*runs: Path, **changes: Any) -> ReportConfig:
    values: dict[str, Any] = {"device": "cpu", "pictures": 12, "queries": 2, "neighbours": 3, "projector": False}
    made = ReportConfig(run=str(runs[0]), compare=[str(each) for each in runs[1:]], **(values | changes))
    check_report(made)
    return made


def page(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the markup before the scripts, and the figures."""
    text = path.read_text()
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text)
    assert found is not None
    return text[: found.start()], json.loads(found[1])


@pytest.fixture
def labeled(tmp_path: Path) -> Path:
    return run(tmp_path / "run", images(tmp_path / "train", 6), images(tmp_path / "test", 5))


def test_predictions_and_losses_of_a_training_are_part_of_the_page(labeled: Path) -> None:
    """Only files of moco.segment or moco.detect below the run are shown: results.json may come from others."""
    content = b"\x89PNG\r\n\x1a\n" + b"boxes"
    losses = "".join(json.dumps({"step": step, "train/loss": 1 / step, "train/lr": 0.1}) + "\n" for step in (1, 2, 4))
    places = {"detect": "inside", "knn": "other"}
    for command, name in places.items():
        (labeled / command / name).mkdir(parents=True)
        (labeled / command / name / "predictions.png").write_bytes(content)
        (labeled / command / name / "training.jsonl").write_text(losses)
    outside = labeled.parent / "away"
    outside.mkdir()
    (outside / "predictions.png").write_bytes(content + b"secret")
    (outside / "training.jsonl").write_text(losses)
    entry = {
        "protocol": "retinanet, 9 steps",
        "step": 20,
        "figures": {"AP": 12.34, "AP_half_width95": 1.5, "AP50": 33.3},
    }
    entries = [
        entry | {"command": "detect", "encoder": "pretrained", "saved": "/gone/detect/inside"},
        entry | {"command": "detect", "encoder": "untrained", "saved": str(outside)},
        entry | {"command": "knn", "encoder": "pretrained", "saved": str(labeled / "knn/other")},
    ]
    (labeled / "results.json").write_text(json.dumps(entries))
    report(config(labeled))
    markup, figures = page(labeled / "report.html")
    assert "AP 12.3 ± 1.5 (95 % over seeds)" in markup
    assert "Loss of detect, retinanet, 9 steps" in markup
    assert "Loss of knn" not in markup
    assert [each["x"] for each in figures["charts"]["chart-0"]["data"]] == [[1, 2, 4]]
    assert [each["y"] for each in figures["charts"]["chart-0"]["data"]] == [[1, 0.5, 0.25]]
    assert "AP50 33.3" in markup
    assert markup.count(base64.b64encode(content).decode()) == 1
    assert "Predictions and ground truth" in markup
    assert base64.b64encode(content + b"secret").decode() not in markup


def test_a_labeled_run(labeled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (labeled / "views.png").write_bytes(b"\x89PNG views")
    entry = {"command": "knn", "protocol": "all labels", "encoder": "pretrained", "step": 20, "settings": {}}
    older = {**entry, "figures": {"top1": 11.1}, "time": "2026-01-01T00:00:00+00:00"}
    newer = {**entry, "figures": {"top1": 66.6, "interval95": [60.0, 70.0], "mAP": 12.34}, "commit": "abc123"}
    (labeled / "results.json").write_text(json.dumps([older, newer]))
    report(config(labeled))
    markup, figures = page(labeled / "report.html")
    for text in (
        "finished: 2 epochs, 20 steps",
        "18 training images",
        "0:01:01",
        "40.0 % ± 2.0",
        "55.5 % ± 1.0 (+15.5 over untrained)",
        "66.6 (60.0 – 70.0, 95 %)",
        "mAP 12.34",
        "abc123",
        "moco 0.1.0, torch 2.12.0",
        "Constant: ",
        "of the 6 neighbors below have their query&#39;s label",
        "queue_size: 16",
        'src="data:image/png;base64,iVBORyB2aWV3cw==',
    ):
        assert text in markup, text
    assert "11.1" not in markup  # an older result of the same evaluation
    assert [int(level) for level in re.findall(r"<h(\d)", markup)][:3] == [1, 2, 2]
    levels = [int(level) for level in re.findall(r"<h(\d)", markup)]
    assert all(after <= before + 1 for before, after in pairwise(levels))  # no level is skipped
    assert "<img" in markup
    assert re.findall(r'aria-labelledby="(\w+)"', markup) == re.findall(r'<h2 id="(\w+)"', markup)
    assert all(re.search(r'alt=["\'][^"\']', each) for each in re.findall(r"<img[^>]*>", markup))
    assert len(re.findall(r'<figure class="chart">', markup)) == len(figures["charts"])
    assert "Effective rank" in markup
    [drawn] = figures["maps"].values()
    assert len(drawn["x"]) == 12
    assert set(drawn["groups"]["label"]) <= {"blue", "green", "red"}
    assert len(figures["images"]) == 12
    assert "finished: 2 epochs" in capsys.readouterr().out


def test_file_names_never_become_markup(labeled: Path) -> None:
    report(config(labeled, pictures=99, queries=15))  # all fifteen held-out images
    markup, figures = page(labeled / "report.html")
    assert "<script" not in markup
    assert "&lt;script&gt;" in markup
    [drawn] = figures["maps"].values()
    assert f"red/{EVIL}" in drawn["names"]
    text = (labeled / "report.html").read_text()
    assert text.count("<script>") == 2  # plotly's and the page's
    assert "unsafe-eval" not in text.split("<style>")[0]
    assert not re.search(r'(src|href)="(https?:)?//', text.split("<script>")[0])


def test_an_unfinished_run_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = run(tmp_path / "run", images(tmp_path / "all", count=14), epochs=4, done=16)
    report(config(made, clusters=3))
    markup, figures = page(made / "report.html")
    assert "not finished: step 16 of 40 (epoch 1.6 of 4)" in markup
    assert "12 of 14 training images, t-SNE" in markup
    assert "accuracy" not in markup.split('id="s1"')[0]
    assert "label" not in markup[markup.index("Nearest neighbors</h2>") : markup.index("Map</h2>")].replace(
        "aria-label", ""
    )
    [drawn] = figures["maps"].values()
    assert list(drawn["groups"]) == ["cluster"]
    assert set(drawn["groups"]["cluster"]) == {"cluster 1", "cluster 2", "cluster 3"}
    assert "run the same command again after more training" in capsys.readouterr().out


def test_a_query_is_not_its_own_neighbor(tmp_path: Path) -> None:
    made = run(tmp_path / "run", images(tmp_path / "all", count=8))
    report(config(made, queries=8, neighbours=7, map="none"))
    markup, _ = page(made / "report.html")
    shown = [
        re.findall(r'<figure(?: class="mark")? title="([^"]*)"', each)
        for each in markup.split('<div class="query">')[1:]
    ]
    assert len(shown) == 8
    assert all(len(each) == len(set(each)) == 8 for each in shown)  # the query and the seven others


def test_before_the_first_checkpoint(tmp_path: Path) -> None:
    made = run(tmp_path / "run", tmp_path / "nowhere", saved=False, done=8)
    report(config(made))
    markup, figures = page(made / "report.html")
    assert "the run has no checkpoint yet" in markup
    assert "not finished: step 8 of 20" in markup
    assert figures["maps"] == {}
    assert figures["charts"]


def test_two_runs_side_by_side(labeled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = run(tmp_path / "other", tmp_path / "train", tmp_path / "test", momentum=0.5, temperature=0.3)
    report(config(labeled, other, output=str(tmp_path / "both.html")))
    markup, figures = page(tmp_path / "both.html")
    differ = markup[markup.index("Settings that differ</caption>") :].split("</table>")[0]
    assert re.findall(r'<th scope="row">(.*?)</th>', differ) == ["method.momentum", "method.temperature"]
    assert "<td>0.5</td>" in differ
    assert "Run run</h2>" in markup
    assert "Run other</h2>" in markup
    assert "Momentum too low." in markup  # a finding of the training doctor for the second run
    assert "method.momentum=0.9" in markup  # the run is short
    assert "method.momentum=0.9" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert len(figures["maps"]) == 2
    assert len(figures["images"]) == 12  # both maps show the same images: each is stored once
    loss = next(each for each in figures["charts"].values() if any(trace["name"] == "other" for trace in each["data"]))
    assert {trace["name"] for trace in loss["data"]} >= {"run", "other"}


def test_accuracies_on_other_images_have_another_chart(labeled: Path, tmp_path: Path) -> None:
    others = [run(tmp_path / "same", tmp_path / "train", tmp_path / "test")]
    others += [run(tmp_path / "other", images(tmp_path / "a", 6), images(tmp_path / "b", 6))]
    for compare, titles in ((others[:1], [""]), (others, ["train, held out: *test", "a, held out: *b"])):
        report(config(labeled, *compare, output=str(tmp_path / "all.html"), pictures=0))
        found = re.findall(r">(Held-out kNN accuracy[^<]*)<", page(tmp_path / "all.html")[0])
        shown = list(dict.fromkeys(each.replace(f"{tmp_path}/", "*") for each in found))
        ends = [f", on folder *{title}" * bool(title) for title in titles]
        assert shown == [f"Held-out kNN accuracy (k 200, or all references if fewer){end}" for end in ends]


def test_a_vit_shows_its_attention(tmp_path: Path) -> None:
    made = run(tmp_path / "run", images(tmp_path / "all", count=6), backbone="vit")
    report(config(made, map="none"))
    markup, _ = page(made / "report.html")
    assert "\N{REPLACEMENT CHARACTER}" not in markup
    section = markup[markup.index("Attention</h2>") :]
    assert "class token to the 16 patches" in section
    assert "would be 6.2&nbsp;% per patch" in section
    assert re.search(r"all patches together receive \d\d&nbsp;%", section)
    assert len(re.findall(r"at most \d+\.\d % on a patch", section)) == 2


def test_nonfinite_features_leave_the_other_sections(tmp_path: Path) -> None:
    made = run(tmp_path / "run", images(tmp_path / "all", count=6))
    [file] = checkpoint.list_checkpoints(made / "checkpoints")
    state = checkpoint.load(file)
    for name, value in state["method"].items():
        if name.endswith("running_var"):
            value.fill_(1e-38)
        elif "encoder.backbone" in name and value.is_floating_point():
            value.fill_(3e38)
    checkpoint.save(made / "checkpoints", 20, state, keep_last=1)
    report(config(made))
    assert "training diverged" in page(made / "report.html")[0]


def test_the_projector_gets_features_names_and_images(labeled: Path) -> None:
    report(config(labeled, projector=True))
    folder = labeled / "projector"
    index = (folder / "projector_config.pbtxt").read_text()
    assert 'tensor_path: "00020/backbone/tensors.tsv"' in index
    assert index.count("embeddings {") == 1
    [tensors] = folder.rglob("tensors.tsv")
    [metadata] = folder.rglob("metadata.tsv")
    [sprite] = folder.rglob("sprite.png")
    with metadata.open(newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    assert rows[0] == ["name", "label", "cluster"]
    assert len(rows) == 13
    assert all(row[0].startswith(f"{row[1]}/") for row in rows[1:])
    assert len(tensors.read_text().splitlines()) == 12
    assert Image.open(sprite).size == (4 * 64, 4 * 64)
    report(config(labeled, projector=True))  # replaces the first
    assert (folder / "projector_config.pbtxt").read_text().count("embeddings {") == 1


def test_unreadable_images_are_left_out(tmp_path: Path) -> None:
    root = images(tmp_path / "all", count=10)
    made = run(tmp_path / "run", root)
    (root / "3.png").write_bytes(b"no image")
    report(config(made))
    markup, figures = page(made / "report.html")
    assert "Unreadable images, not shown: 1." in markup
    assert "3.png" not in next(iter(figures["maps"].values()))["names"]


def test_moved_or_missing_images(tmp_path: Path) -> None:
    made = run(tmp_path / "run", tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"data\.root=DIR.*pictures=0"):
        report(config(made))
    report(config(made, pictures=0))
    assert "Not shown: pictures=0." in page(made / "report.html")[0]
    moved = images(tmp_path / "moved", count=6)
    report(config(made, data=SubjectDataConfig(root=str(moved))))
    assert "6 training images" in page(made / "report.html")[0]
    assert f"output={made}/features data.root={moved}" in page(made / "report.html")[0]


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda run: (run / "config.yaml").write_text("a: ["), r"config\.yaml is damaged"),
        (lambda run: (run / "config.yaml").unlink(), r"no config\.yaml"),
        (lambda run: (run / "metrics.jsonl").unlink(), "has no checkpoint yet: run its command"),
        (lambda run: (run / "results.json").write_text("{}"), r"results\.json is damaged \(not a list of entries\)"),
        (lambda run: (run / "results.json").write_text("["), r"results\.json is damaged .*: move it"),
        (shutil.rmtree, r"run=.*run does not exist"),
    ],
)
def test_a_damaged_or_missing_run_is_refused(tmp_path: Path, damage: Any, match: str) -> None:
    made = run(tmp_path / "run", tmp_path / "nowhere", saved=False)
    damage(made)
    with pytest.raises(ConfigError, match=match):
        report(config(made))
    assert not (made / "report.html").exists()


def test_a_damaged_checkpoint_is_replaced_by_the_previous_one(tmp_path: Path) -> None:
    made = run(tmp_path / "run", tmp_path / "nowhere", done=10)
    newest = made / "checkpoints" / "step_00000020.pt"
    newest.write_bytes(b"half")
    with pytest.warns(UserWarning, match="using the previous checkpoint"):
        opened = open_run(made)
    assert opened.checkpoint == made / "checkpoints" / "step_00000010.pt"
    (made / "checkpoints" / "step_00000010.pt").write_bytes(b"half")
    with (
        pytest.warns(UserWarning, match="using the previous"),
        pytest.raises(ConfigError, match="none of its 2 checkpoints"),
    ):
        open_run(made)


def test_a_truncated_record_is_left_out(tmp_path: Path) -> None:
    made = run(tmp_path / "run", tmp_path / "nowhere", saved=False, done=8)
    with (made / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "train/lo')
    opened = open_run(made)
    assert opened.step == 8
    assert opened.values["train/gradient_norm"][1][1] != opened.values["train/gradient_norm"][1][1]  # null: nan
    assert [each.name for each in findings(opened)] == ["momentum too high"]


@pytest.mark.parametrize("pictures", [0, 12])
def test_the_number_of_training_images_is_that_of_the_training(labeled: Path, pictures: int) -> None:
    report(config(labeled, pictures=pictures))
    markup, _ = page(labeled / "report.html")
    assert "43 training images" in markup
    assert "43 images are too few" in markup


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"run": ""}, "run=''"),
        ({"run": "a", "compare": ["a"]}, "compare=.*a"),
        ({"run": "a", "map": "pca"}, "map='pca'.*tsne, umap, none"),
        ({"run": "a", "perplexity": 0.5}, r"perplexity=0\.5"),
        ({"run": "a", "neighbours": 0}, "neighbours=0"),
        ({"run": "a", "pictures": -1}, "pictures=-1"),
        ({"run": "a", "seed": -1}, "seed=-1"),
    ],
)
def test_an_invalid_configuration_is_refused(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        check_report(ReportConfig(**fields))


def test_invalid_data_and_outputs_are_refused(tmp_path: Path) -> None:
    made = run(tmp_path / "run", images(tmp_path / "all", count=6))
    with pytest.raises(ConfigError, match=r"data\.name=webdataset.*pictures=0"):
        report(config(made, data=SubjectDataConfig(name="webdataset", root="a.tar")))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"output=.*cannot be written"):
        report(config(made, output=str(tmp_path / "file" / "page.html"), pictures=0))
    with pytest.raises(ConfigError, match=r"output=.* is a folder"):
        report(config(made, output=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"output=.*\.pdf does not end in \.html"):
        report(config(made, output=str(tmp_path / "report.pdf")))


def test_the_message_about_a_folder_of_runs_names_the_field(tmp_path: Path) -> None:
    inside = tmp_path / "runs" / "a"
    (inside / "checkpoints").mkdir(parents=True)
    (inside / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=rf"^compare=.*/metrics\.jsonl is a file: set 'compare=\[{inside}\]'$"):
        open_run(inside / "metrics.jsonl", "compare")
    with pytest.raises(ConfigError, match=rf"^compare=.*/runs is a folder of runs: .*, 'compare=\[{inside}\]'$"):
        open_run(inside.parent, "compare")


def test_a_map_is_deterministic(labeled: Path) -> None:
    found = []
    for _ in range(2):
        report(config(labeled))
        found.append(page(labeled / "report.html")[1]["maps"])
    assert found[0] == found[1]


def test_the_findings_are_printed_if_the_disk_becomes_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run(tmp_path / "run", images(tmp_path / "all", count=6))
    full_at(monkeypatch, "report.html")
    with pytest.raises(ConfigError, match=r"^output=.*report\.html cannot be written \(No space left on device\)"):
        report(config(made, pictures=0))
    printed = capsys.readouterr().out
    assert "doctor" in printed
    assert "page" not in printed
