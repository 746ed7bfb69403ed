"""Memory: the peak of the process, glibc's settings, and the error when memory runs out."""

import os
import re
import resource

import pytest
import torch

from moco.runtime.memory import OutOfMemory, explain_out_of_memory, keep_freed_memory, peak_memory, training_fix

CPU = torch.device("cpu")


def test_peak_memory_is_that_of_the_process() -> None:
    assert peak_memory(CPU) == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert peak_memory(CPU) > 2**26


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_an_allocator_set_by_the_user_is_unchanged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert keep_freed_memory() is False


def test_glibc_keeps_freed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("MALLOC_", "GLIBC_TUNABLES")):
            monkeypatch.delenv(name)
    calls = []

    class Library:
        @staticmethod
        def mallopt(number: int, value: int) -> int:
            calls.append((number, value))
            return 1

    monkeypatch.setattr("moco.runtime.memory.ctypes.CDLL", lambda name: Library)
    assert keep_freed_memory() is True
    assert {number for number, _ in calls} == {-4, -1, -2}


def test_out_of_memory_is_reported_in_one_sentence() -> None:
    fix = training_fix(256, 2, 2, 32, on_gpu=False, precision="fp32")
    expected = (
        r"out of memory on cpu: \d+\.\d of \d+\.\d GiB .*; a micro-batch has 64 images \(batch_size=256 / 2 "
        r"processes / accumulate=2\): set accumulate=4 .*smaller batch_size"
    )
    with pytest.raises(OutOfMemory, match=expected), explain_out_of_memory(CPU, fix):
        torch.empty(2**60)
    assert "precision=bf16" in training_fix(256, 1, 1, 32, on_gpu=True, precision="fp32")


@pytest.mark.parametrize(("group", "accumulate"), [(32, 4), (64, None), (16, 4), (3, 4), (None, None)])
def test_the_advised_number_of_micro_batches_has_complete_bn_groups(group: int | None, accumulate: int | None) -> None:
    fix = training_fix(288 if group == 3 else 256, 2, 2, group, on_gpu=False, precision="fp32")
    assert re.findall(r"set accumulate=(\d+)", fix) == ([str(accumulate)] if accumulate else [])


@pytest.mark.parametrize("error", [RuntimeError("boom"), NotImplementedError("no"), RecursionError("again")])
def test_other_errors_are_unchanged(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)), explain_out_of_memory(CPU, "use less"):
        raise error
