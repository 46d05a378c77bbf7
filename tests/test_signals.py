import os
import signal
import time

import pytest

from clsa.signals import Stop, stop_on_signals


def test_a_signal_raises_a_flag_and_the_old_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stop:
        assert stop.level == 0 and stop.reason(0) == ""
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.level == 3 and stop.reason(3) == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_interrupt_leaves_at_once() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job ignores it
    try:
        with stop_on_signals() as stop, pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.level == 3
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        signal.signal(signal.SIGINT, before)


def test_nohup_stays_in_force() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.level == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_deadline_ranks_below_a_signal_and_is_told_to_the_other_ranks() -> None:
    late, patient = Stop(max_minutes=0.0), Stop()
    time.sleep(0.01)
    assert (late.level, patient.level) == (1, 0)
    agreed = max(late.level, patient.level)
    assert late.reason(agreed) == patient.reason(agreed) == "max_minutes"
    late.ask(signal.SIGUSR1, None)
    assert late.reason(3) == "SIGUSR1" and patient.reason(3) == "another process was stopped"
