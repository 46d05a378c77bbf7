import os
import signal
import subprocess
import sys
import time

import pytest

from clsa.system.errors import Exit
from clsa.system.signals import Asked, Stop, asked, check, held_back, stop_on_signals


def test_a_signal_raises_a_flag_and_the_old_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stop:
        assert stop.level == 0 and stop.reason(0) == ""
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.level == 3 and stop.reason(3) == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_interrupt_leaves_at_once() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
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


def test_the_deadline_ranks_below_a_signal_and_reaches_the_other_ranks() -> None:
    late, patient = Stop(max_minutes=0.0), Stop()
    time.sleep(0.01)
    assert (late.level, patient.level) == (1, 0)
    agreed = max(late.level, patient.level)
    assert late.reason(agreed) == patient.reason(agreed) == "max_minutes"
    late.ask(signal.SIGUSR1, None)
    assert (late.level, late.reason(3), patient.reason(3)) == (
        4, "SIGUSR1", "a signal to another process",
    )  # fmt: skip


def test_all_ranks_know_that_one_was_asked_to_be_queued_again() -> None:
    warned, ended = Stop(), Stop()
    warned.ask(signal.SIGUSR1, None)
    warned.ask(signal.SIGTERM, None)
    ended.ask(signal.SIGTERM, None)
    agreed = max(warned.level, ended.level, Stop().level)
    assert {stop.reason(agreed) for stop in (warned, ended, Stop())} == {"SIGUSR1"}


def test_the_handlers_of_leave_at_once_are_gone_once_a_run_has_begun() -> None:
    code = (
        "import os, signal; from clsa.system import signals; signals.leave_at_once()\n"
        "with signals.stop_on_signals(): pass\n"
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGTERM)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, "True\n", "")


def test_nested_listeners_share_their_signals() -> None:
    check()
    with stop_on_signals() as outer:
        with stop_on_signals() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            assert (asked(), inner.signal_name, outer.signal_name) == ("SIGTERM", "SIGTERM", "")
            with pytest.raises(Asked, match="SIGTERM"):
                check()
        assert outer.signal_name == asked() == "SIGTERM"
        with stop_on_signals() as later:
            assert later.level == 3
    assert asked() == ""
    check()


def test_signals_wait_while_they_are_held_back_and_children_never_get_them() -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGTERM); print('lives')"
    with stop_on_signals() as stop:
        with held_back():
            signal.raise_signal(signal.SIGTERM)  # to this thread
            assert stop.level == 0
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert stop.level == 3 and done.stdout == "lives\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_before_a_run_begins_a_signal_ends_the_process_with_75(number: int) -> None:
    code = (
        "import os, signal; from clsa.system import signals; "
        f"signal.signal({int(number)}, signal.SIG_DFL); signals.leave_at_once(); "
        f"os.kill(os.getpid(), {int(number)}); print('lives')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    name = signal.Signals(number).name
    assert (done.returncode, done.stdout) == (Exit.PREEMPTED, "")
    assert done.stderr == f"error: stopped by {name} - there was nothing to save - run it again\n"


def test_the_command_handles_signals_before_it_imports_anything_slow() -> None:
    code = """
import sys
from clsa import __main__
def found(name, *_):
    if name in ("torch", "tyro", "pydantic", "clsa.cli.main"):
        import os, signal
        os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, type("Finder", (), {"find_spec": staticmethod(found)}))
sys.argv = ["clsa", "pretrain"]
__main__.console()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == Exit.PREEMPTED and done.stderr.startswith("error: stopped by SIGTERM")
