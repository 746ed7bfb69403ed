"""What all tests share."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tests work on tiny tensors, and several processes share two cores: one thread each is several times faster."""
    torch.set_num_threads(1)
