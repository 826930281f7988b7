"""Every live request of the router, between the services above and the lane below."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace

from stagemesh.router.api.checking import check
from stagemesh.router.api.history import SETTLE_S, RequestHistory
from stagemesh.router.api.served_model import ServedModel
from stagemesh.router.api.stream import RequestStream
from stagemesh.router.config import RouterConfig
from stagemesh.router.lane.lane import Lane, LaneEvents
from stagemesh.router.scheduler import Delta, Finish, Request, StepDeltas
from stagemesh.router.scheduler.sequence import Sequence
from stagemesh.router.tracing.tracing import RouterTracing
from stagemesh.v1 import inference_pb2
from stagemesh.wire.errors import DeadlineExceededError, StagemeshError, UnavailableError

log = logging.getLogger(__name__)


class Requests:
    """Starts and ends requests on the lane, and counts them.

    Args:
        config: Of the router.
        model: It serves.
        on_ready: Called when the mesh can, or can no longer, take requests.
        tracing: None where it is off.
    """

    def __init__(
        self,
        config: RouterConfig,
        model: ServedModel,
        on_ready: Callable[[bool], None],
        tracing: RouterTracing | None = None,
    ) -> None:
        self.model = model
        self.tracing = tracing
        self.lane = Lane(
            config,
            model.fingerprint,
            model.max_context,
            LaneEvents(
                on_deltas=self._take_deltas,
                on_admitted=self._take_admitted,
                on_lost=self._take_lost,
                on_ready=on_ready,
            ),
            tracing.steps if tracing else None,
        )
        self.history = RequestHistory(self.lane.stages, tracing)
        self.draining = False
        self.num_finished = 0
        self.num_failed = 0
        self.prompt_tokens = 0
        self.output_tokens = 0
        self._live: dict[str, RequestStream] = {}

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    def start(self, message: inference_pb2.GenerateRequest, remaining_s: float | None) -> RequestStream:
        """Check a request and hand it to the lane; refusals are raised with the request's id.

        Args:
            message: The request.
            remaining_s: What is left of the caller's deadline; None if it has none.
        """
        trace = self.tracing.server.begin(message) if self.tracing else None
        try:
            if self.draining:
                raise UnavailableError("the router is draining and takes no new requests", reason="DRAINING")
            request = check(message, self.model)
            if remaining_s is not None:
                request = replace(request, deadline=time.monotonic() + remaining_s)
            if trace:
                request = replace(request, trace=trace.context)
            stream = RequestStream(request, self.model.tokenizer)
            stream.trace = trace
            self.lane.submit(request)
        except StagemeshError as error:
            error.request_id = error.request_id or message.request_id
            self.num_failed += 1
            if trace and self.tracing:
                self.tracing.server.refuse(trace, error)
            raise
        self._live[request.request_id] = stream
        if message.timeout_ms:
            stream.expiry = asyncio.get_running_loop().call_later(
                message.timeout_ms / 1e3, self._expire, stream
            )
        self.prompt_tokens += len(request.prompt)
        scheduler = self.lane.scheduler
        self.history.add(stream, scheduler.sequence(request.request_id) if scheduler else None)
        return stream

    def abort(self, request_id: str) -> bool:
        """End a request with finish reason ABORT; False if it is not live."""
        return self.lane.abort(request_id)

    def abandon(self, stream: RequestStream) -> None:
        """Its reader went away. Once it has ended, its id may belong to another request."""
        if self._live.get(stream.request.request_id) is stream:
            self.abort(stream.request.request_id)

    async def drain(self, timeout_s: float | None) -> int:
        """Take no more requests and wait for those that run; returns how many are left at the timeout."""
        self.draining = True
        deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        while self._live and (deadline is None or asyncio.get_running_loop().time() < deadline):
            await asyncio.sleep(0.05)
        return len(self._live)

    def fail_all(self, error: StagemeshError) -> None:
        """End every live request with an error."""
        for stream in list(self._live.values()):
            self._take_lost(stream.request, error)

    def _take_deltas(self, deltas: StepDeltas) -> None:
        for delta in deltas:
            self._take_delta(delta)

    def _take_delta(self, delta: Delta) -> None:
        if delta.finish is Finish.DEADLINE:
            self._take_lost(
                delta.request, DeadlineExceededError("the deadline passed before the answer was whole")
            )
            return
        stream = self._live.get(delta.request.request_id)
        if stream is None:
            return
        self.output_tokens += len(delta.token_ids)
        stream.push(delta)
        if delta.finish:
            self.num_finished += 1
            self._end(stream)

    def _take_admitted(self, sequence: Sequence) -> None:
        stream = self._live.get(sequence.request.request_id)
        if stream and not stream.times.admitted:
            stream.times.admitted = time.monotonic()
            stream.num_cached = sequence.num_cached

    def _take_lost(self, request: Request, error: StagemeshError) -> None:
        stream = self._live.get(request.request_id)
        if stream is None:
            return
        self.num_failed += 1
        stream.fail(error.of_request(request.request_id))
        self._end(stream)

    def _expire(self, stream: RequestStream) -> None:
        """Its own deadline, which gRPC does not watch, has passed."""
        request_id = stream.request.request_id
        self.num_failed += 1
        stream.fail(
            DeadlineExceededError(
                f"timeout_ms passed after {stream.num_tokens} tokens; ask for fewer, or give it longer",
                request_id=request_id,
            )
        )
        self._end(stream)
        self.lane.abort(request_id)

    def _end(self, stream: RequestStream) -> None:
        request_id = stream.request.request_id
        del self._live[request_id]
        if stream.expiry:
            stream.expiry.cancel()
        if stream.trace and self.tracing:
            self.tracing.server.end(stream.trace, stream)
        asyncio.get_running_loop().call_later(SETTLE_S, self.history.settle, request_id)
