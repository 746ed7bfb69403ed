"""gather_with_gradient: every rank's loss reaches every rank's rows, scaled so that DDP's average is exact."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.distributed import gather, gather_with_gradient, mean_over_ranks, rank, world_size
from tests.distributed.launch import run_ranks

BATCH, T = 8, 0.5


def parameter_gradient(encoder: nn.Linear, x: Tensor, y: Tensor, with_gradient: bool) -> Tensor:
    """Of a loss that is the mean over this rank's own queries against all ranks' keys."""
    share = len(x)
    keys = F.normalize(encoder(y), dim=1)
    keys = gather_with_gradient(keys) if with_gradient else gather(keys)
    labels = rank() * share + torch.arange(share)
    loss = F.cross_entropy(F.normalize(encoder(x), dim=1) @ keys.T / T, labels)
    return torch.autograd.grad(loss, encoder.weight)[0]


def gradients() -> dict[str, Tensor]:
    share = BATCH // world_size()
    mine = slice(rank() * share, (rank() + 1) * share)
    rows = torch.arange(BATCH * 6.0).view(BATCH, 2, 3)[mine].requires_grad_()
    gathered = gather_with_gradient(rows)
    # rank r weighs global row i by (r + 1) (i + 1); transposed, so that the gradient arrives not contiguous
    weight = (rank() + 1) * torch.arange(1.0, BATCH + 1)
    (gathered.transpose(0, 2) * weight).sum().backward()
    assert rows.grad is not None
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, BATCH, 5, generator=generator)
    torch.manual_seed(1)
    encoder = nn.Linear(5, 4, bias=False)
    return {
        "gathered": gathered.detach(),
        "row_gradient": rows.grad,
        "average": mean_over_ranks(parameter_gradient(encoder, x[mine], y[mine], with_gradient=True)),
        "without": mean_over_ranks(parameter_gradient(encoder, x[mine], y[mine], with_gradient=False)),
    }


@cache
def on(world: int) -> list[dict[str, Tensor]]:
    return run_ranks(world, gradients)


def test_rows_come_in_order_and_their_gradient_is_the_sum_over_ranks() -> None:
    for r, result in enumerate(on(2)):
        assert torch.equal(result["gathered"], torch.arange(BATCH * 6.0).view(BATCH, 2, 3))
        expected = (1 + 2) * torch.arange(1.0, BATCH + 1)[4 * r : 4 * r + 4]
        assert torch.equal(result["row_gradient"], expected[:, None, None].expand(4, 2, 3))


def test_the_average_over_ranks_is_the_gradient_of_one_process() -> None:
    (alone,) = on(1)
    for result in on(2):
        torch.testing.assert_close(result["average"], alone["average"], rtol=1e-5, atol=1e-7)
        assert (result["without"] - alone["average"]).abs().max() > 1e-2  # the plain gather loses the keys' part


def test_one_process_gets_its_own_tensor_back() -> None:
    x = torch.zeros(2, 3)
    assert gather_with_gradient(x) is x
