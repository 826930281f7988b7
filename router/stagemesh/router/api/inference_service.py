"""The RPCs of InferenceService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TypeAlias

import grpc.aio

from stagemesh.router.api.requests import Requests
from stagemesh.router.api.session import Session
from stagemesh.v1 import inference_pb2
from stagemesh.wire.telemetry.context import TRACEPARENT_KEY

REQUEST_ID_KEY = "stagemesh-request-id"

Context: TypeAlias = grpc.aio.ServicerContext


class InferenceService:
    """Serves the requests of one router."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:
        if self._requests.tracing and not request.traceparent:
            metadata = dict(context.invocation_metadata() or ())
            request.traceparent = metadata.get(TRACEPARENT_KEY, "")
        stream = self._requests.start(request, context.time_remaining())
        request_id = stream.request.request_id
        try:
            await context.send_initial_metadata(((REQUEST_ID_KEY, request_id),))
            first = True
            while True:
                response = await stream.next()
                if first:
                    response.request_id, first = request_id, False
                await context.write(response)
                if response.finish_reason:
                    return
        finally:
            # The client went away or its deadline passed: gRPC cancels the handler, and tells the client.
            self._requests.abandon(stream)

    async def Session(self, requests: AsyncIterator[inference_pb2.SessionRequest], context: Context) -> None:
        await Session(self._requests, context.time_remaining()).run(requests, context)

    async def Abort(
        self, request: inference_pb2.AbortRequest, context: Context
    ) -> inference_pb2.AbortResponse:
        return inference_pb2.AbortResponse(aborted=self._requests.abort(request.request_id))

    async def GetModel(
        self, request: inference_pb2.GetModelRequest, context: Context
    ) -> inference_pb2.GetModelResponse:
        model = self._requests.model
        return inference_pb2.GetModelResponse(
            name=model.name,
            architecture=model.architecture,
            max_context=model.max_context,
            vocab_size=model.vocab_size,
            has_tokenizer=model.tokenizer is not None,
            has_chat_template=model.tokenizer is not None and model.tokenizer.has_chat_template,
            end_token_ids=sorted(model.end_token_ids),
        )
