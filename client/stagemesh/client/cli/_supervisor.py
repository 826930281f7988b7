"""Starts the processes of a mesh, keeps them, and stops them and nothing else."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from stagemesh.client.cli._child import Child, ChildSpec
from stagemesh.client.cli._main import PARENT_ENV
from stagemesh.wire.errors import StartupError
from stagemesh.wire.polling import with_polling

_FIRST_BACKOFF_S = 0.5
_MAX_BACKOFF_S = 30.0
_HEALTHY_AFTER_S = 60.0
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Display(Protocol):
    """Where a supervisor says what happens."""

    def child_line(self, name: str, line: str) -> None:
        """A line that a child wrote."""

    def note(self, text: str) -> None:
        """Something that happened."""


@dataclass(frozen=True, slots=True)
class _Exited:
    child: Child


@dataclass(frozen=True, slots=True)
class _Ready:
    pass


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


@dataclass(frozen=True, slots=True)
class _Failed:
    error: BaseException


class Supervisor:
    """The life of the processes of one mesh.

    Args:
        stages: Started first; one that ends after the mesh was ready is started again.
        router: Started last and stopped first; when it ends, all ends.
        until_ready: Returns when the mesh takes requests.
        on_ready: Called once, then.
        display: Told of lines and events.
        hidden_variables: Environment variables the children do not get.
        grace_s: Seconds between asking the processes to end and killing them.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        stages: Sequence[ChildSpec],
        router: ChildSpec,
        *,
        until_ready: Callable[[], Awaitable[None]],
        on_ready: Callable[[], Awaitable[None]],
        display: Display,
        hidden_variables: Iterable[str] = (),
        grace_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stages = stages
        self._router = router
        self._until_ready = until_ready
        self._on_ready = on_ready
        self._display = display
        hidden = set(hidden_variables)
        self._env = with_polling({key: value for key, value in os.environ.items() if key not in hidden})
        self._env[PARENT_ENV] = str(os.getpid())
        self._env.setdefault("PYTHONUNBUFFERED", "1")
        self._grace_s = grace_s
        self._clock = clock
        self._events: asyncio.Queue[_Exited | _Ready | _Stop | _Failed] = asyncio.Queue()
        self._hurry = asyncio.Event()
        self._children: dict[str, Child] = {}
        self._started_at: dict[str, float] = {}
        self._backoff_s: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    async def run(self) -> None:
        """Until SIGINT, SIGTERM or SIGHUP, which is a good end.

        Raises:
            StartupError: A process ended before the mesh was ready, or the router after; all are stopped.
        """
        loop = asyncio.get_running_loop()
        for signum in _STOP_SIGNALS:
            loop.add_signal_handler(signum, self._on_signal)
        try:
            for spec in (*self._stages, self._router):
                await self._start(spec)
            self._spawn(self._report_ready())
            await self._handle_events()
        finally:
            await self._stop_all()
            for signum in _STOP_SIGNALS:
                loop.remove_signal_handler(signum)

    async def _handle_events(self) -> None:
        ready = False
        while True:
            match await self._events.get():
                case _Stop():
                    return
                case _Failed(error):
                    raise error
                case _Ready():
                    ready = True
                    await self._on_ready()
                case _Exited(child) if not ready:
                    raise StartupError(
                        _last_words(child, f"{child.spec.name} {child.ending} before the mesh was ready")
                    )
                case _Exited(child) if child.spec is self._router:
                    raise StartupError(_last_words(child, f"the router {child.ending}"))
                case _Exited(child):
                    self._spawn(self._restart(child))

    async def _report_ready(self) -> None:
        await self._until_ready()
        self._events.put_nowait(_Ready())

    async def _start(self, spec: ChildSpec) -> None:
        child = await Child.start(spec, env=self._env, on_line=self._display.child_line)
        self._children[spec.name] = child
        self._started_at[spec.name] = self._clock()
        self._spawn(self._watch(child))

    async def _watch(self, child: Child) -> None:
        await child.wait()
        self._events.put_nowait(_Exited(child))

    async def _restart(self, child: Child) -> None:
        name = child.spec.name
        if self._clock() - self._started_at[name] > _HEALTHY_AFTER_S:
            self._backoff_s.pop(name, None)
        delay_s = self._backoff_s.get(name, _FIRST_BACKOFF_S)
        self._backoff_s[name] = min(_MAX_BACKOFF_S, 2 * delay_s)
        self._display.note(f"{name} {child.ending}; starting it again in {delay_s:g} s")
        await asyncio.sleep(delay_s)
        if not self._stopping:
            await self._start(child.spec)

    def _on_signal(self) -> None:
        """The first asks for an end; a further one for a quick end."""
        if self._stopping:
            self._hurry.set()
        self._events.put_nowait(_Stop())

    async def _stop_all(self) -> None:
        """Router first, so that it misses no stage; then the stages; what is left after grace_s is killed."""
        self._stopping = True
        deadline = self._clock() + self._grace_s
        router = self._children.get(self._router.name)
        stages = [child for child in self._children.values() if child is not router]
        for group in ([router] if router else [], stages):
            for child in group:
                child.terminate()
            await self._ended(group, deadline - self._clock())
        left = [child for child in self._children.values() if child.ending == "runs"]
        for child in left:
            self._display.note(f"{child.spec.name} did not end within {self._grace_s:g} s; killing it")
            child.kill()
        await self._ended(left, _FIRST_BACKOFF_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _ended(self, children: Sequence[Child], timeout_s: float) -> None:
        """Until they ended, the time is over, or the user is in a hurry."""

        async def all_ended() -> None:
            for child in children:
                await child.wait()

        async def hurried() -> None:
            await self._hurry.wait()

        waits = [asyncio.create_task(all_ended()), asyncio.create_task(hurried())]
        await asyncio.wait(waits, timeout=max(0.0, timeout_s), return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._events.put_nowait(_Failed(error))


def _last_words(child: Child, what: str) -> str:
    """What happened, and the child's own error line if it left one."""
    errors = [line for line in child.last_lines if line.startswith("error: ")]
    if errors:
        return f"{what}: {errors[-1].removeprefix('error: ')}"
    return f"{what}; its last line: {child.last_lines[-1]}" if child.last_lines else f"{what}, without a word"
