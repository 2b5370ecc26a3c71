from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from retrofit.training import guard


def test_the_first_signal_is_noted_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with guard.SignalGuard() as signals:
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == "SIGUSR1"
        os.kill(os.getpid(), signal.SIGTERM)  # an echo within two seconds
        assert signals.received == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_second_signal_ends_the_process_at_once() -> None:
    code = (
        "import os, signal\nfrom retrofit.training import guard\nguard.ECHO_SECONDS = 0\n"
        "with guard.SignalGuard():\n    os.kill(os.getpid(), 15)\n    os.kill(os.getpid(), 15)\nprint('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 128 + 15 and done.stdout == ""


def test_the_exit_codes_are_the_documented_ones() -> None:
    assert (guard.Preempted().code, guard.NotFinite().code, guard.EXIT_HANGING) == (75, 3, 4)


@pytest.mark.parametrize("offending", [[], [17]])
def test_a_divergence_names_step_draws_and_last_good_checkpoint(offending: list[int]) -> None:
    text = guard.describe_divergence(
        step=3, what="loss", value=float("nan"), ordinals=range(16, 24), offending=offending, last_good="run/step-2"
    )
    assert all(part in text for part in ("step 3", "nan", "16 to 23", "run/step-2", *map(str, offending)))
    assert "\n" not in text


def test_the_time_limit_counts_from_the_start_of_the_process() -> None:
    began = time.time() - psutil.Process().create_time()
    with guard.SignalGuard() as signals:
        signals.stop_after((began + 0.5) / 60)
        assert signals.received is None
        time.sleep(0.6)
        assert signals.received == guard.TIME_LIMIT
        os.kill(os.getpid(), signal.SIGTERM)  # the first signal, not a second one
        assert signals.received == "SIGTERM"
    late = guard.SignalGuard()
    late.stop_after(None)
    assert late.received is None
    late.stop_after(began / 120)
    assert late.received == guard.TIME_LIMIT
