"""A run goes on only on the pictures that it was begun with; all ranks have the same pictures and settings."""

import shutil
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
from moco.training.consistency import identity, open_consistently, refuse_other_settings
from moco.training.trainer import pretrain
from tests.data.unreadable_files import folder, noise
from tests.distributed.launch import run_ranks
from tests.training.test_bad_images import config

# a run's lock is held to the end of the process
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:method.queue_size")


def begun(tmp_path: Path, **data: object) -> TrainConfig:
    """A run over 20 pictures that was stopped behind its first step."""
    made = config(folder(tmp_path / "pictures", good=20, bad=False), tmp_path / "run")
    made.data = replace(made.data, **data)  # type: ignore[arg-type]
    made.stop_after = 1e-6
    with pytest.raises(Preempted):
        pretrain(made)
    made.stop_after = 0.0
    return made


# ---- what tells pictures from others ----


def files(*names: str, root: str = "/somewhere") -> FolderSource:
    return FolderSource(root, np.array([name.encode() for name in names]))


def test_it_is_the_names_in_their_order_and_how_many_there_are() -> None:
    known = identity(files("a.png", "b.png"))
    assert known["length"] == 2
    assert known == identity(files("a.png", "b.png", root="/elsewhere"))
    others = [files("b.png", "a.png"), files("a.png"), files("a.png", "b.png", "c.png"), files("a.pn", "gb.png")]
    assert len({identity(each)["sha256"] for each in [files("a.png", "b.png"), *others]}) == 5


def test_names_that_are_no_text_count_too() -> None:
    assert identity(files("a.png"))["sha256"] != identity(FolderSource("/x", np.array([b"a\xff.png"])))["sha256"]


def test_pictures_in_memory_count_with_their_size() -> None:
    def source(size: int) -> ArraySource:
        return ArraySource(torch.zeros(2, 3, size, size, dtype=torch.uint8), ["a", "b"])

    assert identity(source(8)) == identity(source(8))
    assert identity(source(8)) != identity(source(9))


def test_a_stream_is_its_shards_wherever_they_are_fetched_from() -> None:
    def source(*addresses: str) -> Source:
        return RemoteSource(addresses, 100, 10)

    known = identity(source("https://one/a/train-0.tar?token=1", "https://one/a/train-1.tar?token=2"))
    assert known == identity(source("/disk/train-0.tar", "/disk/train-1.tar"))
    assert known != identity(source("/disk/train-1.tar", "/disk/train-0.tar"))
    assert known["length"] == 100


def test_digits_are_the_same_every_time_and_a_checkpoint_takes_what_is_said() -> None:
    known = identity(load_source(DataConfig("digits")).train)
    assert known == identity(load_source(DataConfig("digits")).train)
    assert {name: type(value) for name, value in known.items()} == {"length": int, "sha256": str}


# ---- a run that goes on ----


def test_a_picture_that_is_gone_ends_the_resume_in_a_sentence_and_put_back_it_goes_on(tmp_path: Path) -> None:
    made = begun(tmp_path)
    kept = (tmp_path / "pictures" / "07.png").rename(tmp_path / "07.png")
    before = {each: each.read_bytes() for each in (tmp_path / "run" / "checkpoints").iterdir()}
    with pytest.raises(ConfigError) as refused:
        pretrain(made)
    sentence = str(refused.value)
    assert f"run={tmp_path}/run was trained on 20 pictures, and now there are 19 (data.root={tmp_path}/pictures)" in (
        sentence
    )
    assert (
        f"put them back as they were, or start another run from these weights, run=DIRECTORY init_from={tmp_path}/"
        in (sentence)
    )
    assert Path(sentence.rpartition("init_from=")[2]).is_file()
    assert "replace" not in sentence
    assert {each: each.read_bytes() for each in (tmp_path / "run" / "checkpoints").iterdir()} == before
    shutil.move(kept, tmp_path / "pictures" / "07.png")
    pretrain(made)
    with (tmp_path / "pictures" / "20.png").open("wb") as file:
        noise().save(file, "PNG")
    with pytest.raises(ConfigError, match="on 20 pictures, and now there are 21"):  # finished: as before
        pretrain(made)


def test_as_many_pictures_with_another_name_among_them_are_refused(tmp_path: Path) -> None:
    made = begun(tmp_path)
    (tmp_path / "pictures" / "07.png").rename(tmp_path / "pictures" / "zz.png")
    with pytest.raises(ConfigError, match=r"20 pictures, and now there are as many with other names, or in another"):
        pretrain(made)


def test_pictures_that_moved_are_the_same(tmp_path: Path) -> None:
    made = begun(tmp_path)
    (tmp_path / "pictures").rename(tmp_path / "elsewhere")
    made.data.root = str(tmp_path / "elsewhere")
    pretrain(made)
    state = checkpoint.load_newest(tmp_path / "run" / "checkpoints")
    assert state is not None
    assert state["step"] == 6


def test_to_replace_bad_pictures_is_no_way_around_one_that_is_gone(tmp_path: Path) -> None:
    made = begun(tmp_path, on_bad_image="replace", max_bad=0.5)
    (tmp_path / "pictures" / "07.png").unlink()
    with pytest.raises(ConfigError, match=r"on_bad_image=replace stands in for .* not for one that is gone"):
        pretrain(made)


def test_a_checkpoint_from_before_this_check_goes_on(tmp_path: Path) -> None:
    made = begun(tmp_path)
    (old,) = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")
    state = checkpoint.load(old)
    assert state.pop("data")["length"] == 20
    checkpoint.save(old.parent, state["step"], state, keep_last=1)
    (tmp_path / "pictures" / "07.png").unlink()
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
    return "alike"


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
    """In one pair of processes: to start one takes seconds."""
    return [
        compared(0.1),  # the place of the data is the machine's own affair
        compared(0.3),
        opened(["a", "b"], ["c"]),
        opened(["a"], ["c"]),
        opened(["a", "z"], ["c"]),
        opened(["a", "b"], ["c", "d"]),
        opened([], []),
    ]


def test_ranks_with_other_settings_or_pictures_all_say_so() -> None:
    one, other = run_ranks(2, all_cases)
    assert one == other
    same = ": give every machine the same data under data.root and data.eval_root, with the same names"
    assert one == [
        "alike",
        "rank 1 has another configuration than rank 0: optim.lr (0.3, on rank 0 0.1). Start the same command, with the "
        "same files of configuration, on every machine",
        "2 2",
        f"rank 1 has 1 training pictures and rank 0 has 2{same}",
        f"rank 1 has other training pictures than rank 0, 2 each, or in another order{same}",
        f"rank 1 has 2 held-out pictures and rank 0 has 1{same}",
        "data.root=/1 does not exist",
    ]
