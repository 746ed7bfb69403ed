"""Features in files: their content, resuming, agreement of processes, refused input."""

import csv
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moco.config import ConfigError, DataConfig
from moco.config.data import SubjectDataConfig
from moco.config.embed import EmbedConfig, check_embed
from moco.config.search import SearchConfig
from moco.config.subject import ImagesConfig
from moco.data.decode import ImageError
from moco.data.sources import load_source
from moco.evaluation import features
from moco.evaluation.features import EvalTransform, Inference, extract
from moco.files import WriteError
from moco.interop.encoder_file import ForeignFileError, build, read_encoder
from moco.retrieval import embed as embed_module
from moco.retrieval.embed import embed
from moco.retrieval.search import search
from moco.retrieval.store import read_about
from tests.data.images import encoder, folder, gradient
from tests.distributed.launch import run_ranks

FILES = ("features.npy", "index.csv", "features.json")


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    return encoder(tmp_path / "encoder.safetensors"), folder(tmp_path / "images")


def config(made: tuple[Path, Path], output: Path, **changes: Any) -> EmbedConfig:
    data = changes.pop("data", SubjectDataConfig("folder", str(made[1]), workers=0))
    values: dict[str, Any] = {"images_at_once": 4, "device": "cpu", "data": data} | changes
    return EmbedConfig(checkpoint=str(made[0]), output=str(output), **values)


def contents(output: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in output.iterdir() if each.name != ".lock"}


