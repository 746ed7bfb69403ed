"""The map: what lies together stays together, groups and legend agree, and every point keeps its picture."""

import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from moco.config import ConfigError
from moco.reporting.points import Map, clusters, coordinates, figure, markup


def blobs(per: int = 20) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Three directions with a little noise, of any length."""
    rng = np.random.default_rng(0)
    truth = np.arange(3 * per) % 3
    features = np.eye(8)[truth] + 0.05 * rng.normal(size=(3 * per, 8))
    return (features * rng.uniform(0.1, 10, (3 * per, 1))).astype(np.float32), truth


def test_a_map_keeps_neighbors_and_is_the_same_each_time() -> None:
    features, truth = blobs()
    placed = coordinates(features, "tsne", 30, 3)
    assert placed.shape == (60, 2)
    distance = np.linalg.norm(placed[:, None] - placed[None], axis=2) + 1e9 * np.eye(60)
    assert (truth[distance.argmin(axis=1)] == truth).all()
    np.testing.assert_array_equal(placed, coordinates(features, "tsne", 30, 3))
    assert coordinates(features[:5], "tsne", 30, 3).shape == (5, 2)  # so few that the perplexity must give way


def test_a_missing_umap_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    features, _ = blobs()
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ConfigError, match=r"pip install 'momentum-contrast\[umap\]', or map=tsne"):
        coordinates(features, "umap", 10, 0)


def test_clusters_are_found_by_direction_and_named_by_size() -> None:
    features, truth = blobs()
    keep = np.flatnonzero((truth != 2) | (np.arange(60) < 30))  # the last direction has fewer
    found = clusters(features[keep], 3, 0)
    for direction in range(3):
        assert len(set(found[truth[keep] == direction])) == 1
    sizes = np.bincount(found)
    assert list(sizes) == sorted(sizes, reverse=True)
    assert set(clusters(np.ones((6, 2), np.float32), 4, 0)) == {0}  # all alike: one group


def made(groups: list[str]) -> Map:
    count = len(groups)
    places = np.stack([np.arange(count), np.arange(count) ** 2], axis=1).astype(float)
    names = [f"<b>{i}\n" for i in range(count)]
    return Map("9 <i>pictures", places, names, list(range(count))[::-1], {"label": groups, "cluster": ["c"] * count})


def test_every_point_is_in_one_trace_with_its_place() -> None:
    each = figure(made(list("abcabcaab")))
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
    assert each["pictures"] == list(range(9))[::-1]
    assert each["names"][0] == "<b>0\N{REPLACEMENT CHARACTER}"  # as text; the script sets it as text too


def test_many_groups_become_thirty_and_others() -> None:
    groups = [f"cluster {i}" for i in range(40) for _ in range(40 - i)]
    traces = figure(made(groups))["colorings"]["label"]["traces"]
    assert [trace["name"] for trace in traces] == [*(f"cluster {i}" for i in range(30)), "others"]
    assert sum(len(trace["x"]) for trace in traces) == len(groups)
    looks = [(trace["marker"]["color"], trace["marker"]["symbol"]) for trace in traces[:-1]]
    assert len(set(looks)) == len(looks)  # color and shape together tell all apart


def test_the_place_of_a_map_can_be_used_without_a_mouse() -> None:
    there = markup("map-0", made(list("aab")))
    assert 'tabindex="0" role="application"' in there
    assert 'aria-label="Map of 9 &lt;i&gt;pictures: the arrow keys' in there
    assert 'aria-live="polite"' in there
    assert there.count('type="radio"') == 2
    assert there.count(" checked") == 1
