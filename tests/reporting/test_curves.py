"""Charts: which metrics are drawn, and what remains of a long curve."""

import math

import numpy as np

from moco.reporting.curves import MOST_POINTS, Chart, Curve, Series, charts, figure, summary, thinned
from moco.reporting.page import Figures
from moco.reporting.plotly_figures import PALETTE

RUN: Series = {
    "train/loss": ([1, 10, 20], [6.0, math.nan, 4.0]),
    "train/chance": ([1, 10, 20], [6.2, 6.2, 6.2]),
    "train/contrast_accuracy": ([1, 10, 20], [0.5, 0.25, 0.75]),
    "train/momentum": ([1, 10, 20], [0.99, 0.99, 0.99]),
    "train/epoch": ([1, 10, 20], [0.1, 1.0, 2.0]),
    "analysis/effective_rank": ([10, 20], [30.0, 40.0]),
    "accuracy/knn": ([0, 20], [60.0, 75.0]),
    "accuracy/untrained": ([0, 20], [60.0, 60.0]),
    "accuracy/raw_pixels": ([0, 20], [64.0, 64.0]),
    "mine/new_measure": ([10, 20], [1.0, 2.0]),
}


def test_every_metric_is_drawn_or_listed_as_constant() -> None:
    drawn, single = charts({"run": RUN})
    assert [(each.title.partition(":")[0], each.metric) for each in drawn] == [
        ("Held-out kNN accuracy", "accuracy/knn"),
        ("Loss", "train/loss"),
        ("Contrast accuracy", "train/contrast_accuracy"),
        ("Effective rank of the features (higher", "analysis/effective_rank"),
        ("New measure", "mine/new_measure"),
    ]
    assert single == {"Constant": ["Momentum of the key encoder: 0.99"]}
    assert [(curve.name, curve.reference) for curve in drawn[0].curves] == [
        ("knn", False),
        ("untrained", True),
        ("raw pixels", True),
    ]
    assert [curve.name for curve in drawn[1].curves] == ["loss", "chance"]
    assert drawn[2].curves[0].y == [50.0, 25.0, 75.0]  # percent


def test_a_value_of_a_single_record_is_not_called_constant() -> None:
    single: Series = {
        "train/lr": ([1, 2], [0.03, 0.03]),
        "analysis/spread": ([1], [0.5]),
        "analysis/top_share": ([1], [0.25]),
        "analysis/key_drift": ([1, 2], [math.nan]),
    }
    expected = {
        "Constant": ["Learning rate: 0.03"],
        "Measured once": ["Spread (1 uniform, 0 one point): 0.5", "Gradient share of the 10 hardest negatives: 25 %"],
        "Not measured": ["Change of queue keys since they were computed (0: none)"],
    }
    for runs in ({"run": single}, {"run": single, "other": single}):
        assert charts(runs) == ([], expected)


def test_runs_share_a_chart_and_differ_in_color() -> None:
    other: Series = {"train/loss": ([1, 5], [6.0, 3.0]), "train/momentum": ([1, 5], [0.9, 0.9])}
    drawn, single = charts({"one": RUN, "two": other})
    loss = next(each for each in drawn if each.title == "Loss")
    assert [(curve.name, curve.run) for curve in loss.curves] == [("one", 0), ("one, chance", 0), ("two", 1)]
    assert single == {}  # the two momentums differ
    lines = [trace["line"] for trace in figure(loss, "epoch")["data"]]
    assert [line["color"] for line in lines] == [PALETTE[0], PALETTE[0], PALETTE[1]]
    assert [line["dash"] for line in lines] == ["solid", "dash", "solid"]
    assert [trace["showlegend"] for trace in figure(loss, "epoch")["data"]] == [True, False, True]


def test_accuracies_of_different_kinds_have_charts_of_their_own() -> None:
    kinds = {"accuracy/knn": {"one": ", 1 label per class", "two": " (k 180)", "three": " (k 180)"}}
    drawn, _ = charts({"one": RUN, "two": RUN, "three": RUN}, kinds)
    shown = [(each.title, [(c.name, c.run) for c in each.curves if not c.reference]) for each in drawn[:3]]
    assert shown == [
        ("Held-out kNN accuracy, 1 label per class", [("one", 0)]),
        ("Held-out kNN accuracy (k 180)", [("two", 1), ("three", 2)]),
        ("Loss", [("one", 0), ("two", 1), ("three", 2)]),
    ]


def test_a_figure_has_no_value_for_nan() -> None:
    drawn, _ = charts({"run": RUN})
    made = figure(drawn[1], "epoch")
    assert made["data"][0]["x"] == [1, 10, 20]
    assert made["data"][0]["y"] == [6.0, None, 4.0]
    assert made["layout"]["xaxis"]["title"]["text"] == "epoch"
    assert "template" not in made["layout"]


def test_thinning_keeps_every_spike() -> None:
    rng = np.random.default_rng(0)
    x, y = list(range(100_000)), rng.normal(size=100_000).tolist()
    y[33_333], y[70_001], y[5] = 99.0, -99.0, math.nan
    kept_x, kept_y = thinned(x, y)
    assert len(kept_x) <= MOST_POINTS
    assert list(kept_x) == sorted(set(kept_x))
    assert [y[int(at)] for at in kept_x] == list(kept_y)
    assert max(kept_y) == 99.0
    assert min(kept_y) == -99.0
    assert thinned(x[:MOST_POINTS], y[:MOST_POINTS])[0] == x[:MOST_POINTS]
    assert len(thinned(x, [math.nan] * len(x))[0]) == MOST_POINTS // 2  # gaps stay gaps


def test_a_chart_has_a_summary_and_a_table() -> None:
    chart = Chart("Loss <x>", "nats", [Curve("loss", [0, 1, 2], [5.0, 2.0, math.nan]), Curve("chance", [0], [6.0])])
    assert summary(chart) == "loss from 5 to 2, lowest 2, highest 5; chance 6 (nats)"
    made = Figures().add_chart(chart, "epoch")
    assert 'role="img" aria-label="Loss &lt;x&gt;: loss from 5 to 2' in made
    assert "<td>5</td><td>6</td>" in made
    assert "<td>–</td><td>–</td>" in made
    assert "<x>" not in made
