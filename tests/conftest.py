"""Fixtures for all tests."""

import signal

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Use one thread: tensors are tiny and several processes share two cores, so this is several times faster."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """Restore SIGINT, which a shell script ignores in background jobs and their child processes."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
