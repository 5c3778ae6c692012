"""Requests to stop: which signals make one, what it costs, and what is saved before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from integration.launch import environment
from searchrl.config import ConfigError
from searchrl.errors import CleanStop, SearchrlError
from searchrl.failures import TooManyFailures, check_failures
from searchrl.preemption import Preempted, StopRequest, saved_before_stop
from searchrl.watch import CollapseError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (TooManyFailures("x"), 1),
        (CollapseError("x"), 1),
        (Preempted(signal.SIGTERM), 75),
        (Preempted(signal.SIGUSR1), 75),
        (Preempted(signal.SIGINT), 130),
    ],
)
def test_exit_codes(error: SearchrlError, code: int) -> None:
    assert error.exit_code == code
    assert isinstance(error, CleanStop) == (code != 2)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_noticed_while_somebody_listens(
    sent: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    stop = StopRequest()
    try:
        with stop:
            assert stop.gather("value") == ["value"]
            os.kill(os.getpid(), sent)
            os.kill(os.getpid(), signal.SIGUSR1)  # again: changes nothing
            assert stop.asked is sent
            with pytest.raises(Preempted, match=f"stopped by {sent.name}; resume=true continues"):
                stop.gather("value")
        os.kill(os.getpid(), signal.SIGTERM)  # at the end of the run, too
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert capfd.readouterr().err == f"searchrl: {sent.name}: stopping; from now on Ctrl-C leaves at once\n"


def test_without_a_request_signals_do_again_what_they_did() -> None:
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with StopRequest():
        pass
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


def test_the_second_ctrl_c_leaves_at_once() -> None:
    body = """
import os, signal, time
from searchrl.preemption import StopRequest
with StopRequest():
    os.kill(os.getpid(), signal.SIGINT)
    print("goes on", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""
    ended = subprocess.run(
        [sys.executable, "-c", body],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        # A shell that starts this in the background lets Ctrl-C be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (ended.returncode, ended.stdout) == (-signal.SIGINT, "goes on\n")


@pytest.mark.parametrize(
    ("raised", "saved"),
    [
        (None, []),
        (TooManyFailures("x"), [7]),
        (Preempted(signal.SIGTERM), [7]),
        (ValueError("a fault: what is in memory may be damaged"), []),
    ],
)
def test_a_stop_is_preceded_by_a_checkpoint_and_a_fault_is_not(
    raised: Exception | None, saved: list[int]
) -> None:
    done: list[int] = []
    said: list[str] = []
    caught = None
    try:
        with saved_before_stop(7, save=done.append, say=said.append):
            if raised is not None:
                raise raised
    except Exception as error:
        caught = error
    assert caught is raised
    assert done == saved
    assert said == ["saved after step 7; resume=true continues"] * len(saved)


@pytest.mark.parametrize(("asked", "raised"), [(None, TooManyFailures), (signal.SIGUSR1, Preempted)])
def test_what_a_stop_interrupted_is_not_judged(asked: signal.Signals | None, raised: type[CleanStop]) -> None:
    stop = StopRequest()
    if asked is not None:
        stop.ask(asked)
    with pytest.raises(raised):
        check_failures(["lost"], 1, max_failed_fraction=0.0, stop=stop)
