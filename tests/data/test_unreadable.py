"""An unreadable image ends the run with one sentence, or is replaced by a fixed substitute and listed."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from moco.config import ConfigError, DataConfig
from moco.data.augment import crop_one
from moco.data.decode import FAULTS, ImageError, decode
from moco.data.loader import Batch, batches
from moco.data.plan import Plan
from moco.data.sources import ArraySource, Source, load_source
from moco.data.unreadable import (
    TRIES,
    UnreadableImages,
    find_unreadable,
    image_or_substitute,
    substitutes,
    without_unreadable,
)
from moco.data.view import View, draw_crop
from moco.files import WriteError
from tests.data.unreadable_files import folder, noise, odd_files, unreadable_files
from tests.distributed.launch import run_ranks

CPU = torch.device("cpu")
# Only a crop, whose pixels the tests compute independently.
VIEWS = (View(16, (0.2, 1.0), mean=(0, 0, 0), std=(1, 1, 1)),) * 2
BAD = unreadable_files()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine readable images and every unreadable one."""
    return folder(tmp_path_factory.mktemp("mixed"), good=9)


def opened(root: Path, resident: bool = False) -> Source:
    return load_source(DataConfig("folder", str(root), resident=resident), keep_unreadable=True).train


def plan(source: Source, rank: int = 0, processes: int = 1) -> Plan:
    return Plan(len(source), 8, 3, 5, rank, processes)


def replaced(
    source: Source, which: Plan | None = None, workers: int = 0, start: int = 0
) -> tuple[list[Batch], dict[int, str]]:
    found: dict[int, str] = {}
    return list(batches(source, which or plan(source), VIEWS, CPU, workers, start, found.update)), found


def reasons(source: Source) -> dict[int, str]:
    return {i: error.reason for i, error in find_unreadable(source, range(len(source))).items()}


def equal(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.index, y.index) and all(torch.equal(v, w) for v, w in zip(x.views, y.views, strict=True))
        for x, y in zip(a, b, strict=True)
    )


# ---- raise ----


@pytest.mark.parametrize("name", list(BAD))
@pytest.mark.parametrize("workers", [0, 1])
def test_the_default_ends_with_one_sentence(name: str, workers: int, tmp_path: Path) -> None:
    folder(tmp_path, good=7, unreadable=False)
    (tmp_path / name).write_bytes(BAD[name][0])
    source = opened(tmp_path)
    with pytest.raises(ImageError, match=rf"^cannot read image \S*{name}: ") as caught:
        list(batches(source, plan(source), VIEWS, CPU, workers))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", list(BAD))
