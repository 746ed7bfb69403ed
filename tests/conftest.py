"""What all tests share."""

import signal

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tests work on tiny tensors, and several processes share two cores: one thread each is several times faster."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """Whoever starts the tests in the background of a script has them ignore SIGINT, and their child processes too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
