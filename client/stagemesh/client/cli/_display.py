"""What `stagemesh up` shows: a progress line on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text


class UpDisplay:
    """Children's lines and notes go to standard error, the ready line alone to standard output."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._last_progress = ""
        self._progress: Progress | None = None
        if self._console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._task = self._progress.add_task("starting", total=None)

    def child_line(self, name: str, line: str) -> None:
        """A line that a child wrote, with its name before it."""
        self._write(f"{name} | {line}")

    def note(self, text: str) -> None:
        """Something that happened."""
        self._write(f"up | {text}")

    def progress(self, text: str) -> None:
        """What the mesh waits for; in a pipe a line whenever that changes."""
        if text == self._last_progress:
            return
        self._last_progress = text
        if self._progress is None:
            self.note(text)
        else:
            self._progress.update(self._task, description=text)

    def ready(self, line: str) -> None:
        """The mesh takes requests."""
        self._stop()
        print(line, flush=True)

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _write(self, line: str) -> None:
        if self._progress is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._console.print(Text(line), soft_wrap=True)
