"""A run resumes only with the images that it was started with; all ranks have the same images and settings."""

import gzip
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moco.config import ConfigError, DataConfig, TrainConfig
from moco.data.arrays import ArraySource
from moco.data.folder import FolderSource
from moco.data.remote import RemoteSource
from moco.data.sources import Source, Sources, load_source
from moco.distributed import rank
from moco.runs import checkpoint
from moco.runtime.preemption import Preempted
from moco.training import consistency
from moco.training.consistency import identity, open_consistently, refuse_other_settings
from moco.training.trainer import pretrain
from tests.data.unreadable_files import folder, noise
from tests.distributed.launch import run_ranks
from tests.training.test_bad_images import config

# A run keeps its lock open until the process ends.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:method.queue_size")


def started(tmp_path: Path, **data: object) -> TrainConfig:
    """Train on 20 images and stop after the first step; return the configuration."""
    made = config(folder(tmp_path / "images", good=20, unreadable=False), tmp_path / "run")
    made.data = replace(made.data, **data)  # type: ignore[arg-type]
    made.stop_after = 1e-6
    with pytest.raises(Preempted):
        pretrain(made)
    made.stop_after = 0.0
    return made


# ---- the identity of images ----


def files(*names: str, root: str = "/somewhere") -> FolderSource:
    return FolderSource(root, np.array([name.encode() for name in names]))


def test_the_identity_depends_on_the_names_and_their_order() -> None:
    known = identity(files("a.png", "b.png"))
    assert known["length"] == 2
    assert known == identity(files("a.png", "b.png", root="/elsewhere"))
    others = [files("b.png", "a.png"), files("a.png"), files("a.png", "b.png", "c.png"), files("a.pn", "gb.png")]
    assert len({identity(each)["sha256"] for each in [files("a.png", "b.png"), *others]}) == 5


def test_the_identity_of_names_that_are_not_text() -> None:
    assert identity(files("a.png"))["sha256"] != identity(FolderSource("/x", np.array([b"a\xff.png"])))["sha256"]


def test_the_identity_of_images_in_memory_depends_on_their_size() -> None:
    def source(size: int) -> ArraySource:
        return ArraySource(torch.zeros(2, 3, size, size, dtype=torch.uint8), ["a", "b"])

    assert identity(source(8)) == identity(source(8))
    assert identity(source(8)) != identity(source(9))


def test_the_identity_of_a_stream_does_not_depend_on_the_address_of_its_shards() -> None:
    def source(*addresses: str) -> Source:
        return RemoteSource(addresses, 100, 10)

    known = identity(source("https://one/a/train-0.tar?token=1", "https://one/a/train-1.tar?token=2"))
    assert known == identity(source("/disk/train-0.tar", "/disk/train-1.tar"))
    assert known != identity(source("/disk/train-1.tar", "/disk/train-0.tar"))
    assert known["length"] == 100


def test_the_identity_is_reproducible_and_of_plain_types() -> None:
    known = identity(load_source(DataConfig("digits")).train)
    assert known == identity(load_source(DataConfig("digits")).train)
    assert {name: type(value) for name, value in known.items()} == {"length": int, "sha256": str}


# ---- resuming ----


def test_a_missing_image_is_refused_and_the_run_resumes_once_it_is_restored(tmp_path: Path) -> None:
    made = started(tmp_path)
    kept = (tmp_path / "images" / "07.png").rename(tmp_path / "07.png")
    before = {each: each.read_bytes() for each in (tmp_path / "run" / "checkpoints").iterdir()}
    with pytest.raises(ConfigError) as refused:
        pretrain(made)
    message = str(refused.value)
    beginning = f"run={tmp_path}/run was trained on 20 images, and now there are 19 (data.root={tmp_path}/images)"
    assert message.startswith(f"{beginning} (1 is gone: 07.png). Its queue")
    assert Path(message.rpartition("init_from=")[2]).is_file()
    assert "replace" not in message
    assert {each: each.read_bytes() for each in (tmp_path / "run" / "checkpoints").iterdir()} == before
    shutil.move(kept, tmp_path / "images" / "07.png")
    pretrain(made)
    with (tmp_path / "images" / "20.png").open("wb") as file:
        noise().save(file, "PNG")
    with pytest.raises(ConfigError, match="on 20 images, and now there are 21"):  # also once it is finished
        pretrain(made)


def test_the_same_number_of_images_with_another_name_is_refused(tmp_path: Path) -> None:
    made = started(tmp_path)
    (tmp_path / "images" / "07.png").rename(tmp_path / "images" / "zz.png")
    with pytest.raises(ConfigError, match=r"20 images, and now they have other names.*1 is new: zz.png; 1 is gone: 07"):
        pretrain(made)


