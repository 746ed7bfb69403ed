"""Non-finite steps: reported, saved, skipped up to a limit, or detected one step later."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from moco.data.plan import Plan
from moco.distributed import all_gather_object, rank
from moco.runtime.errors import NonFiniteLoss
from moco.training.nonfinite import NonFiniteGuard
from moco.training.step import Measures
from tests.distributed.launch import run_ranks

PLAN = Plan(length=40, batch_size=10, epochs=2, seed=0)
INDEX = torch.arange(30, 40)
ERROR = NonFiniteLoss("loss nan, gradient norm nan")


def state() -> dict[str, Any]:
    """Return a state that all ranks must ask for together, as that of a sharded method."""
    return {"method": {"w": torch.ones(2)}, "ranks": len(all_gather_object(rank))}


def guard(folder: Path, in_step: bool = True, limit: int = 0, lines: list[str] | None = None) -> NonFiniteGuard:
    log = ([] if lines is None else lines).append
    return NonFiniteGuard(PLAN, in_step, limit, 0, folder, state, log)


def measures(loss: float = 1.0, gradient_norm: float = 2.0) -> Measures:
    return {"loss": torch.tensor(loss), "gradient_norm": torch.tensor(gradient_norm)}


def test_a_non_finite_step_ends_the_run_and_its_state_is_saved(tmp_path: Path) -> None:
    expected = r"step 6 \(epoch 2, batch 2 of 4; rank 0 had images 30, 31, .*loss nan, gradient norm nan.*step_6\.pt"
    with pytest.raises(NonFiniteLoss, match=expected):
        guard(tmp_path / "nonfinite").skip(5, INDEX, ERROR)
    saved = torch.load(tmp_path / "nonfinite" / "step_6.pt", weights_only=True)
    assert (saved["step"], saved["epoch"], saved["what"]) == (5, 1, "loss nan, gradient norm nan")
    assert saved["index"].tolist() == INDEX.tolist()
    assert (saved["world_size"], saved["rank"]) == (1, 0)
    assert saved["method"]["w"].tolist() == [1, 1]


def test_steps_are_skipped_up_to_the_limit(tmp_path: Path) -> None:
    lines: list[str] = []
    skipping = guard(tmp_path, limit=2, lines=lines)
    skipping.skip(0, INDEX, ERROR)
    skipping.check(1, INDEX, measures())
    skipping.skip(2, INDEX, ERROR)
    assert skipping.skipped == 2
    assert ["step 1 " in lines[0], "1 of at most optim.skip_nonfinite=2" in lines[0]] == [True, True]
    assert "step 3 " in lines[1]
    with pytest.raises(NonFiniteLoss, match="step 4 "):
        skipping.skip(3, INDEX, ERROR)
    assert [file.name for file in tmp_path.iterdir()] == ["step_1.pt"]  # only the first is saved


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_without_waiting_a_step_is_checked_after_the_next(name: str, tmp_path: Path) -> None:
    late = guard(tmp_path, in_step=False)
    late.check(0, INDEX, measures())
    late.check(1, INDEX, measures(**{name: math.inf}))
    with pytest.raises(NonFiniteLoss, match=rf"step 2 .*{name.replace('_', ' ')} inf.*the state after .*step_2\.pt"):
        late.check(2, INDEX, measures())


def test_without_waiting_the_newest_step_is_checked_before_saving(tmp_path: Path) -> None:
    late = guard(tmp_path, in_step=False)
    late.check(0, INDEX, measures())
    late.check_pending()
    late.check_pending()  # nothing is pending
    late.check(1, INDEX, measures(math.nan))
    with pytest.raises(NonFiniteLoss, match="step 2 "):
        late.check_pending()


@pytest.mark.usefixtures("fixed_temporary_names")
def test_a_state_that_cannot_be_saved_does_not_hide_the_step(tmp_path: Path) -> None:
    """A full disk, then a partial file of an earlier attempt, then a path that cannot be created."""
    lines: list[str] = []
    (tmp_path / "step_6.pt.tmp").symlink_to("/dev/full")
    guard(tmp_path, limit=2, lines=lines).skip(5, INDEX, ERROR)
    assert f"{tmp_path}/step_6.pt: No space left on device" in lines[0]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "step_7.pt.tmp").write_bytes(b"partial")
    with pytest.raises(NonFiniteLoss, match=r"the state before .*step_7\.pt"):
        guard(tmp_path).skip(6, INDEX, ERROR)
    assert [each.name for each in tmp_path.iterdir()] == ["step_7.pt"]
    (tmp_path / "file").touch()
    with pytest.raises(NonFiniteLoss, match=r"step 6 .*file/nonfinite/step_6\.pt: Not a directory"):
        guard(tmp_path / "file" / "nonfinite").skip(5, INDEX, ERROR)


def message_of_rank(folder: str) -> str:
    """Return the message of rank r, which had images 10 r ... 10 r + 3."""
    with pytest.raises(NonFiniteLoss) as caught:
        guard(Path(folder)).skip(0, 10 * rank() + torch.arange(4), ERROR)
    return str(caught.value)


def test_the_samples_of_all_ranks_are_saved_in_their_order(tmp_path: Path) -> None:
    messages = run_ranks(2, partial(message_of_rank, str(tmp_path)))
    saved = torch.load(tmp_path / "step_1.pt", weights_only=True)
    assert saved["index"].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert (saved["world_size"], saved["rank"], saved["ranks"]) == (2, 0, 2)
    assert "rank 1 had images 10, 11, 12, 13" in messages[1]
    assert all("step_1.pt" in each for each in messages)
