"""One bidirectional stream that carries many requests: a message has the deltas of all that gained text."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator

import grpc.aio

from stagemesh.router.api.requests import Requests
from stagemesh.router.api.stream import RequestStream
from stagemesh.v1 import inference_pb2
from stagemesh.wire.errors import InvalidArgumentError, StagemeshError
from stagemesh.wire.status import to_proto


class Session:
    """The requests of one Session call.

    What comes in while a message is being written goes into the next one, so a slow client gets fewer and
    larger messages, never a queue that grows with every token.

    Args:
        requests: Of the router.
        remaining_s: What is left of the call's deadline, which is every request's; None if it has none.
    """

    def __init__(self, requests: Requests, remaining_s: float | None) -> None:
        self._requests = requests
        self._deadline = math.inf if remaining_s is None else time.monotonic() + remaining_s
        self._streams: dict[str, RequestStream] = {}
        self._refused: list[inference_pb2.SessionEnd] = []
        self._changed: dict[str, RequestStream] = {}
        self._wake = asyncio.Event()

    async def run(
        self, requests: AsyncIterator[inference_pb2.SessionRequest], context: grpc.aio.ServicerContext
    ) -> None:
        """Serve until the client has closed its side and every request has ended."""
        reader = asyncio.create_task(self._read(requests))
        reader.add_done_callback(lambda _: self._wake.set())
        try:
            while not (reader.done() and not self._streams and not self._refused):
                await self._wake.wait()
                self._wake.clear()
                response = self._collect()
                if response.request_ids or response.ends:
                    await context.write(response)
            await reader
        finally:
            reader.cancel()
            for stream in list(self._streams.values()):
                self._requests.abandon(stream)

    async def _read(self, requests: AsyncIterator[inference_pb2.SessionRequest]) -> None:
        async for request in requests:
            for start in request.start:
                self._start(start)
            for request_id in request.cancel:
                if stream := self._streams.pop(request_id, None):
                    self._requests.abandon(stream)
                    self._changed.pop(request_id, None)

    def _start(self, message: inference_pb2.GenerateRequest) -> None:
        try:
            if not message.request_id:
                raise InvalidArgumentError(
                    "request_id is empty; each request of a session needs one",
                    field="request_id",
                    reason="BAD_FIELD",
                )
            stream = self._requests.start(message, self._deadline - time.monotonic())
        except StagemeshError as error:
            self._refused.append(_failed(message.request_id, error))
            self._wake.set()
            return
        self._streams[stream.request.request_id] = stream
        stream.on_change = self._note

    def _note(self, stream: RequestStream) -> None:
        self._changed[stream.request.request_id] = stream
        self._wake.set()

    def _collect(self) -> inference_pb2.SessionResponse:
        changed, self._changed = self._changed, {}
        refused, self._refused = self._refused, []
        response = inference_pb2.SessionResponse(ends=refused)
        for request_id, stream in changed.items():
            token_ids, text = stream.take()
            if token_ids:
                response.request_ids.append(request_id)
                response.texts.append(text)
                response.token_counts.append(len(token_ids))
                response.token_ids.extend(token_ids)
            if stream.error:
                response.ends.append(_failed(request_id, stream.error))
            elif stream.finish:
                end = response.ends.add(request_id=request_id, finish_reason=stream.finish_reason)
                end.usage.CopyFrom(stream.usage)
            else:
                continue
            with contextlib.suppress(KeyError):
                del self._streams[request_id]
        return response


def _failed(request_id: str, error: StagemeshError) -> inference_pb2.SessionEnd:
    return inference_pb2.SessionEnd(request_id=request_id, status=to_proto(error).SerializeToString())
