"""Search: planted duplicates, neighbors and outliers are in the JSON files and in the gallery."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moco.config import ConfigError
from moco.config.data import SubjectDataConfig
from moco.config.search import SearchConfig, check_search
from moco.data.decode import ImageError
from moco.files import WriteError
from moco.retrieval import embed as embed_module
from moco.retrieval.search import search
from tests.data.images import encoder, folder, gradient
from tests.full_disk import full_at

EVIL = "<script>alert(1)<_script>.png"


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    """Write gradients; of 03 an exact, a recompressed and an enlarged copy; a copy of 05; and noise."""
    root = folder(tmp_path / "images")
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
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "duplicates 4 images, not counting those to keep: look at each group before you remove any" in text
    assert "depends on the encoder" in text
    assert "Raise threshold=" in text
    assert "lower threshold=" in text
    assert "After removing images, compute the features again" in text
    assert "compute the features again" in page
    assert page.count("same thumbnail</") == 4
    counts = re.search(
        r"of 16 images, (\d+) at 0\.999, 6 at 0\.99, (\d+) at 0\.95, (\d+) at 0\.9, (\d+) at 0\.85, (\d+) at 0\.8 have",
        text,
    )
    assert counts is not None
    features = np.load(tmp_path / "out" / "features" / "features.npy").astype(np.float64)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    nearest = (features @ features.T - 2 * np.eye(16)).max(axis=1)
    assert [int(each) for each in counts.groups()] == [
        (nearest >= each).sum() for each in (0.999, 0.95, 0.9, 0.85, 0.8)
    ]


def test_different_images_are_not_marked_as_copies(made: tuple[Path, Path], tmp_path: Path) -> None:
    search(config(made, tmp_path / "out", mode="duplicates", threshold=0.5))
    (group,) = results(tmp_path / "out", "duplicates")["groups"]
    assert group["keep"] == "large_03.png"
    assert len(group["pictures"]) == 16  # gradients of other colors, and noise
    page = (tmp_path / "out" / "search" / "duplicates.html").read_text()
    figures = re.findall(r"<figure.*?</figure>", page, flags=re.DOTALL)
    marked = {re.sub(r"base64,[^\"]*", "", each) for each in figures if "same thumbnail" in each}
    assert {re.search(r"\w*03\.(png|jpg)", each)[0] for each in marked} == {"03.png", "again_03.jpg", "copy_of_03.png"}  # type: ignore[index]
    assert len(marked) == 3


def test_images_that_resemble_only_a_third_one_are_no_group(made: tuple[Path, Path], tmp_path: Path) -> None:
    """Every image of a group is similar enough to the image to keep, whatever else resembles it."""
    search(config(made, tmp_path / "out", mode="duplicates", threshold=0.9, gallery="none"))
    groups = results(tmp_path / "out", "duplicates")["groups"]
    features = np.load(tmp_path / "out" / "features" / "features.npy").astype(np.float64)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    for group in groups:
        kept, *others = group["pictures"]
        similarities = [features[kept["row"]] @ features[each["row"]] for each in others]
        assert min(similarities) >= 0.9 - 1e-6
        assert [each["similarity"] for each in others] == pytest.approx(similarities, abs=1e-6)
    rows = [each["row"] for group in groups for each in group["pictures"]]
    assert len(rows) == len(set(rows))


def test_a_too_low_threshold_is_reported(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    search(config(made, tmp_path / "out", mode="duplicates", threshold=-0.5, gallery="none"))
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "16 of 16 images: threshold=-0.5 is too low for this encoder; choose a higher one" in text
    assert not list((tmp_path / "out" / "search").glob("*.html"))


def test_noise_is_the_outlier(made: tuple[Path, Path], tmp_path: Path) -> None:
    search(config(made, tmp_path / "out", mode="outliers", k=3, show=2, gallery="png"))
    outliers = results(tmp_path / "out", "outliers")["outliers"]
    assert outliers[0]["path"] == "noise.png"
    assert len(outliers) == 16  # the file has all, the gallery two
    assert [each["similarity"] for each in outliers] == sorted(each["similarity"] for each in outliers)
    with Image.open(tmp_path / "out" / "search" / "outliers.png") as sheet:
        noise = np.asarray(sheet.convert("RGB")).astype(int)[:, : sheet.width // 8]
        assert noise.std() > 30  # the first column has the noise


def test_queries_inside_and_outside_the_index(made: tuple[Path, Path], tmp_path: Path) -> None:
    outside = tmp_path / "query.png"
    gradient(7, 40, 90).save(outside)
    inside = made[1] / "03.png"
    search(config(made, tmp_path / "out", query=[str(outside), str(inside)], k=3))
    queries = results(tmp_path / "out", "nearest")["queries"]
    assert [each["query"] for each in queries] == [str(outside), str(inside)]
    found = [[each["path"] for each in query["neighbours"]] for query in queries]
    assert found[0][0] == "07.png"
    assert set(found[1]) == {"again_03.jpg", "copy_of_03.png", "large_03.png"}  # without itself
    assert found[1][0] == "copy_of_03.png"
    assert queries[1]["neighbours"][0]["similarity"] == 1.0
    page = (tmp_path / "out" / "search" / "nearest.html").read_text()
    assert page.count('class="mark"') == 2
    assert page.count("data:image/jpeg;base64,") == 8


def test_an_index_of_images_from_a_hub_keeps_their_name(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets: Any = pytest.importorskip("datasets", reason="data=huggingface needs the extra `huggingface`")
    paths = [str(path) for path in sorted(made[1].iterdir())]
    table = datasets.Dataset.from_dict({"image": paths}, features=datasets.Features({"image": datasets.Image()}))
    hub = {"user/images": {"train": table}}
    monkeypatch.setattr(datasets, "load_dataset", lambda root, **_: hub[root])
    data = SubjectDataConfig("huggingface", "user/images", workers=0)
    embed_module.embed(config(made, tmp_path / "out", data=data))
    with pytest.raises(ConfigError, match=r"data\.root=user/images, and they would be fetched.*add data\.root=user/"):
        search(config(made, tmp_path, index=str(tmp_path / "out"), data=SubjectDataConfig()))
    given = SubjectDataConfig(root="user/images")
    search(config(made, tmp_path, index=str(tmp_path / "out"), data=given, sample=1))
    (query,) = results(tmp_path / "out", "nearest")["queries"]
    assert {each["path"].split("/")[0] for each in query["neighbours"]} == {"train"}


def test_an_index_requires_its_encoder_and_images(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    search(config(made, output, mode="outliers", gallery="none"))  # leaves output/features
    monkeypatch.setattr(embed_module, "_compute_missing", None)  # nothing is computed from now on
    index = str(output / "features")
    search(config(made, output, sample=5, k=2, gallery="none"))
    first = results(output, "nearest")
    search(SearchConfig(index=index, sample=5, k=2, gallery="none", device="cpu"))
    assert results(Path(index), "nearest")["queries"] == first["queries"]  # the sample depends on the seed only
    assert len({each["query"] for each in first["queries"]}) == 5
    search(SearchConfig(index=index, sample=5, k=2, gallery="none", device="cpu", seed=1))
    assert results(Path(index), "nearest")["queries"] != first["queries"]

    outside = tmp_path / "query.png"
    gradient(7).save(outside)
    search(SearchConfig(index=index, query=[str(outside)], device="cpu"))  # with the encoder in features.json
    assert results(Path(index), "nearest")["queries"][0]["neighbours"][0]["path"] == "07.png"
    other = encoder(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(ConfigError, match=r"another encoder .*step 3. than .*other.safetensors"):
        search(SearchConfig(index=index, query=[str(outside)], checkpoint=str(other), device="cpu"))
    moved = shutil.move(made[0], tmp_path / "moved.safetensors")
    with pytest.raises(ConfigError, match="set checkpoint=FILE"):
        search(SearchConfig(index=index, query=[str(outside)], device="cpu"))
    search(SearchConfig(index=index, query=[str(outside)], checkpoint=str(moved), device="cpu"))

    images = Path(shutil.move(made[1], tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        search(SearchConfig(index=index, device="cpu"))
    data = SubjectDataConfig(root=str(images))
    search(SearchConfig(index=index, device="cpu", data=data))
    (images / "noise.png").unlink()
    with pytest.raises(ConfigError, match=r"index=.* other images .* another output, .*data\.root"):
        search(SearchConfig(index=index, device="cpu", data=data))


def test_removed_and_skipped_images(made: tuple[Path, Path], tmp_path: Path) -> None:
    (made[1] / "00.png").write_bytes(b"no image")  # from now on, row r is image r + 1
    search(config(made, tmp_path / "out", mode="outliers", on_bad_image="skip", k=3))
    assert results(tmp_path / "out", "outliers")["outliers"][0]["path"] == "noise.png"
    (made[1] / "noise.png").write_bytes(b"damaged since")
    with pytest.raises(ConfigError, match=r"that have changed since .*: choose another output"):
        search(config(made, tmp_path / "out", mode="outliers", on_bad_image="skip", k=3))
    index = str(tmp_path / "out" / "features")  # the features are unchanged
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


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"threshold": -1.0}, "threshold=-1"),
        ({"threshold": 1.5}, r"threshold=1\.5"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"k": 0}, "k=0"),
        ({"sample": -1}, "sample=-1"),
        ({"mode": "closest"}, "mode='closest'.*nearest, duplicates, outliers"),
        ({"gallery": "pdf"}, "gallery='pdf'.*html, png, none"),
        ({"query": ["a.png"], "sample": 2}, "query=.*sample=2"),
        ({"query": ["a.png"], "mode": "outliers"}, "mode=outliers"),
        ({"checkpoint": "", "output": ""}, "run=DIR"),
    ],
)
def test_an_invalid_configuration_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        check_search(SearchConfig(**({"checkpoint": "e.safetensors", "output": "out"} | changes)))


def test_a_query_can_be_a_name_of_the_index(made: tuple[Path, Path], tmp_path: Path) -> None:
    search(config(made, tmp_path / "out", query=[str(made[1] / "03.png"), "03.png"], k=3))
    by_file, by_name = results(tmp_path / "out", "nearest")["queries"]
    assert by_file["neighbours"] == by_name["neighbours"]


def test_a_query_is_found_in_either_form_of_unicode(made: tuple[Path, Path], tmp_path: Path) -> None:
    (made[1] / "03.png").rename(made[1] / "u\u0308.png")
    gradient(7).save(tmp_path / "u\u0308.png")
    queries = ["\u00fc.png", str(made[1] / "\u00fc.png"), str(tmp_path / "\u00fc.png")]
    search(config(made, tmp_path / "out", query=queries, k=3))
    by_name, by_file, outside = results(tmp_path / "out", "nearest")["queries"]
    assert by_name["neighbours"] == by_file["neighbours"]
    assert "copy_of_03.png" in [each["path"] for each in by_name["neighbours"]]
    assert "u\u0308.png" not in [each["path"] for each in by_name["neighbours"]]  # without itself
    assert outside["neighbours"][0]["path"] == "07.png"
    assert "cannot be read" not in (tmp_path / "out" / "search" / "nearest.html").read_text()


def test_a_wrong_index_or_query_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=rf"index={made[0]} is a file: name the output folder of moco\.embed$"):
        search(config(made, tmp_path, index=str(made[0])))
    with pytest.raises(ConfigError, match=r"nowhere does not exist"):
        search(SearchConfig(index=str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match=r"contains no features.npy"):
        search(SearchConfig(index=str(made[1])))
    (tmp_path / "mine" / "features").mkdir(parents=True)
    (tmp_path / "mine" / "features" / "features.npy").touch()
    with pytest.raises(ConfigError, match=r"mine contains no features.npy.*, index=.*mine/features$"):
        search(SearchConfig(index=str(tmp_path / "mine")))
    with pytest.raises(FileNotFoundError, match=r"query=gone.png does not exist"):
        search(config(made, out, query=["gone.png"]))
    with pytest.raises(FileNotFoundError, match=r"query=gone does .*; a comma separates .*'query=\[\"a, b.jpg\"\]'"):
        search(config(made, out, query=["gone", "b.png"]))
    with pytest.raises(FileNotFoundError, match=rf"query={made[1]} is a folder: name an image file"):
        search(config(made, out, query=[str(made[1])]))
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ImageError, match=r"query: .*text.png"):
        search(config(made, out, query=[str(tmp_path / "text.png")]))
    (tmp_path / "single").mkdir()
    shutil.copy(made[1] / "00.png", tmp_path / "single" / "0.png")
    with pytest.raises(ConfigError, match="mode=duplicates"):
        search(config((made[0], tmp_path / "single"), tmp_path / "few", mode="duplicates"))


def test_an_output_that_cannot_be_written(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused before the search; if the disk becomes full later, the result is printed."""
    search(config(made, tmp_path / "out", mode="outliers", gallery="none"))
    index = SearchConfig(index=str(tmp_path / "out/features"), mode="outliers", device="cpu")
    file = tmp_path / "out/features/features.npy"  # moco.embed prints this path
    with pytest.raises(ConfigError, match=rf"^index={file} is a file: set index={file.parent}$"):
        search(replace(index, index=str(file)))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        full_at(patch, "outliers.json")
        with pytest.raises(WriteError, match=r"outliers\.json cannot be written"):
            search(index)
    assert "most dissimilar" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        full_at(patch, "check")
        with pytest.raises(ConfigError, match=r"^output=.*/features/search cannot be written to .*: set output=DIR"):
            search(index)
    assert capsys.readouterr().out == ""
