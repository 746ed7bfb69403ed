"""Steps that are not finite: named, kept for study, skipped up to a limit, or read one step late."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moco.data.plan import Plan
from moco.distributed import rank
from moco.runtime.errors import NonFiniteLoss
from moco.training.nonfinite import NonFiniteGuard
from tests.distributed.launch import run_ranks

PLAN = Plan(length=40, batch_size=10, epochs=2, seed=0)
INDEX = torch.arange(30, 40)


def steps(folder: Path, late: bool = False, limit: int = 0, said: list[str] | None = None) -> NonFiniteGuard:
    lines = [] if said is None else said
    return NonFiniteGuard(PLAN, late, limit, 0, folder, lambda: {"method": {"w": torch.ones(2)}}, lines.append)


def good(loss: float = 1.0) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"loss": torch.tensor(loss), "gradient_norm": torch.tensor(2.0)}


def bad() -> dict[str, Tensor]:
    raise NonFiniteLoss("loss nan, gradient norm nan")


def test_a_bad_step_ends_the_run_and_its_state_is_kept(tmp_path: Path) -> None:
    finite = steps(tmp_path / "nonfinite")
    expected = (
        r"step 6 \(epoch 2, batch 2 of 4; rank 0 had samples 30, 31, .*\) gave loss nan, gradient norm nan\. The "
        r"weights, the queue and the last checkpoint are untouched, and .*step_6\.pt holds the state"
    )
    with pytest.raises(NonFiniteLoss, match=expected):
        finite.run(5, INDEX, bad)
    kept = torch.load(tmp_path / "nonfinite" / "step_6.pt", weights_only=True)
    assert (kept["step"], kept["epoch"], kept["what"]) == (5, 1, "loss nan, gradient norm nan")
    assert kept["index"].tolist() == INDEX.tolist()
    assert (kept["world_size"], kept["rank"]) == (1, 0)
    assert kept["method"]["w"].tolist() == [1, 1]


def test_so_many_are_skipped_and_no_more(tmp_path: Path) -> None:
    said: list[str] = []
    finite = steps(tmp_path, limit=2, said=said)
    assert finite.run(0, INDEX, bad) is None
    assert finite.run(1, INDEX, good()) is not None
    assert finite.run(2, INDEX, bad) is None
    assert finite.skipped == 2
    assert ["step 1 gave" in said[0], "1 of at most optim.skip_nonfinite=2" in said[0]] == [True, True]
    assert "step 3 gave" in said[1]
    with pytest.raises(NonFiniteLoss, match="step 4 "):
        finite.run(3, INDEX, bad)
    assert [file.name for file in tmp_path.iterdir()] == ["step_1.pt"]  # one is enough to study


@pytest.mark.parametrize("broken", ["loss", "gradient_norm"])
def test_late_a_step_is_read_behind_the_next(broken: str, tmp_path: Path) -> None:
    def measures() -> dict[str, Tensor]:
        return good()() | {broken: torch.tensor(math.inf)}

    finite = steps(tmp_path, late=True)
    assert finite.run(0, INDEX, good()) is not None
    assert finite.run(1, INDEX, measures) is not None
    with pytest.raises(
        NonFiniteLoss, match=rf"step 2 .*{broken.replace('_', ' ')} inf.*The last checkpoint is untouched"
    ):
        finite.run(2, INDEX, good())


def test_late_before_saving_the_newest_step_is_read_too(tmp_path: Path) -> None:
    finite = steps(tmp_path, late=True)
    finite.run(0, INDEX, good())
    finite.settle()
    finite.settle()  # nothing is pending
    finite.run(1, INDEX, good(math.nan))
    with pytest.raises(NonFiniteLoss, match="step 2 "):
        finite.settle()


def test_a_state_that_cannot_be_kept_hides_nothing_and_the_next_is(tmp_path: Path) -> None:
    """A full disk under the file, then a torn file of an earlier attempt, then room."""
    said: list[str] = []
    finite = steps(tmp_path, limit=2, said=said)
    (tmp_path / "step_6.pt.tmp").symlink_to("/dev/full")
    assert finite.run(5, INDEX, bad) is None
    assert said[0].endswith(
        f"skip_nonfinite=2 (the state could not be kept: {tmp_path}/step_6.pt: No space left on device)"
    )
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "step_7.pt.tmp").write_bytes(b"torn")
    with pytest.raises(NonFiniteLoss, match=r"untouched, and .*step_7\.pt holds the state before the first such step"):
        steps(tmp_path).run(6, INDEX, bad)
    assert [each.name for each in tmp_path.iterdir()] == ["step_7.pt"]
    shut = tmp_path / "file" / "nonfinite"
    shut.parent.touch()
    with pytest.raises(NonFiniteLoss, match=r"step 6 .* gave loss nan.*untouched \(the state could not be kept: "):
        steps(shut).run(5, INDEX, bad)


def of_rank(folder: str) -> str:
    """What this rank says of a step in which it had samples 10 r ... 10 r + 3."""
    with pytest.raises(NonFiniteLoss) as caught:
        steps(Path(folder)).run(0, 10 * rank() + torch.arange(4), bad)
    return str(caught.value)


def test_the_samples_of_all_ranks_are_kept_in_their_order(tmp_path: Path) -> None:
    sentences = run_ranks(2, partial(of_rank, str(tmp_path)))
    kept = torch.load(tmp_path / "step_1.pt", weights_only=True)
    assert kept["index"].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert (kept["world_size"], kept["rank"]) == (2, 0)
    assert "rank 1 had samples 10, 11, 12, 13" in sentences[1]
    assert all("step_1.pt holds the state" in each for each in sentences)