def rows(output: Path) -> list[dict[str, str]]:
    with (output / "index.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_features_equal_those_of_the_encoder(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    output = tmp_path / "out"
    embed(config(made, output))
    assert set(contents(output)) == set(FILES)
    written = np.load(output / "features.npy")
    source = load_source(DataConfig("folder", str(made[1]))).train
    network = build(read_encoder(made[0])).backbone
    wanted = extract(
        network, source, EvalTransform(16, 16, [0.5] * 3, [0.25] * 3), Inference(torch.device("cpu"), batch_size=4)
    )
    assert written.dtype == np.float32
    assert np.array_equal(written, wanted.numpy())
    assert [each["path"] for each in rows(output)] == [f"{i:02}.png" for i in range(11)]
    about = read_about(output)
    assert (about["rows"], about["dimension"], about["encoder"]["step"]) == (11, 128, 3)
    assert f"python -m moco.search device=cpu index={output} mode=duplicates" in capsys.readouterr().out


def test_labels_normalization_and_float16(tmp_path: Path) -> None:
    for name in ("dog", "cat"):
        folder(tmp_path / "images" / name, 2)
    made = encoder(tmp_path / "encoder.safetensors"), tmp_path / "images"
    data = SubjectDataConfig("folder", str(made[1]), labels="folder", workers=0)
    embed(config(made, tmp_path / "out", data=data, normalize=True, dtype="float16"))
    written = np.load(tmp_path / "out" / "features.npy")
    assert written.dtype == np.float16
    assert np.linalg.norm(written.astype(float), axis=1) == pytest.approx(np.ones(4), abs=1e-3)
    assert [(each["label"], each["class"], each["path"]) for each in rows(tmp_path / "out")] == [
        ("0", "cat", "cat/00.png"),
        ("0", "cat", "cat/01.png"),
        ("1", "dog", "dog/00.png"),
        ("1", "dog", "dog/01.png"),
    ]
    with pytest.raises(ConfigError, match=r"split=held_out .*data\.name=folder"):
        embed(config(made, tmp_path / "other", data=data, split="held_out"))


class Killed(RuntimeError):
    pass


def stop_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt the computation after the given number of batches, like a kill."""
    stream = features.stream

    def broken(*arguments: Any) -> Iterator[Tensor]:
        for i, part in enumerate(stream(*arguments)):
            if i == batches:
                raise Killed
            yield part

    monkeypatch.setattr(embed_module, "stream", broken)


def test_unreadable_images_of_a_resident_set_are_skipped_and_can_be_searched(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    for name in ("00.png", "04.png"):
        (made[1] / name).write_bytes(b"no image")
    for path in made[1].glob("large_*"):  # of another size, which a resident set does not allow
        path.unlink()
    streamed, resident = (
        config(made, tmp_path / name, images_at_once=2, on_bad_image="skip") for name in ("streamed", "resident")
    )
    resident.data.resident = True
    for each in (streamed, resident):
        embed(each)
    for name in ("features.npy", "index.csv", "unreadable.csv"):
        assert (tmp_path / "resident" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes()
    assert (tmp_path / "resident" / "unreadable.csv").read_text().count("no known image format") == 2
    search(SearchConfig(index=str(tmp_path / "resident"), output=str(tmp_path / "found"), sample=2, device="cpu"))


def test_a_resumed_run_writes_the_same_bytes(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (made[1] / "04.png").write_bytes(b"no image")
    embed(config(made, tmp_path / "complete", images_at_once=2, on_bad_image="skip"))
    resumed = config(made, tmp_path / "resumed", images_at_once=2, on_bad_image="skip")
    for batches, done in ((1, 1), (1, 4), (0, 4)):  # the second attempt skips 04.png in chunk 2
        with monkeypatch.context() as patch:
            stop_after(batches, patch)
            with pytest.raises(Killed):
                embed(resumed)
        assert json.loads((tmp_path / "resumed" / "progress.json").read_text())["done"] == done
        assert not (tmp_path / "resumed" / "features.npy").exists()
    with pytest.raises(ConfigError, match="is not complete"):
        read_about(tmp_path / "resumed")
    computed: list[int] = []
    build_network = embed_module.build_network

    def counted(*arguments: Any) -> torch.nn.Module:
        network = build_network(*arguments)
        network.register_forward_hook(lambda _module, inputs, _out: computed.append(len(inputs[0])))
        return network

    with monkeypatch.context() as patch:
        patch.setattr(embed_module, "build_network", counted)
        embed(resumed)
    assert computed == [1, 2, 1]  # one image to get the dimension, then rows 8, 9 and 10
    assert contents(tmp_path / "resumed") == contents(tmp_path / "complete")


def test_a_complete_output_is_kept_unless_an_image_changed(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    embed(config(made, tmp_path / "out"))
    before = contents(tmp_path / "out")
    shutil.move(str(made[1] / "../images"), tmp_path / "moved")  # the same images in another place
    stop_after(0, monkeypatch)
    embed(config((made[0], tmp_path / "moved"), tmp_path / "out", images_at_once=100))
    assert contents(tmp_path / "out") == before
    now, later = capsys.readouterr().out.split("images of", 2)[1:]
    assert "already complete" in later
    assert "already complete" not in now
    gradient(99).save(tmp_path / "moved" / "03.png")  # same name, other content
    with pytest.raises(ConfigError, match=r"images of .* that have changed since .*: choose another"):
        embed(config((made[0], tmp_path / "moved"), tmp_path / "out"))
    assert contents(tmp_path / "out") == before


def _skip_and_stop(made: tuple[Path, Path], output: Path) -> str:
    """Return the error of an embedding that stops at an unreadable image, after one that skips it."""
    embed(config(made, output / "skip", images_at_once=2, on_bad_image="skip"))  # six chunks
    try:
        embed(config(made, output / "stop", images_at_once=2))
    except ImageError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_as_one(made: tuple[Path, Path], tmp_path: Path) -> None:
    (made[1] / "09.png").write_bytes(b"no image")
    alone = run_ranks(1, _skip_and_stop, made, tmp_path / "one")
    both = run_ranks(2, _skip_and_stop, made, tmp_path / "two")
    assert contents(tmp_path / "two" / "skip") == contents(tmp_path / "one" / "skip")
    assert set(contents(tmp_path / "two" / "skip")) == {*FILES, "unreadable.csv"}
    assert both == alone * 2  # all ranks raise the error of the rank that found the image
    assert "09.png" in both[0]


def test_an_unreadable_image_is_an_error_or_listed(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    for name in ("02.png", "05.png", "06.png"):
        (made[1] / name).write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"05.png|02.png"):
        embed(config(made, output))
    embed(config(made, output, on_bad_image="skip"))
    assert "3 skipped" in capsys.readouterr().out
    kept = [0, 1, 3, 4, 7, 8, 9, 10]
    assert [int(each["id"]) for each in rows(output)] == kept
    assert [int(each["row"]) for each in rows(output)] == list(range(8))
    with (output / "unreadable.csv").open(newline="") as file:
        unreadable = list(csv.DictReader(file))
    assert [(each["id"], each["path"]) for each in unreadable] == [("2", "02.png"), ("5", "05.png"), ("6", "06.png")]
    assert all("no known image format" in each["reason"] for each in unreadable)
    for name in ("02.png", "05.png", "06.png"):
        (made[1] / name).unlink()
    embed(config(made, tmp_path / "without"))
    written, without = (np.load(each / "features.npy") for each in (output, tmp_path / "without"))
    assert np.allclose(written, without, atol=1e-6)
    for each in made[1].iterdir():
        each.write_bytes(b"no image")
    with pytest.raises(ConfigError, match="none of the 8 images"):
        embed(config(made, tmp_path / "nothing", on_bad_image="skip"))


def test_a_different_embedding_is_refused(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    embed(config(made, output))
    before = contents(output)
    with pytest.raises(ConfigError, match=r"another encoder .*encoder.safetensors, step 3"):
        embed(config((encoder(tmp_path / "second.safetensors", seed=1), made[1]), output))
    with pytest.raises(ConfigError, match=r"other images .11 of .*images, split=train"):
        embed(config((made[0], folder(tmp_path / "fewer", 9)), output))
    with pytest.raises(ConfigError, match=r"images=.*; normalize=False \(now True\); dtype=float32"):
        embed(config(made, output, normalize=True, dtype="float16", images=ImagesConfig(size=8)))
    assert contents(output) == before
    with pytest.raises(ConfigError, match=r"output=.*00.png, 01.png, 02.png"):
        embed(config(made, tmp_path / "fewer"))
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        with pytest.raises(Killed):
            embed(config(made, tmp_path / "half"))
    with pytest.raises(ConfigError, match=r"images_at_once=4 \(now 3\)"):  # other chunks: other bytes
        embed(config(made, tmp_path / "half", images_at_once=3))


def test_links_without_a_target_are_listed_and_a_stream_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    (made[1] / "03.png").unlink()
    (made[1] / "03.png").symlink_to("gone.png")
    (made[1] / "05.png").unlink()
    (made[1] / "05.png").symlink_to("05.png")
    embed(config(made, tmp_path / "out", on_bad_image="skip"))
    assert [each["path"] for each in rows(tmp_path / "out")] == [f"{i:02}.png" for i in range(11) if i not in (3, 5)]
    with pytest.raises(ConfigError, match=r"data\.name=webdataset"):
        embed(config(made, tmp_path / "out", data=SubjectDataConfig("webdataset", "x.tar")))


def test_missing_images_and_invalid_outputs_are_refused(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        embed(config((made[0], tmp_path / "empty"), tmp_path / "out"))
    with pytest.raises(ForeignFileError, match="features=projection"):
        embed(config(made, tmp_path / "out", features="projection"))
    for field in ("features", "split", "dtype", "table", "on_bad_image"):
        with pytest.raises(ConfigError, match=f"{field}='x' must be one of"):
            check_embed(config(made, tmp_path / "out", **{field: "x"}))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        with pytest.raises(ConfigError, match=r"output=.* 0\.0 GB are free"):
            embed(config(made, tmp_path / "full"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"output=.*file/out .*Not a directory"):
        embed(config(made, tmp_path / "file" / "out"))
    build_network = embed_module.build_network

    class Overflowing(torch.nn.Module):
        def __init__(self, *arguments: Any) -> None:
            super().__init__()
            self.network = build_network(*arguments)

        def forward(self, images: Tensor) -> Tensor:
            out: Tensor = self.network(images) + 1e6
            return out

    monkeypatch.setattr(embed_module, "build_network", Overflowing)
    with pytest.raises(FloatingPointError, match=r"rows 0 ... 3 are not finite in float16: set dtype=float32"):
        embed(config(made, tmp_path / "overflow", dtype="float16"))


def test_a_second_process_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    from moco.runtime.output_directory import lock_directory

    output = tmp_path / "out"
    with lock_directory(output, "output"):
        child = os.fork()  # a lock only excludes other processes
        if child == 0:
            try:
                embed(config(made, output))
            except ConfigError as error:
                os._exit(7 if f"is in use by process {os.getppid()}" in str(error) else 8)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_parquet_without_pyarrow(made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    plain = importlib.import_module

    def without(name: str) -> Any:
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError(name)
        return plain(name)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ConfigError, match=r"table=parquet .*pip install pyarrow"):
        embed(config(made, tmp_path / "out", table="parquet"))
    assert not (tmp_path / "out").exists()  # refused before any work


def test_parquet_equals_the_csv(made: tuple[Path, Path], tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    odd = os.fsencode(made[1]) + b"/caf\xe9.png"
    shutil.copy(os.fsencode(made[1] / "00.png"), odd)
    embed(config(made, tmp_path / "out", table="parquet"))
    embed(config(made, tmp_path / "out"))  # already complete: adds the other table only
    there = parquet.read_table(tmp_path / "out" / "index.parquet").to_pydict()
    assert there["path"] == [*(f"{i:02}.png" for i in range(11)), "caf\\xe9.png"]
    assert there["id"] == there["row"] == list(range(12))
    assert b"11,11,caf\xe9.png\r\n" in (tmp_path / "out" / "index.csv").read_bytes()  # a CSV keeps the bytes


def test_a_full_disk_is_reported_in_one_sentence_before_any_feature_is_computed(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(WriteError, match=r"features\.part\.npy cannot be written \(No space left on device\)"):
            embed(config(made, output))
    assert contents(output) == {}
    embed(config(made, output))
    assert set(contents(output)) == set(FILES)
