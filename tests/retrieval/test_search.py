"""Searching pictures: what was planted in a folder is found, in the files and in the gallery."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moco.config import ConfigError
from moco.config.search import SearchConfig, check_search
from moco.config.subject import SubjectDataConfig
from moco.data.decode import ImageError
from moco.retrieval import embed as embed_stage
from moco.retrieval.search import search
from tests.data.images import encoder, folder, gradient

EVIL = "<script>alert(1)<_script>.png"


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    """Gradients, of 03 an exact copy, one compressed again and a larger one; of 05 a copy; and noise."""
    root = folder(tmp_path / "pictures")
    shutil.copy(root / "03.png", root / "copy_of_03.png")
    with Image.open(root / "03.png") as image:
        image.save(root / "again_03.jpg", quality=60)
        image.resize((128, 96), Image.Resampling.BICUBIC).save(root / "large_03.png")
    gradient(5).save(root / EVIL)
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(noise).save(root / "noise.png")
    return encoder(tmp_path / "encoder.safetensors"), root


def config(made: tuple[Path, Path], output: Path, **changes: Any) -> SearchConfig:
    values: dict[str, Any] = {"data": SubjectDataConfig("folder", str(made[1]), workers=0), "device": "cpu"} | changes
    if "index" not in changes:
        values |= {"checkpoint": str(made[0]), "output": str(output)}
    chosen = SearchConfig(**values)
    check_search(chosen)
    return chosen


def results(output: Path, mode: str) -> dict[str, Any]:
    there: dict[str, Any] = json.loads((output / "search" / f"{mode}.json").read_text())
    return there


def test_planted_duplicates_are_found(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search(config(made, tmp_path / "out", mode="duplicates", threshold=0.99))
    groups = results(tmp_path / "out", "duplicates")["groups"]
    assert [sorted(each["path"] for each in group["pictures"]) for group in groups] == [
        ["03.png", "again_03.jpg", "copy_of_03.png", "large_03.png"],
        ["05.png", EVIL],
    ]
    assert [group["keep"] for group in groups] == ["large_03.png", "05.png"]  # most pixels; of equals the first
    first = groups[0]["pictures"]
    assert first[0] | {"bytes": 0} == {
        "row": first[0]["row"],
        "path": "large_03.png",
        "similarity": 1.0,
        "width": 128,
        "height": 96,
        "bytes": 0,
    }
    assert [each["similarity"] for each in first] == sorted((each["similarity"] for each in first), reverse=True)
    exact = {each["path"]: each["similarity"] for each in first}
    assert exact["03.png"] == exact["copy_of_03.png"]
    page = (tmp_path / "out" / "search" / "duplicates.html").read_text()
    assert page.count("<section>") == 2
    assert page.count("data:image/jpeg;base64,") == 6
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "4 pictures, keeping the best" in capsys.readouterr().out


def test_too_low_a_threshold_is_said(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    search(config(made, tmp_path / "out", mode="duplicates", threshold=-0.5, gallery="none"))
    assert "One group holds 16 of 16 pictures: threshold=-0.5 is too low" in capsys.readouterr().out
    assert not list((tmp_path / "out" / "search").glob("*.html"))


def test_noise_is_the_outlier(made: tuple[Path, Path], tmp_path: Path) -> None:
    search(config(made, tmp_path / "out", mode="outliers", k=3, show=2, gallery="png"))
    outliers = results(tmp_path / "out", "outliers")["outliers"]
    assert outliers[0]["path"] == "noise.png"
    assert len(outliers) == 16  # the file holds all, the gallery two
    assert [each["similarity"] for each in outliers] == sorted(each["similarity"] for each in outliers)
    with Image.open(tmp_path / "out" / "search" / "outliers.png") as sheet:
        noise = np.asarray(sheet.convert("RGB")).astype(int)[:, : sheet.width // 8]
        assert noise.std() > 30  # a sheet of its own, with something in its first column


def test_the_nearest_of_files_inside_and_outside(made: tuple[Path, Path], tmp_path: Path) -> None:
    outside = tmp_path / "query.png"
    gradient(7, 40, 90).save(outside)
    inside = made[1] / "03.png"
    search(config(made, tmp_path / "out", query=[str(outside), str(inside)], k=3))
    queries = results(tmp_path / "out", "nearest")["queries"]
    assert [each["query"] for each in queries] == [str(outside), str(inside)]
    found = [[each["path"] for each in query["neighbours"]] for query in queries]
    assert found[0][0] == "07.png"
    assert set(found[1]) == {"again_03.jpg", "copy_of_03.png", "large_03.png"}  # and not itself
    assert found[1][0] == "copy_of_03.png"
    assert queries[1]["neighbours"][0]["similarity"] == 1.0
    page = (tmp_path / "out" / "search" / "nearest.html").read_text()
    assert page.count('class="mark"') == 2
    assert page.count("data:image/jpeg;base64,") == 8


def test_an_index_is_searched_without_its_encoder_named(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    search(config(made, output, mode="outliers", gallery="none"))  # leaves output/features
    monkeypatch.setattr(embed_stage, "_fill", None)  # nothing is computed from here on
    index = str(output / "features")
    search(config(made, output, sample=5, k=2, gallery="none"))
    first = results(output, "nearest")
    search(SearchConfig(index=index, sample=5, k=2, gallery="none", device="cpu"))
    assert results(Path(index), "nearest")["queries"] == first["queries"]  # the sample is a function of the seed
    assert len({each["query"] for each in first["queries"]}) == 5
    search(SearchConfig(index=index, sample=5, k=2, gallery="none", device="cpu", seed=1))
    assert results(Path(index), "nearest")["queries"] != first["queries"]

    outside = tmp_path / "query.png"
    gradient(7).save(outside)
    search(SearchConfig(index=index, query=[str(outside)], device="cpu"))  # with the encoder that features.json names
    assert results(Path(index), "nearest")["queries"][0]["neighbours"][0]["path"] == "07.png"
    other = encoder(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(ConfigError, match=r"was made by another encoder .*step 3. than .*other.safetensors"):
        search(SearchConfig(index=index, query=[str(outside)], checkpoint=str(other), device="cpu"))
    moved = shutil.move(made[0], tmp_path / "moved.safetensors")
    with pytest.raises(ConfigError, match="is not there any more: set checkpoint=FILE"):
        search(SearchConfig(index=index, query=[str(outside)], device="cpu"))
    search(SearchConfig(index=index, query=[str(outside)], checkpoint=str(moved), device="cpu"))

    pictures = Path(shutil.move(made[1], tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="does not exist: check the path"):
        search(SearchConfig(index=index, device="cpu"))
    data = SubjectDataConfig(root=str(pictures))
    search(SearchConfig(index=index, device="cpu", data=data))
    (pictures / "noise.png").unlink()
    with pytest.raises(ConfigError, match="was made of other pictures than are in"):
        search(SearchConfig(index=index, device="cpu", data=data))


def test_pictures_that_went_or_were_skipped(made: tuple[Path, Path], tmp_path: Path) -> None:
    (made[1] / "00.png").write_bytes(b"no picture")  # row r is picture r + 1 from here on
    search(config(made, tmp_path / "out", mode="outliers", on_bad_image="skip", k=3))
    assert results(tmp_path / "out", "outliers")["outliers"][0]["path"] == "noise.png"
    (made[1] / "noise.png").write_bytes(b"damaged since")
    with pytest.raises(ConfigError, match="that have changed since: choose another output"):
        search(config(made, tmp_path / "out", mode="outliers", on_bad_image="skip", k=3))
    index = str(tmp_path / "out" / "features")  # as they were
    search(SearchConfig(index=index, output=str(tmp_path / "out"), mode="outliers", k=3, device="cpu"))
    page = (tmp_path / "out" / "search" / "outliers.html").read_text()
    assert page.count("<figure") == 15
    assert page.count("cannot be read") == 1


def test_digits_with_their_classes(tmp_path: Path) -> None:
    made = encoder(tmp_path / "encoder.safetensors"), tmp_path
    data = SubjectDataConfig("digits")
    search(config(made, tmp_path / "out", data=data, split="held_out", sample=2, k=4))
    there = results(tmp_path / "out", "nearest")
    assert there["pictures"] == 500
    assert {each["class"] for query in there["queries"] for each in query["neighbours"]} <= set("0123456789")
    assert 'class="small"' in (tmp_path / "out" / "search" / "nearest.html").read_text()
    search(config(made, tmp_path / "out", data=data, split="held_out", mode="duplicates", threshold=0.99999))
    for group in results(tmp_path / "out", "duplicates")["groups"]:
        assert {(each["width"], each["height"]) for each in group["pictures"]} == {(16, 16)}


def test_what_is_wrong_gets_a_sentence(made: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for changes, sentence in (
        ({"threshold": -1.0}, "threshold=-1.0 must be above -1 and at most 1"),
        ({"threshold": 1.5}, "threshold=1.5 must be above -1 and at most 1"),
        ({"threshold": float("nan")}, "threshold=nan must be a finite number"),
        ({"k": 0}, "k=0 must be at least 1"),
        ({"sample": -1}, "sample=-1 must be at least 0"),
        ({"mode": "closest"}, "mode='closest' must be one of nearest, duplicates, outliers"),
        ({"gallery": "pdf"}, "gallery='pdf' must be one of html, png, none"),
        ({"query": ["a.png"], "sample": 2}, r"query=.* and sample=2"),
        ({"query": ["a.png"], "mode": "outliers"}, "mode=outliers"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            config(made, out, **changes)
    with pytest.raises(ConfigError, match="no encoder: set run=DIR"):
        check_search(SearchConfig())
    with pytest.raises(ConfigError, match=r"nowhere does not exist: make it with python -m moco.embed"):
        search(SearchConfig(index=str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match=r"holds no features.npy of moco.embed: name its output"):
        search(SearchConfig(index=str(made[1])))
    with pytest.raises(FileNotFoundError, match=r"query=gone.png does not exist: name a picture file"):
        search(config(made, out, query=["gone.png"]))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ImageError, match=r"query: cannot read image .*text.png: no known image format"):
        search(config(made, out, query=[str(tmp_path / "text.png")]))
    (tmp_path / "single").mkdir()
    Image.open(io.BytesIO((made[1] / "00.png").read_bytes())).save(tmp_path / "single" / "0.png")
    with pytest.raises(ConfigError, match="compares pictures, and there is one only"):
        search(config((made[0], tmp_path / "single"), tmp_path / "few", mode="duplicates"))
