"""One API worker process, from its start to its end."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time

from stagemesh.router.api.backend import Column, End
from stagemesh.router.api.requests import Port, Requests
from stagemesh.router.config import RouterConfig
from stagemesh.router.worker.frames import FrameProtocol
from stagemesh.router.worker.messages import NUMBER, Kind, pack_deltas, unpack_submit
from stagemesh.router.worker.spec import WorkerSpec
from stagemesh.wire.errors import ConfigError, StagemeshError, StartupError
from stagemesh.wire.status import to_proto

log = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
PING_INTERVAL_S = 1.0
SILENCE_TIMEOUT_S = 20.0
"""A worker that answers no ping for longer hangs, and is killed."""


class WorkerProcess:
    """A worker, and the Outlet of the requests it makes.

    Args:
        requests: Of the router.
        index: Of the worker.
    """

    def __init__(self, requests: Requests, index: int) -> None:
        self.index = index
        self.ready = False
        self._requests = requests
        self._port: Port = requests.connect(self)
        self._protocol = FrameProtocol(self._take, self._lose)
        self._process: asyncio.subprocess.Process | None = None
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lost = asyncio.Event()
        self._reaper: asyncio.Task[None] | None = None
        self._pings = 0
        self._heard_at = time.monotonic()

    @property
    def pid(self) -> int:
        """0 before it is started."""
        return self._process.pid if self._process else 0

    @property
    def num_live(self) -> int:
        """Requests it made that have not ended."""
        return len(self._port.live)

    async def start(self, config: RouterConfig, listen: str) -> None:
        """Start it and wait until it listens.

        Raises:
            StartupError: It cannot start.
        """
        ours, its = socket.socketpair()
        ours.setblocking(False)
        spec = WorkerSpec(
            index=self.index, config=config, listen=listen, socket_fd=its.fileno(), router_pid=os.getpid()
        )
        await asyncio.get_running_loop().connect_accepted_socket(lambda: self._protocol, ours)
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "stagemesh.router.worker",
                spec.model_dump_json(),
                pass_fds=(its.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
            )
        finally:
            its.close()
        self._reaper = asyncio.create_task(self._reap(self._process))
        lost = asyncio.create_task(self._lost_for_good())
        try:
            await asyncio.wait(
                {self._ready, lost}, timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            lost.cancel()
        if self._ready.done():
            self._ready.result()
            self.ready = True
            return
        how = (
            "ended before it listened"
            if self._lost.is_set()
            else f"does not listen after {START_TIMEOUT_S:.0f} s"
        )
        raise StartupError(f"API worker {self.index} {how}; its log says why")

    async def watch(self) -> str:
        """Wait for its end, and say how it came; kills it if it hangs."""
        assert self._process is not None
        while not self._lost.is_set():
            self._pings = (self._pings + 1) & 0xFFFFFFFF
            self._protocol.send(Kind.PING, NUMBER.pack(self._pings))
            try:
                await asyncio.wait_for(self._lost.wait(), PING_INTERVAL_S)
            except TimeoutError:
                silent_s = time.monotonic() - self._heard_at
                if silent_s > SILENCE_TIMEOUT_S:
                    await self.kill()
                    return f"hangs: it answered nothing for {silent_s:.0f} s, and was killed"
        code = await self._process.wait()
        return f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"

    async def stop(self, grace_s: float) -> None:
        """Ask it to leave, and see to it that it does within `grace_s`."""
        self._protocol.send(Kind.STOP)
        if self._process is not None:
            try:
                await asyncio.wait_for(self._process.wait(), grace_s)
            except TimeoutError:
                await self.kill()
        self.disconnect()

    async def kill(self) -> None:
        """End it at once."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def disconnect(self) -> None:
        """Its requests are aborted."""
        self.ready = False
        self._requests.disconnect(self._port)
        self._protocol.close()

    def set_serving(self, serving: bool) -> None:
        """Tell it whether the mesh takes requests."""
        self._protocol.send(Kind.SERVING, bytes([serving]))

    def take(self, handles: Column, token_ids: Column, ends: list[End]) -> None:
        """A step's tokens for its requests."""
        self._protocol.send(Kind.DELTAS, pack_deltas(handles, token_ids, ends))

    def fail(self, handle: int, error: StagemeshError) -> None:
        """A request of its ended with an error."""
        self._protocol.send(Kind.FAILED, NUMBER.pack(handle) + to_proto(error).SerializeToString())

    def _take(self, kind: Kind, content: bytes) -> None:
        self._heard_at = time.monotonic()
        if kind is Kind.SUBMIT:
            self._port.submit(*unpack_submit(content, self._requests.model.end_token_ids))
        elif kind is Kind.ABANDON:
            self._port.abandon(NUMBER.unpack(content)[0])
        elif kind is Kind.REFUSED:
            self._port.refused(content.decode())
        elif kind is Kind.ABORT:
            aborted = self._requests.abort(content[NUMBER.size :].decode())
            self._protocol.send(Kind.ABORTED, content[: NUMBER.size] + bytes([aborted]))
        elif kind is Kind.READY and not self._ready.done():
            self._ready.set_result(None)
        elif kind is Kind.CANNOT_START and not self._ready.done():
            self._ready.set_exception(ConfigError(content.decode()))

    async def _reap(self, process: asyncio.subprocess.Process) -> None:
        await process.wait()
        self._lost.set()

    async def _lost_for_good(self) -> None:
        await self._lost.wait()

    def _lose(self) -> None:
        self._lost.set()
