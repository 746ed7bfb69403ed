"""The report of a run without labels: its retrieval, and the next commands."""

import json
import re
from pathlib import Path

import pytest

from moco.reporting.report import report
from tests.reporting.runs import images, run
from tests.reporting.test_report import config, page


def test_the_retrieval_of_a_run_without_labels_is_not_called_an_accuracy(tmp_path: Path) -> None:
    labeled = run(tmp_path / "run", images(tmp_path / "train", 6), images(tmp_path / "test", 5))
    made = run(tmp_path / "unlabeled", images(tmp_path / "all", count=14))
    with (made / "metrics.jsonl").open("a") as file:
        for step, value in ((0, 20.0), (20, 45.5)):
            values = {"retrieval/retrieval": value, "retrieval/untrained": 20.0, "retrieval/raw_pixels": 10.0}
            file.write(json.dumps({"step": step, **values}) + "\n")
    for compare, rows in (((), 0), ((labeled,), 4)):
        report(config(made, *compare, pictures=0, output=str(tmp_path / "report.html")))
        markup, _ = page(tmp_path / "report.html")
        overview = dict(re.findall(r'<th scope="row">(.*?)</th>\s*<td>(.*?)</td>', markup.split('id="s1"')[0], re.S))
        assert overview["kind of retrieval"].startswith("two crops of an image find each other")
        assert (overview["retrieval, untrained"], overview["retrieval, last"]) == ("20.0 %", "45.5 %")
        assert sum("accuracy" in name for name in overview) == rows  # of the other run
        assert "Two crops of an image find each other" in markup


def test_the_next_commands_leave_out_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = run(tmp_path / "run", images(tmp_path / "all", count=14))
    proposed = []
    for there in ("", "features.npy", "search/nearest.json"):
        (made / "features" / there).parent.mkdir(parents=True, exist_ok=True)
        if there:
            (made / "features" / there).touch()
            (made / "features" / "features.json").write_text('{"encoder": {"step": 20}}')
        report(config(made, pictures=0, projector=False))
        proposed.append(re.findall(r"^next: python -m (\S+)", capsys.readouterr().out, re.MULTILINE))
    assert proposed == [["moco.embed", "moco.search"], ["moco.search"], []]
    assert "To look at the encoder" not in (made / "report.html").read_text()
