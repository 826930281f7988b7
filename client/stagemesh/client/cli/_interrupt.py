"""Ctrl-C while a call of gRPC runs."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def ctrl_c_calls(close: Callable[[], None]) -> Iterator[threading.Event]:
    """Within it a Ctrl-C sets the event and calls `close`, in another thread; a second one raises KeyboardInterrupt.

    An exception out of the blue can leave a lock of gRPC taken (between its being acquired and the block that
    releases it), and whatever needs it next waits for ever: another call, or the end of the process.

    Args:
        close: Ends what the caller waits for; safe from another thread. It is called in any case.
    """
    pressed, over = threading.Event(), threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def on_signal(signum: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        pressed.set()
        over.set()

    def wait() -> None:
        over.wait()
        close()

    waiting = threading.Thread(target=wait, name="ctrl-c", daemon=True)
    waiting.start()
    signal.signal(signal.SIGINT, on_signal)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
        over.set()
        waiting.join()
