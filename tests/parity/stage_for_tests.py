"""A stage in this process: real workers on fake sockets, and what their leader would do."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from thread_group_for_tests import GroupLostError, ThreadGroup

from stagemesh.model.deal import deal
from stagemesh.model.source import ModelSource
from stagemesh.stage.engine.torch_engine import TorchEngine
from stagemesh.stage.local_queue import ToLeader, ToWorker
from stagemesh.stage.local_socket import Part
from stagemesh.stage.worker.worker import Worker

Parts = list[bytes]


class Inbox:
    """The worker's end of the queue from its leader. An empty one says stop, so that serve() returns."""

    def __init__(self) -> None:
        self._messages: deque[Parts] = deque()

    def put(self, parts: Parts) -> None:
        self._messages.append(parts)

    def __len__(self) -> int:
        return len(self._messages)

    def recv_multipart(self, timeout_s: float | None = None) -> list[Part] | None:
        if not self._messages and timeout_s is not None:
            return None
        parts = self._messages.popleft() if self._messages else [bytes(ToWorker.STOP)]
        return [Part(memoryview(part)) for part in parts]


class Outbox:
    """The worker's end of the queue to its leader."""

    def __init__(self) -> None:
        self.messages: deque[Parts] = deque()

    def send_multipart(self, parts: Sequence[Any]) -> None:
        self.messages.append([bytes(part) for part in parts])


class LocalStage:
    """One stage of a mesh.

    Args:
        source: The model.
        layers: Of this stage.
        tp: Ranks; each is a thread while it runs.
        num_blocks: KV blocks of the engines.
        block_size: Tokens of a block.
        max_context: Tokens of a sequence at most.
    """

    def __init__(
        self,
        source: ModelSource,
        layers: range,
        tp: int,
        *,
        num_blocks: int,
        block_size: int,
        max_context: int,
    ) -> None:
        self._groups = ThreadGroup.of_size(tp)
        self._threads = ThreadPoolExecutor(tp)
        self.inboxes = [Inbox() for _ in range(tp)]
        self._outboxes = [Outbox() for _ in range(tp)]
        deals = deal(source.config, tp)

        def start(rank: int) -> tuple[TorchEngine, Worker]:
            engine = TorchEngine(
                source,
                layers,
                deals,
                self._groups[rank],
                dtype="float32",
                num_blocks=num_blocks,
                block_size=block_size,
                max_context=max_context,
            )
            queues = (self.inboxes[rank], self._outboxes[rank])
            return engine, Worker(rank, engine, *queues, block_size=block_size, max_context=max_context)

        started = self._on_every_rank(start)
        self.engines = [engine for engine, _ in started]
        self._workers = [worker for _, worker in started]

    def poison(self) -> None:
        """Cells nobody has written hold NaN, as uninitialized memory may."""
        for engine in self.engines:
            engine._attention._cache.fill_(math.nan)

    def send(self, *parts: bytes) -> None:
        """The same message to every rank."""
        for inbox in self.inboxes:
            inbox.put([bytes(part) for part in parts])

    def pump(self) -> list[Parts]:
        """Let the workers do everything they can; returns what rank 0 said."""
        if not len(self.inboxes[0]):
            return []
        self._on_every_rank(lambda rank: self._workers[rank].serve())
        said = list(self._outboxes[0].messages)
        for outbox in self._outboxes:
            outbox.messages.clear()
        return [parts for parts in said if parts[0] != ToLeader.READY]

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    def _on_every_rank(self, work: Callable[[int], Any]) -> list[Any]:
        def run(rank: int) -> Any:
            with self._groups[rank].working():
                return work(rank)

        if len(self._groups) == 1:
            return [work(0)]
        futures = [self._threads.submit(run, rank) for rank in range(len(self._groups))]
        errors = [error for future in futures if (error := future.exception())]
        if errors:  # a lost group is only what one rank's error does to the others
            raise min(errors, key=lambda error: isinstance(error, GroupLostError))
        return [future.result() for future in futures]
