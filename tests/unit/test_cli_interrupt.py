"""Ctrl-C while a call runs: no exception where gRPC holds a lock."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from stagemesh.client.cli._interrupt import ctrl_c_calls


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """What Ctrl-C does in a terminal; to a process started in the background it does nothing."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_closes_and_the_second_interrupts() -> None:
    before, closed = signal.getsignal(signal.SIGINT), threading.Event()
    with pytest.raises(KeyboardInterrupt), ctrl_c_calls(closed.set) as pressed:  # noqa: PT012 - both presses in it
        assert not pressed.is_set()
        press()
        assert closed.wait(60)
        assert pressed.is_set()
        press()
        pressed.wait(60)
    assert signal.getsignal(signal.SIGINT) is before


def test_without_it_the_call_is_closed_at_the_end() -> None:
    before, closed = signal.getsignal(signal.SIGINT), threading.Event()
    with ctrl_c_calls(closed.set) as pressed:
        assert not closed.is_set()
    assert closed.is_set()
    assert not pressed.is_set()
    assert signal.getsignal(signal.SIGINT) is before