def test_at_most_three_of_the_changed_images_are_named(tmp_path: Path) -> None:
    made = started(tmp_path)
    for number in range(4):
        (tmp_path / "images" / f"0{number}.png").rename(tmp_path / "images" / f"new{number}.png")
    (tmp_path / "images" / "09.png").unlink()
    with pytest.raises(ConfigError) as refused:
        pretrain(made)
    new, gone = "4 are new: new0.png, new1.png, new2.png and 1 more", "5 are gone: 00.png, 01.png, 02.png and 2 more"
    assert f" ({new}; {gone}). " in str(refused.value)


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-9])])
def test_a_run_without_a_list_of_its_images_resumes_and_records_it(
    damage: Callable[[Path], object], tmp_path: Path
) -> None:
    made = started(tmp_path)
    names = tmp_path / "run" / "image_names.gz"
    damage(names)
    (tmp_path / "images" / "07.png").rename(tmp_path / "07.png")
    with pytest.raises(ConfigError, match=r"now there are 19 \(data.root=[^)]*\)\. Its queue"):
        pretrain(made)
    names.unlink(missing_ok=True)
    (tmp_path / "07.png").rename(tmp_path / "images" / "07.png")
    pretrain(made)
    assert gzip.decompress(names.read_bytes()).split(b"\0") == [b"%02d.png" % number for number in range(20)]


def test_the_names_of_very_many_images_are_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consistency, "MOST_NAMES", 2)
    consistency.record_names(tmp_path, files("a", "b", "c"), resumed=False)
    assert not list(tmp_path.iterdir())
    consistency.record_names(tmp_path, files("a", "b"), resumed=False)
    assert consistency._changed_names(tmp_path, files("b", "a")) == ""
    assert consistency._changed_names(tmp_path, files("b", "c", "d")) == " (2 are new: c, d; 1 is gone: a)"


def test_images_may_be_moved_to_another_directory(tmp_path: Path) -> None:
    made = started(tmp_path)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    made.data.root = str(tmp_path / "elsewhere")
    pretrain(made)
    state = checkpoint.load_newest(tmp_path / "run" / "checkpoints")
    assert state is not None
    assert state["step"] == 6


def test_a_run_among_its_images_is_refused_at_its_start_and_when_it_resumes(tmp_path: Path) -> None:
    made = started(tmp_path)
    made.data.root = str(tmp_path)  # the run lies in it, with its views.png
    with pytest.raises(ConfigError, match=rf"run={tmp_path}/run lies in data\.root={tmp_path}, "):
        pretrain(made)
    made.run = f"{tmp_path}/images/run"
    with pytest.raises(ConfigError, match=rf"run={tmp_path}/images/run lies in data\.root={tmp_path}, "):
        pretrain(made)
    assert not Path(made.run).exists()


def test_replacing_unreadable_images_does_not_allow_missing_ones(tmp_path: Path) -> None:
    made = started(tmp_path, on_bad_image="replace", max_bad=0.5)
    (tmp_path / "images" / "07.png").unlink()
    with pytest.raises(ConfigError, match=r"data\.on_bad_image=replace replaces unreadable images, not missing ones"):
        pretrain(made)


def test_a_checkpoint_without_an_identity_resumes(tmp_path: Path) -> None:
    made = started(tmp_path)
    (old,) = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")
    state = checkpoint.load(old)
    assert state.pop("data")["length"] == 20
    checkpoint.save(old.parent, state["step"], state, keep_last=1)
    (tmp_path / "images" / "07.png").unlink()
    pretrain(made)
    assert checkpoint.load(checkpoint.list_checkpoints(old.parent)[0])["data"]["length"] == 19


# ---- ranks ----


def compared(lr_of_rank_1: float) -> str:
    try:
        refuse_other_settings(
            {"optim": {"lr": lr_of_rank_1 if rank() else 0.1}, "data": {"root": f"/{rank()}", "name": "x"}}
        )
    except ConfigError as error:
        return str(error)
    return "equal"


def opened(names_of_rank_1: list[str], held_out_of_rank_1: list[str]) -> str:
    def open_data() -> Sources:
        if not names_of_rank_1 and rank():
            raise FileNotFoundError("data.root=/1 does not exist")
        return Sources(
            files(*(names_of_rank_1 if rank() else ["a", "b"])),
            held_out=files(*(held_out_of_rank_1 if rank() else ["c"])),
        )

    try:
        sources, known = open_consistently(open_data)
    except (ConfigError, FileNotFoundError) as error:
        return str(error)
    return f"{len(sources.train)} {known['length']}"


def all_cases() -> list[str]:
    """Run all cases in one pair of processes: starting them takes seconds."""
    return [
        compared(0.1),  # data.root may differ
        compared(0.3),
        opened(["a", "b"], ["c"]),
        opened(["a"], ["c"]),
        opened(["a", "z"], ["c"]),
        opened(["a", "b"], ["c", "d"]),
        opened([], []),
    ]


def test_ranks_with_other_settings_or_images_are_refused_on_all_ranks() -> None:
    messages, of_rank_1 = run_ranks(2, all_cases)
    assert messages == of_rank_1
    expected = [
        "equal",
        "rank 1 .*: optim.lr (0.3, on rank 0 0.1)",
        "2 2",
        "rank 1 has 1 training images and rank 0 has 2",
        "rank 1 has other training images .*(2 each)",
        "rank 1 has 2 held-out images and rank 0 has 1",
        "data.root=/1 does not exist",
    ]
    for message, pattern in zip(messages, expected, strict=True):
        assert re.match(".*".join(map(re.escape, pattern.split(".*"))), message), message
