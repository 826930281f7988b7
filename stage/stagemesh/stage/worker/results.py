"""Takes results off the launch thread: a device finishes steps while the next ones are being launched."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from stagemesh.stage.engine.interface import StepHandle
from stagemesh.stage.worker.lane import WorkerLane


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step between its launch and its result."""

    lane: WorkerLane
    arrival_ns: int
    """Monotonic time at which the step reached the leader."""
    first_ns: int
    """And the first of its inputs, the worker."""
    number: int
    launched_ns: int
    handle: StepHandle


class ResultThread:
    """Finishes launched steps in order, in a thread of its own that starts with the first of them.

    It waits in the handle, on a blocking event: a thread that spins would keep the interpreter's lock from
    the launch thread for milliseconds at a time.

    Args:
        finish: Called with each step; it waits for its result.
        fail: Called with what `finish` raised; nothing is finished after that.
    """

    def __init__(self, finish: Callable[[LaunchedStep], None], fail: Callable[[BaseException], None]) -> None:
        self._finish = finish
        self._fail = fail
        self._steps: queue.SimpleQueue[LaunchedStep | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._oldest: LaunchedStep | None = None

    @property
    def oldest(self) -> LaunchedStep | None:
        """The step whose result is waited for now."""
        return self._oldest

    def add(self, step: LaunchedStep) -> None:
        """Finish the step when its result is there."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="results", daemon=True)
            self._thread.start()
        self._steps.put(step)

    def stop(self) -> None:
        """Finish nothing more; steps that still run are dropped."""
        self._steps.put(None)

    def _run(self) -> None:
        while (step := self._steps.get()) is not None:
            self._oldest = step
            try:
                self._finish(step)
            except Exception as error:  # noqa: BLE001 - whatever it is, the launch thread must not go on alone
                self._fail(error)
                return
            finally:
                self._oldest = None