def test_an_error_has_kind_and_reason(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(BAD[name][0])
    with pytest.raises(ImageError) as caught:
        decode(tmp_path / name)
    assert caught.value.kind == BAD[name][1]
    assert caught.value.kind in FAULTS
    assert str(caught.value) == f"cannot read image {tmp_path / name}: {caught.value.reason}"


def test_a_resident_folder_with_unreadable_images_is_refused_unless_they_may_stay(mixed: Path) -> None:
    with pytest.raises(ImageError, match="cannot read image"):
        load_source(DataConfig("folder", str(mixed), resident=True))
    source = opened(mixed, resident=True)
    with pytest.raises(ImageError, match="cannot read image"):
        list(batches(source, plan(source), VIEWS, CPU, 0))


def test_a_resident_folder_of_only_unreadable_images_is_refused(tmp_path: Path) -> None:
    folder(tmp_path, good=0)
    with pytest.raises(ImageError, match="cannot read image"):
        opened(tmp_path, resident=True)


# ---- replace ----


def test_the_first_readable_substitute_replaces_an_unreadable_image(mixed: Path) -> None:
    source = opened(mixed)
    good = [i for i in range(len(source)) if source.name(i) not in BAD]
    shown, _ = replaced(source)
    seen = set()
    for (epoch, wanted), batch in zip(plan(source).samples(0), shown, strict=True):
        for row, i in enumerate(wanted.tolist()):
            expected = next(each for each in (i, *substitutes(i, len(source))) if each in good)
            assert batch.index[row] == expected
            for stream, view in enumerate(VIEWS):  # with the random numbers of the original image
                crop = crop_one(source.image(expected), draw_crop(5, epoch, np.array([i]), stream)[0], view)
                torch.testing.assert_close(batch.views[stream][row], crop.float() / 255)
            seen.add(i)
    assert seen - set(good)  # some of them are unreadable


@pytest.mark.parametrize("workers", [1, 2])
def test_substitutes_do_not_depend_on_the_number_of_workers(mixed: Path, workers: int) -> None:
    source = opened(mixed)
    expected, found = replaced(source)
    got, again = replaced(source, workers=workers)
    assert equal(got, expected)
    assert again == found
    assert {source.name(i) for i in found} <= set(BAD)


@pytest.mark.parametrize("start", [1, 3, 4])
def test_substitutes_do_not_depend_on_the_point_of_resume(mixed: Path, start: int) -> None:
    source = opened(mixed)
    assert equal(replaced(source, start=start, workers=2)[0], replaced(source)[0][start:])


def test_substitutes_do_not_depend_on_the_number_of_processes(mixed: Path) -> None:
    source = opened(mixed)
    expected, found = replaced(source)
    shares = [replaced(source, plan(source, rank, 2)) for rank in range(2)]
    together = [
        Batch(torch.cat([a.index, b.index]), [torch.cat(pair) for pair in zip(a.views, b.views, strict=True)])
        for a, b in zip(shares[0][0], shares[1][0], strict=True)
    ]
    assert equal(together, expected)
    assert shares[0][1] | shares[1][1] == found


def test_substitutes_of_a_resident_folder_are_the_same(mixed: Path) -> None:
    expected, found = replaced(opened(mixed))
    source = opened(mixed, resident=True)
    got, all_bad = replaced(source)
    assert equal(got, expected)
    assert {source.name(i) for i in all_bad} == set(BAD)  # a resident source knows them from the start
    assert found.items() <= all_bad.items()


def test_odd_images_are_not_replaced(tmp_path: Path) -> None:
    folder(tmp_path, good=0, unreadable=False, odd=True)
    source = opened(tmp_path)
    shown, found = replaced(source, Plan(len(source), len(source), 2, 0))
    assert found == {}
    assert sorted(shown[0].index.tolist()) == list(range(len(odd_files())))
    assert all(view.isfinite().all() and view.shape[1:] == (3, 16, 16) for batch in shown for view in batch.views)


def test_a_file_that_is_removed_during_training_is_replaced(tmp_path: Path) -> None:
    folder(tmp_path, good=8, unreadable=False)
    source = opened(tmp_path)
    found: dict[int, str] = {}
    stream = batches(source, plan(source), VIEWS, CPU, 0, on_unreadable=found.update)
    assert sorted(next(stream).index.tolist()) == list(range(8))
    assert found == {}
    (tmp_path / "03.png").unlink()
    batch = next(stream)
    assert found == {3: "No such file or directory"}
    first = next(each for each in substitutes(3, 8) if each != 3)
    assert sorted(batch.index.tolist()) == sorted([0, 1, 2, first, 4, 5, 6, 7])


def test_substitutes_are_a_function_of_the_index_and_uniform() -> None:
    assert substitutes(7, 1000) == substitutes(7, 1000)
    assert substitutes(7, 1000) != substitutes(8, 1000)
    drawn = np.array([substitutes(i, 10) for i in range(300)])
    assert drawn.shape == (300, TRIES)
    share = np.bincount(drawn.ravel(), minlength=10) / drawn.size
    assert np.abs(share - 0.1).max() < 5 * np.sqrt(0.09 / drawn.size)
    # Successive images have different substitutes.
    assert len({substitutes(i, 10_000)[0] for i in range(1000)}) > 900


def test_a_run_ends_if_no_image_can_be_read(tmp_path: Path) -> None:
    folder(tmp_path, good=8, unreadable=False)
    source = opened(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(ImageError, match=rf"\.png: No such file.*; {TRIES} substitutes .* disk"):
        image_or_substitute(source, 0, {})
    for workers in (0, 1):
        with pytest.raises(ImageError, match="substitutes cannot be read either"):
            replaced(source, workers=workers)


# ---- the list ----


def listed(file: Path) -> list[tuple[str, str]]:
    with file.open(newline="", encoding="utf-8", errors="surrogateescape") as lines:
        return [(row["path"], row["reason"]) for row in csv.DictReader(lines)]


def test_the_list_contains_each_unreadable_image_once(mixed: Path, tmp_path: Path) -> None:
    source = opened(mixed)
    unreadable = UnreadableImages(source, tmp_path / "bad_images.csv", max_fraction=0.9)
    assert unreadable.synchronize() == 0
    assert not unreadable.file.exists()
    list(batches(source, plan(source), VIEWS, CPU, 2, 0, unreadable.note))
    assert unreadable.synchronize() == len(unreadable.found) > 0
    assert unreadable.synchronize() == 0
    names = [name for name, _ in listed(unreadable.file)]
    assert names == sorted(set(names))
    assert set(names) <= set(BAD)
    assert dict(listed(unreadable.file)).get("empty.jpg", "the file is empty") == "the file is empty"


def test_too_many_unreadable_images_end_the_run_after_listing_them(mixed: Path, tmp_path: Path) -> None:
    source = opened(mixed)  # 9 readable, 7 unreadable
    for fraction, ends in ((7 / 16, False), (0.43, True)):
        unreadable = UnreadableImages(source, tmp_path / f"{fraction}.csv", fraction)
        unreadable.note(reasons(source))
        if not ends:
            assert unreadable.synchronize() == 7
            continue
        with pytest.raises(ImageError, match=r"7 of the 16 training images cannot be read, more than data\.max_bad="):
            unreadable.synchronize()
    assert len(listed(tmp_path / "0.43.csv")) == 7


def test_a_resumed_run_reads_the_list_and_removes_repaired_images(mixed: Path, tmp_path: Path) -> None:
    root = folder(tmp_path / "images", good=9)
    source, file = opened(root), tmp_path / "bad_images.csv"
    unreadable = UnreadableImages(source, file, 0.9)
    unreadable.note(reasons(source))
    unreadable.synchronize()
    before = dict(unreadable.found)
    assert UnreadableImages(source, file, 0.9).found == before
    noise().save(root / "empty.jpg")
    assert set(before) - set(UnreadableImages(source, file, 0.0).found) == {
        i for i in before if source.name(i) == "empty.jpg"
    }
    assert "empty.jpg" not in dict(listed(file))
    for name in BAD:
        noise().save(root / name)
    assert UnreadableImages(source, file, 0.9).found == {}
    assert not file.exists()


def test_a_list_of_other_images_is_ignored(mixed: Path, tmp_path: Path) -> None:
    source, file = opened(mixed), tmp_path / "bad_images.csv"
    unreadable = next(i for i in range(len(source)) if source.name(i) in BAD)
    file.write_text(
        f"index,path,reason\n{unreadable},other.png,empty\n99,empty.jpg,empty\n-1,{source.name(-1)},empty\n"
    )
    assert UnreadableImages(source, file, 0.9).found == {}


def test_an_invalid_list_is_refused(mixed: Path, tmp_path: Path) -> None:
    file = tmp_path / "bad_images.csv"
    file.write_text("index,path\nfirst,a.png\n")
    with pytest.raises(ConfigError, match=r"bad_images\.csv is damaged: remove it"):
        UnreadableImages(opened(mixed), file, 0.1)


def test_names_that_are_not_utf8_keep_their_bytes(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", good=2, unreadable=False)
    name = os.fsdecode(b'caf\xe9, "1".png')
    (root / name).write_bytes(b"")
    unreadable = UnreadableImages(opened(root), tmp_path / "bad_images.csv", 0.9)
    unreadable.note({2: "the file is empty"})
    unreadable.synchronize()
    assert listed(unreadable.file) == [(name, "the file is empty")]
    assert UnreadableImages(opened(root), unreadable.file, 0.9).found == {2: "the file is empty"}


def _synchronized(root: str, file: str) -> tuple[dict[int, str], int, list[str], str]:
    """On each rank, note half of the unreadable images; both ranks note the first."""
    source = opened(Path(root))
    all_bad = reasons(source)
    me = torch.distributed.get_rank()
    mine = {i: why for number, (i, why) in enumerate(sorted(all_bad.items())) if number % 2 == me or number == 0}
    unreadable = UnreadableImages(source, Path(file), 0.9)
    unreadable.note(mine)
    new = unreadable.synchronize()
    kept, left_out = without_unreadable(source, "reference images", 0.9)
    assert left_out == all_bad
    few = UnreadableImages(source, Path(f"{file}.few.csv"), 0.1)
    few.note(mine)
    with pytest.raises(ImageError) as caught:
        few.synchronize()
    return unreadable.found, new, [kept.name(i) for i in range(len(kept))], str(caught.value)


def test_all_ranks_have_the_images_that_each_found(mixed: Path, tmp_path: Path) -> None:
    file = tmp_path / "bad_images.csv"
    first, second = run_ranks(2, _synchronized, str(mixed), str(file), fork=True)
    assert first == second
    found, new, kept, sentence = first
    assert found == reasons(opened(mixed))
    assert (new, kept) == (7, [f"{i:02}.png" for i in range(9)])
    assert "7 of the 16 training images" in sentence
    assert {name for name, _ in listed(file)} == set(BAD)


# ---- references ----


@pytest.mark.parametrize("resident", [False, True])
def test_unreadable_references_are_excluded_with_their_labels(resident: bool, tmp_path: Path) -> None:
    for label in "ab":
        folder(tmp_path / label, good=3, unreadable=False)
    (tmp_path / "a/01.png").write_bytes(b"")
    source = load_source(
        DataConfig("folder", str(tmp_path), labels="folder", resident=resident), keep_unreadable=True
    ).train
    kept, unreadable = without_unreadable(source, "held-out images", 0.2)
    assert unreadable == {1: "the file is empty"}
    assert [kept.name(i) for i in range(5)] == ["a/00.png", "a/02.png", "b/00.png", "b/01.png", "b/02.png"]
    assert kept.labels is not None
    assert kept.labels.tolist() == [0, 0, 1, 1, 1]
    for i, j in enumerate((0, 2, 3, 4, 5)):
        assert torch.equal(kept.image(i), source.image(j))
    with pytest.raises(ImageError, match=r"1 of the 6 held-out images .*data\.max_bad=0\.1.*a/01\.png"):
        without_unreadable(source, "held-out images", 0.1)


def test_a_subset_of_a_resident_source_keeps_its_unreadable_rows() -> None:
    images: Tensor = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    source = ArraySource(images, list("abcd"), unreadable={2: ImageError("c is unreadable")})
    part = source.subset(np.array([3, 2]))
    assert (part.image(0) == 3).all()
    with pytest.raises(ImageError, match="c is unreadable"):
        part.image(1)


@pytest.mark.usefixtures("fixed_temporary_names")
def test_a_list_that_cannot_be_written_keeps_the_previous_one(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", good=9)
    source, file = opened(root), tmp_path / "bad_images.csv"
    found = reasons(source)
    first = min(found)
    unreadable = UnreadableImages(source, file, 0.9)
    unreadable.note({first: found[first]})
    unreadable.synchronize()
    unreadable.note(found)
    file.with_name("bad_images.csv.tmp").symlink_to("/dev/full")
    with pytest.raises(WriteError, match=r"bad_images\.csv cannot be written \(No space left on device\)"):
        unreadable.synchronize()
    assert [name for name, _ in listed(file)] == [source.name(first)]
    assert not file.with_name("bad_images.csv.tmp").is_symlink()
    file.with_name("bad_images.csv.tmp").write_text("torn by a kill")
    again = UnreadableImages(source, file, 0.9)
    again.note(found)
    assert again.synchronize() == len(found) - 1
    assert len(listed(file)) == len(found)
