"""One bidirectional stream that carries many requests: a message has the deltas of all that gained text."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator

import grpc.aio

from stagemesh.router.api.stream import RequestStream
from stagemesh.router.api.streams import Streams
from stagemesh.v1 import inference_pb2
from stagemesh.wire.errors import InvalidArgumentError, StagemeshError
from stagemesh.wire.status import to_proto

TURN_S = 0.002
"""Tokenizing a message full of long prompts gives way to others after this time of this thread's: short requests
that came together go together, also where others have the core in between."""
IDLE_TURN_S = 0.01
"""The same while nobody's stream runs, when a turn holds up nothing but the first step: one with a part of a burst would
keep the rest waiting until it comes back."""

MAX_UNTOLD = 1_000
"""Requests with news, refusals among them, that may wait for a client that does not read, before nothing more is read
from it."""

MESSAGE_TOKENS = 1 << 16
"""A message is full with so many: what waited for a slow client would not fit the 4 MiB that gRPC takes by default."""


class Session:
    """The requests of one Session call.

    What comes in while a message is being written goes into the next one, so a slow client gets fewer and
    larger messages, never a queue that grows: what waits for it is bounded by its requests' max_tokens, and the
    requests by MAX_UNTOLD beside those that run.

    Args:
        streams: Of this public side.
        deadline: Of the call, monotonic seconds; it holds for every request.
        traceparent: Of the call; for requests that have none of their own.
    """

    def __init__(self, streams: Streams, deadline: float, traceparent: str = "") -> None:
        self._all = streams
        self._traceparent = traceparent
        self._deadline = deadline
        self._streams: dict[str, RequestStream] = {}
        self._refused: list[inference_pb2.SessionEnd] = []
        self._changed: deque[RequestStream] = deque()
        self._wake = asyncio.Event()
        self._told = asyncio.Event()

    async def run(
        self, requests: AsyncIterator[inference_pb2.SessionRequest], context: grpc.aio.ServicerContext
    ) -> None:
        """Serve until the client has closed its side and every request has ended.

        Raises:
            InvalidArgumentError: The client sent what is no SessionRequest; its requests are aborted.
        """
        reader = asyncio.create_task(self._read(requests))
        reader.add_done_callback(lambda _: self._wake.set())
        try:
            while not (reader.done() and not self._streams and not self._refused):
                await self._wake.wait()
                self._wake.clear()
                if reader.done():
                    reader.result()
                response = self._collect()
                if response.request_ids or response.ends:
                    await context.write(response)
        finally:
            reader.cancel()
            for stream in self._streams.values():
                self._all.abandon(stream)

    def note(self, stream: RequestStream) -> None:
        """One of its streams has something."""
        self._changed.append(stream)
        self._wake.set()

    async def _read(self, requests: AsyncIterator[inference_pb2.SessionRequest]) -> None:
        async for request in requests:
            turn_ends = time.thread_time() + (TURN_S if len(self._all) else IDLE_TURN_S)
            for start in request.start:
                while len(self._refused) + len(self._changed) >= MAX_UNTOLD:
                    self._told.clear()
                    await self._told.wait()
                self._start(start)
                if time.thread_time() > turn_ends:
                    await asyncio.sleep(0)
                    turn_ends = time.thread_time() + TURN_S
            for request_id in request.cancel:
                if stream := self._streams.pop(request_id, None):
                    self._all.abandon(stream)

    def _start(self, message: inference_pb2.GenerateRequest) -> None:
        message.traceparent = message.traceparent or self._traceparent
        try:
            if not message.request_id:
                raise InvalidArgumentError(
                    "request_id is empty; each request of a session needs one",
                    field="request_id",
                    reason="BAD_FIELD",
                )
            if message.request_id in self._streams:
                raise InvalidArgumentError(
                    f"request_id '{message.request_id}' is live in this session; choose another",
                    field="request_id",
                    reason="DUPLICATE_REQUEST_ID",
                    request_id=message.request_id,
                )
            stream = self._all.start(message, self._deadline, self)
        except StagemeshError as error:
            self._refused.append(_failed(message.request_id, error))
            self._wake.set()
            return
        self._streams[message.request_id] = stream

    def _collect(self) -> inference_pb2.SessionResponse:
        changed = self._changed
        refused, self._refused = self._refused, []
        request_ids, texts, counts = [], [], []
        token_ids: list[int] = []
        ended = []
        while changed and len(token_ids) < MESSAGE_TOKENS:
            stream = changed.popleft()
            request_id = stream.request.request_id
            if self._streams.get(request_id) is not stream:  # cancelled
                continue
            new_ids, text = stream.take()
            if new_ids:
                request_ids.append(request_id)
                texts.append(text)
                counts.append(len(new_ids))
                token_ids += new_ids
            if stream.finish is not None or stream.error is not None:
                ended.append(stream)
                del self._streams[request_id]
        if changed:
            self._wake.set()
        self._told.set()
        return inference_pb2.SessionResponse(
            request_ids=request_ids,
            texts=texts,
            token_counts=counts,
            token_ids=token_ids,
            ends=[*refused, *map(_end, ended)],
        )


def _end(stream: RequestStream) -> inference_pb2.SessionEnd:
    request_id = stream.request.request_id
    if stream.error:
        return _failed(request_id, stream.error)
    return inference_pb2.SessionEnd(
        request_id=request_id, finish_reason=stream.finish_reason, usage=stream.usage
    )


def _failed(request_id: str, error: StagemeshError) -> inference_pb2.SessionEnd:
    return inference_pb2.SessionEnd(request_id=request_id, status=to_proto(error).SerializeToString())
