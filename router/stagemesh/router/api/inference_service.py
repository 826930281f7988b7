"""The RPCs of InferenceService."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator
from typing import TypeAlias

import grpc.aio

from stagemesh.router.api.session import Session
from stagemesh.router.api.stream import OneStream
from stagemesh.router.api.streams import Streams
from stagemesh.v1 import inference_pb2
from stagemesh.wire.telemetry.context import TRACEPARENT_KEY

REQUEST_ID_KEY = "stagemesh-request-id"

Context: TypeAlias = grpc.aio.ServicerContext


class InferenceService:
    """Serves the requests of one public side."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:
        if self._streams.spans and not request.traceparent:
            request.traceparent = _traceparent(context)
        reader = OneStream()
        stream = self._streams.start(request, _deadline(context), reader)
        request_id = stream.request.request_id
        try:
            if stream.error:
                raise stream.error
            await context.send_initial_metadata(((REQUEST_ID_KEY, request_id),))
            first = True
            while True:
                response = await reader.next(stream)
                if first:
                    response.request_id, first = request_id, False
                await context.write(response)
                if response.finish_reason:
                    return
        finally:
            # The client went away or its deadline passed: gRPC cancels the handler, and tells the client.
            self._streams.abandon(stream)

    async def Session(self, requests: AsyncIterator[inference_pb2.SessionRequest], context: Context) -> None:
        traceparent = _traceparent(context) if self._streams.spans else ""
        await Session(self._streams, _deadline(context), traceparent).run(requests, context)

    async def Abort(
        self, request: inference_pb2.AbortRequest, context: Context
    ) -> inference_pb2.AbortResponse:
        aborted = await self._streams.backend.abort(request.request_id)
        return inference_pb2.AbortResponse(aborted=aborted)

    async def GetModel(
        self, request: inference_pb2.GetModelRequest, context: Context
    ) -> inference_pb2.GetModelResponse:
        model = self._streams.model
        return inference_pb2.GetModelResponse(
            name=model.name,
            architecture=model.architecture,
            max_context=model.max_context,
            vocab_size=model.vocab_size,
            has_tokenizer=model.tokenizer is not None,
            has_chat_template=model.tokenizer is not None and model.tokenizer.has_chat_template,
            end_token_ids=sorted(model.end_token_ids),
        )


def _deadline(context: Context) -> float:
    """Monotonic seconds of the call's deadline; infinite if it has none."""
    remaining_s = context.time_remaining()
    return math.inf if remaining_s is None else time.monotonic() + remaining_s


def _traceparent(context: Context) -> str:
    """Trace context of the call; empty if it has none."""
    value = dict(context.invocation_metadata() or ()).get(TRACEPARENT_KEY, "")
    return value if isinstance(value, str) else ""
