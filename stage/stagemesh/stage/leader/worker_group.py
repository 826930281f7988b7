"""The workers of a stage: started together, watched, and stopped together (a group that lost a rank is lost)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stagemesh.stage import host_memory
from stagemesh.stage.config import StageConfig
from stagemesh.stage.cuda.environment import cuda_environment
from stagemesh.stage.engine.interface import RankFacts
from stagemesh.stage.local_queue import ToLeader, ToWorker
from stagemesh.stage.local_socket import LeaderSocket, Part, socket_pair
from stagemesh.stage.worker.spec import WorkerSpec
from stagemesh.wire.cgroup import usable_cores
from stagemesh.wire.columns import U64, unpack
from stagemesh.wire.errors import ModelError, StartupError

log = logging.getLogger(__name__)

PING_INTERVAL_S = 1.0
STOP_GRACE_S = 3.0
SPIN_COUNT = "10000"
"""Turns an OpenMP thread spins for work before it sleeps, where cores are shared: well under 0.1 ms."""

OnMessage = Callable[[ToLeader, list[Part]], None]
OnProgress = Callable[[str, int, int], None]


class WorkerGroup:
    """One start of the worker processes.

    Args:
        config: Of the stage.
        on_message: Called in the event loop with every message that concerns a lane.
        on_progress: Called with ("weights", bytes read, bytes in all) over all ranks while they load, then with
            ("graphs", captured, in all).
        used_bytes: What other processes hold of each rank's GPU; empty: the ranks compute on CPUs.
    """

    def __init__(
        self,
        config: StageConfig,
        on_message: OnMessage,
        on_progress: OnProgress,
        *,
        used_bytes: tuple[int, ...] = (),
    ) -> None:
        self._config = config
        self._used_bytes = used_bytes
        self._on_message = on_message
        self._on_progress = on_progress
        self._folder = tempfile.TemporaryDirectory(prefix="stagemesh-")
        shares_memory = config.tp > 1 and not used_bytes and host_memory.is_available()
        self._memory = host_memory.create(config.tp) if shares_memory else None
        self._queues: list[LeaderSocket] = []
        self._processes: list[asyncio.subprocess.Process] = []
        self._watchers: list[asyncio.Task[None]] = []
        self._facts: dict[int, RankFacts] = {}
        self._progress: dict[int, tuple[int, int]] = {}
        self._loading = "weights"
        self._ping = 0
        self._pongs: dict[int, int] = {}
        loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = loop.create_future()
        self.lost: asyncio.Future[str] = loop.create_future()
        """Resolves with what happened when the group can no longer serve."""

    @property
    def facts(self) -> list[RankFacts]:
        """Of every rank, once started."""
        return [self._facts[rank] for rank in sorted(self._facts)]

    async def start(self) -> None:
        """Start the processes and wait until all have loaded; StartupError says why one did not."""
        for rank in range(self._config.tp):
            ours, theirs = socket_pair()
            with theirs:
                self._queues.append(queue := LeaderSocket(ours))
                asyncio.get_running_loop().add_reader(queue.fileno(), self._drain, queue)
                self._processes.append(await self._spawn(rank, theirs.fileno()))
        self._watchers = [asyncio.create_task(self._watch(rank)) for rank in range(self._config.tp)]
        either: set[asyncio.Future[Any]] = {self._ready, self.lost}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not self._ready.done():
            raise StartupError(f"the stage's workers did not start: {self.lost.result()}")
        self._ready.result()
        self._watchers.append(asyncio.create_task(self._ping_workers()))

    @property
    def folder(self) -> Path:
        """Of this user alone; it goes with the group."""
        return Path(self._folder.name)

    def hand_end(self, kind: ToWorker, *parts: bytes, end: socket.socket) -> None:
        """Send rank 0 a message with a socket, which is closed here."""
        self._queues[0].send_multipart([kind, *parts], end)

    def broadcast(self, kind: ToWorker, *parts: bytes | memoryview) -> None:
        """Send one message to every rank; all get the same ones in the same order."""
        for queue in self._queues:
            queue.send_multipart([kind, *parts])

    async def stop(self) -> None:
        """End every process: asked first, killed after a grace."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        if self._ready.done() and not self.lost.done():
            self.broadcast(ToWorker.STOP)
            await asyncio.wait([asyncio.create_task(p.wait()) for p in self._processes], timeout=STOP_GRACE_S)
        for process in self._processes:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
        await asyncio.gather(*(process.wait() for process in self._processes))
        for queue in self._queues:
            queue.close()
        self._folder.cleanup()
        if self._memory is not None:
            os.close(self._memory)
        if not self._ready.done():
            self._ready.cancel()

    async def _spawn(self, rank: int, queue: int) -> asyncio.subprocess.Process:
        spec = WorkerSpec(
            rank=rank,
            leader_pid=os.getpid(),
            queue=queue,
            store=str(Path(self._folder.name) / "store"),
            memory=self._memory,
            used_bytes=self._used_bytes,
            config=self._config,
        )
        threads = str(self._config.num_threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        # Weights on huge pages: a decode step streams them all, and 4 KiB pages stop the prefetcher short.
        environment.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        if self._config.shared_cores or self._config.tp * self._config.num_threads > usable_cores():
            # An idle thread must not keep a core from a neighbour that has work, but one that sleeps at once
            # costs a wake-up at each of a step's 150 parallel regions (docs/performance.md, "Waiting").
            environment.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
        if self._used_bytes:
            environment = cuda_environment(environment)
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "stagemesh.stage.worker",
            spec.model_dump_json(),
            env=environment,
            pass_fds=(queue,) if self._memory is None else (queue, self._memory),
        )

    async def _watch(self, rank: int) -> None:
        code = await self._processes[rank].wait()
        self._drain(self._queues[rank])  # its last words may still be in it
        how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
        self._lose(f"worker {rank} (pid {self._processes[rank].pid}) {how}")

    async def _ping_workers(self) -> None:
        """A worker that does not read its queue for worker_timeout_s hangs, in a step or stopped."""
        sent_at: dict[int, float] = {}
        while True:
            self._ping += 1
            sent_at[self._ping] = time.monotonic()
            self.broadcast(ToWorker.PING, self._ping.to_bytes(8, "little"))
            await asyncio.sleep(PING_INTERVAL_S)
            answered = min(self._pongs.get(rank, 0) for rank in range(self._config.tp))
            sent_at = {number: at for number, at in sent_at.items() if number > answered}
            oldest = min(sent_at.values(), default=time.monotonic())
            if time.monotonic() - oldest > self._config.worker_timeout_s:
                rank = min(range(self._config.tp), key=lambda rank: self._pongs.get(rank, 0))
                self._lose(f"worker {rank} (pid {self._processes[rank].pid}) hangs")
                return

    def _drain(self, queue: LeaderSocket) -> None:
        for kind, *parts in queue.drain():
            self._take(ToLeader(kind.bytes), parts)

    def _take(self, kind: ToLeader, parts: list[Part]) -> None:
        if kind is ToLeader.PONG:
            rank, number = unpack(parts[0].bytes, U64, "pong", 2)
            self._pongs[int(rank)] = int(number)
        elif kind is ToLeader.PROGRESS:
            rank, done, total = unpack(parts[0].bytes, U64, "progress", 3)
            what = parts[1].bytes.decode() if len(parts) > 1 else "weights"
            if what != self._loading:
                self._loading = what
                self._progress.clear()
            self._progress[int(rank)] = (int(done), int(total))
            self._on_progress(
                what,
                sum(p[0] for p in self._progress.values()),
                sum(p[1] for p in self._progress.values()),
            )
        elif kind is ToLeader.READY:
            facts = RankFacts(**json.loads(parts[0].bytes))
            self._facts[facts.rank] = facts
            if len(self._facts) == self._config.tp and not self._ready.done():
                self._ready.set_result(None)
        elif kind is ToLeader.FAILED:
            reason, _, message = parts[0].bytes.decode().partition("\0")
            if not self._ready.done():
                self._ready.set_exception(ModelError(message, reason=reason))
        else:
            self._on_message(kind, parts)

    def _lose(self, what: str) -> None:
        if not self.lost.done():
            log.error("%s", what)
            self.lost.set_result(what)
