"""Who hears a signal, who is called, and when a process ends by it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zeropipe.errors import ConfigError
from zeropipe.runtime.resilience import signals
from zeropipe.runtime.resilience.signals import Signals, TimeLimit, launched

NUMBER = signal.SIGUSR1


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = signal.getsignal(NUMBER)
    yield
    signal.signal(NUMBER, before)


def sent() -> None:
    os.kill(os.getpid(), NUMBER)
    time.sleep(0)  # between two bytecodes the handler runs


def ends(act: Callable[[], None]) -> int:
    """How a fork that does ``act`` ends: 0, or the signal."""
    pid = os.fork()
    if pid == 0:
        signal.signal(NUMBER, signal.SIG_DFL)
        act()
        os._exit(0)
    return os.WTERMSIG(os.waitpid(pid, 0)[1])


def test_a_first_signal_is_noted_and_whoever_heard_it_before_is_called() -> None:
    called: list[int] = []
    signal.signal(NUMBER, lambda number, _: called.append(number))
    heard = Signals(["SIGUSR1"])
    assert heard.heard is None
    sent()
    assert (heard.heard, called) == (NUMBER, [NUMBER])
    heard.close()
    sent()
    assert called == [NUMBER, NUMBER]


def test_a_handler_that_the_program_sets_later_is_called_too() -> None:
    called: list[int] = []
    heard = Signals(["SIGUSR1"])
    ours = signal.getsignal(NUMBER)

    def theirs(number: int, frame: object) -> None:
        called.append(number)
        ours(number, frame)  # as a program does that keeps what it found

    signal.signal(NUMBER, theirs)
    heard.listen()  # at every boundary
    sent()
    assert (heard.heard, called) == (NUMBER, [NUMBER])
    heard.close()
    assert signal.getsignal(NUMBER) is theirs


def test_ctrl_c_is_a_request_too_and_the_second_one_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own handler ended the step by KeyboardInterrupt, though the run was to save."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        heard = Signals(["SIGUSR1"])
        heard.hear(["SIGINT"])
        signal.raise_signal(signal.SIGINT)
        assert heard.heard == signal.SIGINT
        monkeypatch.setattr(signals, "TWICE", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        heard.close()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_two_engines_hear_the_same_signal_and_close_in_any_order() -> None:
    first, second = Signals(["SIGUSR1"]), Signals(["SIGUSR1"])
    sent()
    assert (first.heard, second.heard) == (NUMBER, NUMBER)
    first.close()
    second.close()
    assert ends(lambda: sent()) == NUMBER


@pytest.mark.parametrize("saving", [False, True])
def test_a_second_signal_ends_the_process_unless_it_saves(
    monkeypatch: pytest.MonkeyPatch, saving: bool
) -> None:
    def twice() -> None:
        heard = Signals(["SIGUSR1"])
        sent()
        sent()  # the same request: a scheduler signals the launcher, which hands it on, and the ranks
        monkeypatch.setattr(signals, "TWICE", 0.0)
        if saving:
            heard.finish_saving()
        sent()

    assert ends(twice) == (0 if saving else NUMBER)


def test_where_a_neighbour_has_died_the_first_signal_ends_the_process() -> None:
    """torchrun stops the other ranks so, and a step that is minutes long would keep it waiting."""

    def hopeless() -> None:
        Signals(["SIGUSR1"], hopeless=lambda: "rank 1 has died")
        sent()

    assert ends(hopeless) == NUMBER


def test_a_forked_process_ends_by_the_signal() -> None:
    """A loader's worker has the handlers of its parent, and no boundary: ``terminate()`` did nothing."""
    heard = Signals(["SIGUSR1"])
    pid = os.fork()
    if pid == 0:
        sent()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == NUMBER
    assert heard.heard is None
    heard.close()


def test_the_end_of_the_time(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("JOB_END", str(time.time() + 100.0))
    limit = TimeLimit("JOB_END")
    assert not limit.is_near  # nothing is known of a save yet: a minute, and as much again would be too late
    limit.took("save", 30.0)
    limit.took("step", 15.0)
    assert not limit.is_near
    limit.took("step", 25.0)
    assert limit.is_near
    limit.took("step", 1.0)
    assert limit.is_near  # the next step may be as long as the longest


def test_minutes_count_from_the_start_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    born = time.time() - float(Path("/proc/uptime").read_text().split()[0])
    assert born < launched() <= time.time()
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    own = launched()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert launched() < own + 0.1  # to the tick
    assert TimeLimit((time.time() - own) / 60).is_near
    assert not TimeLimit(10**6).is_near
    assert not TimeLimit(None).is_near


def test_a_variable_that_is_not_there_is_no_limit_and_one_that_is_no_time_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("JOB_END", raising=False)
    assert not TimeLimit("JOB_END").is_near
    assert "names JOB_END, which is not set: no time limit" in caplog.text
    monkeypatch.setenv("JOB_END", "tomorrow")
    with pytest.raises(ConfigError, match=r"JOB_END.*expected a Unix time in seconds, found 'tomorrow'"):
        TimeLimit("JOB_END")
