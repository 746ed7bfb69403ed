"""The map: neighbors stay neighbors, groups match the legend, and every point keeps its image."""

import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from moco.config import ConfigError
from moco.reporting.image_map import Map, clusters, coordinates, figure
from moco.reporting.page import Figures


def blobs(per: int = 20) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return features in three noisy directions with random lengths, and the direction of each."""
    rng = np.random.default_rng(0)
    truth = np.arange(3 * per) % 3
    features = np.eye(8)[truth] + 0.05 * rng.normal(size=(3 * per, 8))
    return (features * rng.uniform(0.1, 10, (3 * per, 1))).astype(np.float32), truth


def test_a_map_keeps_neighbors_and_is_deterministic() -> None:
    features, truth = blobs()
    placed = coordinates(features, "tsne", 30, 3)
    assert placed.shape == (60, 2)
    distance = np.linalg.norm(placed[:, None] - placed[None], axis=2) + 1e9 * np.eye(60)
    assert (truth[distance.argmin(axis=1)] == truth).all()
    np.testing.assert_array_equal(placed, coordinates(features, "tsne", 30, 3))
    assert coordinates(features[:5], "tsne", 30, 3).shape == (5, 2)  # few images limit the perplexity


def test_a_missing_umap_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    features, _ = blobs()
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ConfigError, match=r"pip install umap-learn .*, or set map=tsne"):
        coordinates(features, "umap", 10, 0)


def test_clusters_follow_direction_and_are_sorted_by_size() -> None:
    features, truth = blobs()
    keep = np.flatnonzero((truth != 2) | (np.arange(60) < 30))  # the last direction has fewer
    found = clusters(features[keep], 3, 0)
    for direction in range(3):
        assert len(set(found[truth[keep] == direction])) == 1
    sizes = np.bincount(found)
    assert list(sizes) == sorted(sizes, reverse=True)
    assert set(clusters(np.ones((6, 2), np.float32), 4, 0)) == {0}  # equal features: one cluster


def made(groups: list[str]) -> Map:
    count = len(groups)
    places = np.stack([np.arange(count), np.arange(count) ** 2], axis=1).astype(float)
    names = [f"<b>{i}\n" for i in range(count)]
    return Map("9 <i>images", places, names, {"label": groups, "cluster": ["c"] * count})


def test_every_point_is_in_one_trace() -> None:
    each = figure(made(list("abcabcaab")), list(range(9))[::-1])
    traces = each["colorings"]["label"]["traces"]
    assert [trace["name"] for trace in traces] == ["a", "b", "c"]
    assert sorted(i for trace in traces for i in trace["customdata"]) == list(range(9))
    for trace in traces:
        assert trace["x"] == [each["x"][i] for i in trace["customdata"]]
        assert trace["y"] == [each["y"][i] for i in trace["customdata"]]
        assert {each["groups"]["label"][i] for i in trace["customdata"]} == {trace["name"]}
    legend = each["colorings"]["label"]["legend"]
    assert [(entry["name"], entry["count"]) for entry in legend] == [("a", 4), ("b", 3), ("c", 2)]
    assert [entry["color"] for entry in legend] == [trace["marker"]["color"] for trace in traces]
    assert each["images"] == list(range(9))[::-1]
    assert each["names"][0] == "<b>0\N{REPLACEMENT CHARACTER}"  # text; the script inserts it as text


def test_a_map_shows_the_thirty_largest_groups() -> None:
    groups = [f"cluster {i}" for i in range(40) for _ in range(40 - i)]
    traces = figure(made(groups), range(len(groups)))["colorings"]["label"]["traces"]
    assert [trace["name"] for trace in traces] == [*(f"cluster {i}" for i in range(30)), "others"]
    assert sum(len(trace["x"]) for trace in traces) == len(groups)
    styles = [(trace["marker"]["color"], trace["marker"]["symbol"]) for trace in traces[:-1]]
    assert len(set(styles)) == len(styles)  # no two groups share color and shape


def test_a_map_is_accessible_without_a_mouse() -> None:
    there = Figures().add_map(made(list("aab")), range(3))
    assert 'tabindex="0" role="application"' in there
    assert 'aria-label="Map of 9 &lt;i&gt;images. The arrow keys' in there
    assert 'aria-live="polite"' in there
    assert there.count('type="radio"') == 2
    assert there.count(" checked") == 1
