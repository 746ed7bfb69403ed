"""Fixtures for all tests."""

import os
import signal
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # of this process and of the commands that it starts, see `one_thread`

import hypothesis
import pytest
import torch

# Without a GPU, Triton computes kernels in Python. It reads this when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The same examples on every machine and in every run; a run leaves no folder of examples behind.
hypothesis.settings.register_profile(
    "moco",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("moco")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Use one thread: tensors are tiny and several processes share two cores, so this is several times faster."""
    torch.set_num_threads(1)


@pytest.fixture
def fixed_temporary_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `atomic_write` write NAME to NAME.tmp, so that a link of that name to /dev/full is a full disk for it."""
    monkeypatch.setattr("moco.files.temporary_name", lambda path: Path(f"{path}.tmp"))


@pytest.fixture(autouse=True)
def interruptible() -> None:
    """Restore the signals that stop a run: a shell, nohup or an earlier test may ignore them, and so would the run."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU):
        signal.signal(each, signal.SIG_DFL)
