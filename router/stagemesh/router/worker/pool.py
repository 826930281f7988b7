"""The API workers of a router: started together, each started again when it ends."""

from __future__ import annotations

import asyncio
import logging

from stagemesh.router.api.requests import Requests
from stagemesh.router.config import RouterConfig
from stagemesh.router.worker.held_port import HeldPort
from stagemesh.router.worker.worker_process import WorkerProcess
from stagemesh.v1 import admin_pb2
from stagemesh.wire.errors import StartupError

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 5.0


class WorkerPool:
    """Holds the public port and keeps `config.api_workers` workers listening on it.

    Args:
        config: Of the router.
        requests: Where the workers' requests go.
    """

    def __init__(self, config: RouterConfig, requests: Requests) -> None:
        self._config = config
        self._requests = requests
        self._held: HeldPort | None = None
        self._workers: list[WorkerProcess | None] = [None] * config.api_workers
        self._num_restarts = [0] * config.api_workers
        self._serving = False
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, listen: str) -> str:
        """Start them all; returns the address with its port.

        Raises:
            ConfigError: The port is taken.
            StartupError: One cannot start.
        """
        self._held = HeldPort(listen, key="--listen")
        await asyncio.gather(*(self._start(index) for index in range(len(self._workers))))
        self._tasks = [asyncio.create_task(self._keep(index)) for index in range(len(self._workers))]
        return self._held.address

    def set_serving(self, serving: bool) -> None:
        """Their health says whether the mesh takes requests."""
        self._serving = serving
        for worker in self._workers:
            if worker:
                worker.set_serving(serving)

    def status(self) -> list[admin_pb2.ApiWorkerStatus]:
        """Of each worker."""
        return [
            admin_pb2.ApiWorkerStatus(
                index=index,
                process_id=worker.pid if worker else 0,
                ready=bool(worker and worker.ready),
                num_live=worker.num_live if worker else 0,
                num_restarts=restarts,
            )
            for index, (worker, restarts) in enumerate(zip(self._workers, self._num_restarts, strict=True))
        ]

    async def stop(self, grace_s: float) -> None:
        """End them in good order; after `grace_s` those that are left are killed."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(worker.stop(grace_s) for worker in self._workers if worker))
        if self._held:
            self._held.close()

    async def _start(self, index: int) -> None:
        assert self._held is not None
        worker = self._workers[index] = WorkerProcess(self._requests, index)
        try:
            await worker.start(self._config, self._held.address)
        except BaseException:
            await worker.kill()
            worker.disconnect()
            self._workers[index] = None
            raise
        worker.set_serving(self._serving)

    async def _keep(self, index: int) -> None:
        """Its streams end with it, by the connection that breaks; a new one takes its place."""
        pause_s = FIRST_PAUSE_S
        while True:
            if worker := self._workers[index]:
                how = await worker.watch()
                log.error(
                    "API worker %d (pid %d) %s; %d requests of it are aborted",
                    index,
                    worker.pid,
                    how,
                    worker.num_live,
                )
                worker.disconnect()
                self._workers[index] = None
            await asyncio.sleep(pause_s)
            self._num_restarts[index] += 1
            try:
                await self._start(index)
                pause_s = FIRST_PAUSE_S
            except (StartupError, OSError) as error:
                pause_s = min(MAX_PAUSE_S, 2 * pause_s)
                log.error("API worker %d cannot start: %s; trying again in %.1f s", index, error, pause_s)
