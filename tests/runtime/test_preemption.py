"""Signals, the time limit, exit statuses, and agreement between ranks."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moco.config import config_dir
from moco.distributed import DelayedMaxOverRanks, rank, world_size
from moco.runtime.preemption import INTERRUPTED, PREEMPTED, STOP_SIGNALS, Preempted, PreemptionHandler, Reason
from tests.distributed.launch import run_ranks

SIGNALS = STOP_SIGNALS


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Restore the handlers after each test."""
    before = [signal.getsignal(each) for each in SIGNALS]
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered_instead_of_ending_the_process(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with PreemptionHandler(0) as stop, stop.stepping():
        assert stop.reason() is Reason.NONE
        send(number)
        assert stop.reason().name == stop.signal_received().name == number.name
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", [each for each in SIGNALS if each != signal.SIGINT])
def test_a_signal_before_the_first_step_is_remembered(number: signal.Signals) -> None:
    with PreemptionHandler(0) as stop:
        send(number)
        with stop.stepping():
            assert stop.reason().name == number.name


def test_outside_of_steps_the_first_interrupt_raises() -> None:
    with PreemptionHandler(0) as stop:
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        with stop.stepping():
            pass
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert stop.reason() is Reason.NONE


def test_the_second_interrupt_raises() -> None:
    with PreemptionHandler(0) as stop, stop.stepping():
        send(signal.SIGINT)
        assert stop.reason() is Reason.SIGINT
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_a_second_signal_of_another_kind_does_not_raise() -> None:
    with PreemptionHandler(0) as stop, stop.stepping():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            send(number)
        assert stop.reason() is Reason.SIGINT


def test_the_stop_signals_are_those_of_terminals_and_batch_systems() -> None:
    assert {each.name for each in SIGNALS} == {"SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU"}


def test_the_time_limit_counts_from_construction_and_zero_means_none() -> None:
    limited, free = PreemptionHandler(0.05 / 60), PreemptionHandler(0)
    assert limited.reason() is Reason.NONE
    time.sleep(0.06)
    assert limited.reason() is Reason.TIME_LIMIT
    assert limited.signal_received() is Reason.NONE
    assert free.reason() is Reason.NONE
    with limited:
        send(signal.SIGTERM)
        assert limited.reason() is Reason.SIGTERM


def test_ignored_signals_stay_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup and a script's & do
    with PreemptionHandler(0) as stop:
        send(signal.SIGINT)
        send(signal.SIGINT)
        assert stop.reason() is Reason.NONE
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("launched", [True, False])
def test_a_preempted_rank_ignores_sigterm_under_a_launcher(launched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if launched:
        monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun restarts one process, too
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted), PreemptionHandler(0):
        raise Preempted(Reason.SIGTERM, 1, 2)
    assert signal.getsignal(signal.SIGTERM) == (signal.SIG_IGN if launched else before)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # Ctrl-C still leaves


def test_the_handlers_are_restored_after_an_error_and_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="other"), PreemptionHandler(0):
        raise ValueError("other")
    assert signal.getsignal(signal.SIGTERM) == before
    with PreemptionHandler(0):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_outside_the_main_thread_only_the_time_limit_counts() -> None:
    reasons = []

    def run() -> None:
        with PreemptionHandler(1e-9) as stop:
            reasons.append(stop.reason())

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert reasons == [Reason.TIME_LIMIT]
    assert signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_has_a_status_of_its_own() -> None:
    statuses = {reason: Preempted(reason, 3, 9).status for reason in Reason}
    assert {reason for reason, status in statuses.items() if status == INTERRUPTED == 130} == {Reason.SIGINT}
    assert {status for reason, status in statuses.items() if reason is not Reason.SIGINT} == {PREEMPTED} == {75}
    assert "stopped by SIGTERM after step 3 of 9" in str(Preempted(Reason.SIGTERM, 3, 9))
    assert "stop_after" in str(Preempted(Reason.TIME_LIMIT, 3, 9))
    assert "stopped by SIGTERM before the first step" in str(Preempted(Reason.SIGTERM))
    for stopped in (Preempted(Reason.SIGINT, 3, 9), Preempted(Reason.SIGTERM)):  # ranks send it to each other
        received = pickle.loads(pickle.dumps(stopped))
        assert (str(received), received.status) == (str(stopped), stopped.status)


def test_importing_it_does_not_import_torch() -> None:
    code = "import sys, moco.runtime.preemption; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(config_dir()).parent)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def requests_and_answers() -> list[int]:
    """Rank 1 requests 3 in the second call and rank 0 requests 2 in the fourth."""
    requests = {1: [0, 3, 0, 0, 0], 0: [0, 0, 0, 2, 0]}[rank() if world_size() > 1 else 1]
    highest = DelayedMaxOverRanks(torch.device("cpu"))
    return [highest(each) for each in requests]


def test_several_ranks_get_the_maximum_one_call_late_and_one_process_immediately() -> None:
    assert run_ranks(2, requests_and_answers) == [[0, 0, 3, 0, 2]] * 2
    assert run_ranks(1, requests_and_answers) == [[0, 3, 0, 0, 0]]
