"""The arithmetic of the benchmarks: turns, medians, ratios. Times themselves are not tested.

Each comparison also runs once in its smallest form.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.bench import start, views
from scripts.bench.__main__ import COMPARISONS, NEEDS_DATA, as_markdown, parsed
from scripts.bench.timing import CLOCKS, alternate, compared, stream_rate


def test_variants_take_turns_after_a_warm_up_round() -> None:
    calls: list[str] = []

    def form(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    figures = alternate({"a": lambda: form("a"), "b": lambda: form("b")}, rounds=2)
    assert calls == ["a", "b"] * 3
    assert figures == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_a_table_has_the_median_ratio_of_the_rounds() -> None:
    figures = {"one": [1.0, 2.0, 100.0], "other": [3.0, 4.0, 100.0]}
    assert compared("t", figures, "images/s").rows == [
        ["one", "2", "1.5 – 51", "1.00"],
        ["other", "4", "3.5 – 52", "2.00"],
    ]
    assert [row[3] for row in compared("t", figures, "ms", less_is_faster=True).rows] == ["1.00", "0.50"]
    assert as_markdown(compared("t", figures, "ms")).splitlines()[2] == "|  | ms | quartiles | × the first |"


@pytest.mark.parametrize(("clock", "counted"), [("wall", 3), ("processor", 4)])
def test_the_wall_clock_of_a_stream_starts_at_its_first_batch(
    clock: str, counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setitem(CLOCKS, clock, lambda: now[0])

    def opened() -> Iterator[None]:
        for _ in range(4):
            now[0] += 1
            yield

    expected = 8 * counted / (3 if clock == "wall" else 4)
    assert stream_rate(opened, 8, clock) == expected


@pytest.mark.parametrize("name", COMPARISONS)
def test_each_comparison_lists_its_arguments(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed([name, "--help"])
    assert ended.value.code == 0
    assert "--markdown" in capsys.readouterr().out


SMALLEST = {  # arguments, and the number of rows of the first table
    "views": ("--batches 2", 2),
    "streamed": ("--workers 1 --passes 1 --batch 4", 5),
    "augment": ("--batch 1", 2),
    "decode": ("--sides 80 --images 1", 2),
    "info_nce": ("--sizes 2 --task step", 2),
    "step": ("--batch 32 --queue 32", 2),
    "overhead": ("--batch 32 --queue 32", 2),
    "measures": ("--queue", 1),
    "peer": ("--batch 32 --batches 2 --queue 32", 2),
    "start": ("", 1),
}


@pytest.mark.parametrize("name", SMALLEST)
@pytest.mark.long
def test_each_comparison_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to its first table, each variant once and without a warm-up round."""
    if name == "peer":
        pytest.importorskip("lightly", reason="the comparison with lightly needs it: pip install lightly")
    arguments, rows = SMALLEST[name]
    if name in NEEDS_DATA:
        noise = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
        (tmp_path / "class").mkdir()
        for i, image in enumerate(noise):
            Image.fromarray(image).save(tmp_path / "class" / f"{i}.jpg")
        arguments += f" --data {tmp_path}"
    options = parsed([name, *arguments.split()])

    def once(forms: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
        return {title: [form()] for title, form in forms.items()}

    monkeypatch.setattr(COMPARISONS[name], "alternate", once)
    monkeypatch.setattr(start, "COMMANDS", {"nothing": ["-c", ""]})
    monkeypatch.setattr(views, "BATCH", 4)
    table = next(COMPARISONS[name].run(options))
    assert len(table.rows) >= rows
    assert all(len(row) == len(table.columns) for row in table.rows)
