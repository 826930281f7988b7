"""Ends waits inside a device: for a step that is overdue or a link that failed (docs/architecture.md, "Faults")."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from stagemesh.stage.engine.interface import EngineLinks
from stagemesh.stage.worker.results import ResultThread

INTERVAL_S = 0.5


class Watchdog:
    """A thread that looks now and then; it starts with the first step that a device runs.

    The launch thread may be stuck inside NCCL when it acts, so it shares nothing with it but what it is given.

    Args:
        results: Knows the oldest step under way.
        links: Know whether they failed.
        timeout_s: Of a step.
        on_broken: Called with what is wrong, once for each thing that is.
    """

    def __init__(
        self, results: ResultThread, links: EngineLinks, timeout_s: float, on_broken: Callable[[str], None]
    ) -> None:
        self._results = results
        self._links = links
        self._timeout_s = timeout_s
        self._on_broken = on_broken
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to look, if it does not already."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()

    def find(self, now_ns: int) -> str:
        """What is wrong, for people; empty if nothing is."""
        step = self._results.oldest
        if step and now_ns - step.launched_ns > self._timeout_s * 1e9:
            return f"step {step.number} has not ended on the device after {self._timeout_s:g} s"
        return self._links.check()

    def _run(self) -> None:
        while not self._stopped.wait(INTERVAL_S):
            if problem := self.find(time.monotonic_ns()):
                self._on_broken(problem)
