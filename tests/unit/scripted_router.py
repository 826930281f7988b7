"""A router that does as a test says, on a real gRPC server in this process; it keeps what it received."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import grpc
from google.rpc import status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from stagemesh.v1 import admin_pb2, admin_pb2_grpc, inference_pb2_grpc
from stagemesh.v1 import inference_pb2 as pb
from stagemesh.wire.errors import NotFoundError, StagemeshError
from stagemesh.wire.status import from_proto, to_grpc

INFERENCE = "stagemesh.v1.InferenceService"
WAIT_S = 60.0
"""For what must come: a busy machine takes its time."""
Script = Callable[[pb.GenerateRequest, Any], Iterator[pb.GenerateResponse]]


@dataclass
class Received:
    """A Generate call, as the server saw it."""

    request: pb.GenerateRequest
    metadata: dict[str, str]
    remaining_s: float | None
    ended: threading.Event = field(default_factory=threading.Event)
    """The call is over: finished, failed or cancelled."""

    def has_ended(self) -> bool:
        """Waits for it."""
        return self.ended.wait(WAIT_S)


def words(*texts: str) -> Script:
    """Streams these texts, then usage."""

    def script(request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        for number, text in enumerate(texts):
            first = {"request_id": request.request_id} if number == 0 else {}
            yield pb.GenerateResponse(text=text, token_ids=[number], **first)
        usage = pb.Usage(prompt_tokens=3, completion_tokens=len(texts), cached_tokens=1)
        yield pb.GenerateResponse(finish_reason=pb.FINISH_REASON_STOP, usage=usage)

    return script


def silent(request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
    """Says nothing until the client goes away."""
    while context.is_active():
        time.sleep(0.01)
    yield from ()


def endless(request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
    """Streams until the client goes away."""
    while context.is_active():
        yield pb.GenerateResponse(request_id=request.request_id, text="x", token_ids=[1])
        time.sleep(0.01)


def refusal(error: StagemeshError) -> Script:
    """Refuses with that error."""

    def script(request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        context.abort_with_status(to_grpc(error.of_request(request.request_id)))
        yield pb.GenerateResponse()

    return script


def when_over(context: Any, call: Callable[[], None]) -> None:
    """Call it when the RPC is over; gRPC takes no callback of one that is over already."""
    if not context.add_callback(call):
        call()


class ScriptedRouter(inference_pb2_grpc.InferenceServiceServicer, admin_pb2_grpc.AdminServiceServicer):
    """Use it in a with-block; `script` may be changed at any time, `scripts` are used up first."""

    def __init__(self, script: Script | None = None, port: int = 0) -> None:
        self.script = script or words("Hello", " world")
        self.scripts: list[Script] = []
        self.received: list[Received] = []
        self.sessions: list[ScriptedSession] = []
        self.aborted: list[str] = []
        self.id_metadata = ""
        self.status = admin_pb2.MeshStatus()
        self.timeline: admin_pb2.GetTimelineResponse | StagemeshError = admin_pb2.GetTimelineResponse()
        self.traces: dict[str, admin_pb2.GetRequestTraceResponse] = {}
        self.health = health.HealthServicer()
        self.set_health(health_pb2.HealthCheckResponse.SERVING)
        options = (("grpc.so_reuseport", 0), ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000))
        self._server = grpc.server(futures.ThreadPoolExecutor(8), options=options)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, self._server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(self, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.address = f"127.0.0.1:{self.port}"

    def set_health(self, status: int) -> None:
        self.health.set(INFERENCE, status)

    def request(self, index: int) -> Received:
        """Waits until that many have come: those of one session come one by one."""
        deadline = time.monotonic() + WAIT_S
        while len(self.received) <= index:
            assert time.monotonic() < deadline, f"request {index} did not come within {WAIT_S:g} s"
            time.sleep(0.005)
        return self.received[index]

    def has_ended(self, index: int) -> bool:
        """Waits until that request has come and is over."""
        return self.request(index).has_ended()

    def stop(self) -> None:
        self._server.stop(0).wait()

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def Generate(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        seen = Received(request, dict(context.invocation_metadata()), context.time_remaining())
        when_over(context, seen.ended.set)
        self.received.append(seen)
        context.send_initial_metadata((("stagemesh-request-id", self.id_metadata or request.request_id),))
        script = self.scripts.pop(0) if self.scripts else self.script
        yield from script(request, context)

    def Session(self, requests: Iterator[pb.SessionRequest], context: Any) -> Iterator[pb.SessionResponse]:
        """Runs the script of each request; `received` has them too, `sessions` the calls."""
        session = ScriptedSession(self, context)
        self.sessions.append(session)
        return session.run(requests)

    def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        self.aborted.append(request.request_id)
        return pb.AbortResponse(
            aborted=any(r.request.request_id == request.request_id for r in self.received)
        )

    def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        return pb.GetModelResponse(
            name="scripted", architecture="llama", max_context=64, vocab_size=9, end_token_ids=[2]
        )

    def GetStatus(self, request: Any, context: Any) -> admin_pb2.GetStatusResponse:
        return admin_pb2.GetStatusResponse(status=self.status)

    def WatchStatus(self, request: Any, context: Any) -> Iterator[admin_pb2.WatchStatusResponse]:
        for _ in range(2):
            yield admin_pb2.WatchStatusResponse(status=self.status)

    def GetRequestTrace(self, request: Any, context: Any) -> admin_pb2.GetRequestTraceResponse:
        if request.request_id not in self.traces:
            context.abort_with_status(
                to_grpc(NotFoundError("no such request", request_id=request.request_id))
            )
        return self.traces[request.request_id]

    def GetTimeline(self, request: Any, context: Any) -> admin_pb2.GetTimelineResponse:
        if isinstance(self.timeline, StagemeshError):
            context.abort_with_status(to_grpc(self.timeline))
        return self.timeline  # type: ignore[return-value]


class Refused(Exception):
    """A script refused its request."""


class ScriptedSession:
    """One Session call: a thread runs the script of each request."""

    def __init__(self, router: ScriptedRouter, context: Any) -> None:
        self.router = router
        self.metadata = dict(context.invocation_metadata())
        self.remaining_s = context.time_remaining()
        self.cancelled: list[str] = []
        self.ended = threading.Event()
        self._out: queue.SimpleQueue[pb.SessionResponse | None] = queue.SimpleQueue()
        self._num_live = 1  # the reader
        self._lock = threading.Lock()
        when_over(context, self._hang_up)

    def run(self, requests: Iterator[pb.SessionRequest]) -> Iterator[pb.SessionResponse]:
        threading.Thread(target=self._read, args=(requests,), daemon=True).start()
        return iter(self._out.get, None)

    def _read(self, requests: Iterator[pb.SessionRequest]) -> None:
        try:
            for request in requests:
                for start in request.start:
                    seen = Received(start, self.metadata, self.remaining_s)
                    self.router.received.append(seen)
                    with self._lock:
                        self._num_live += 1
                    script = self.router.scripts.pop(0) if self.router.scripts else self.router.script
                    threading.Thread(target=self._play, args=(script, seen), daemon=True).start()
                self.cancelled += request.cancel
        except grpc.RpcError:
            self._hang_up()
        self._leave()

    def _play(self, script: Script, seen: Received) -> None:
        request_id, ended = seen.request.request_id, False
        try:
            for one in script(seen.request, self):
                if self.ended.is_set() or request_id in self.cancelled:
                    break
                columns: dict[str, Any] = {}
                if one.token_ids or one.text:
                    columns = {"request_ids": [request_id], "texts": [one.text], "token_ids": one.token_ids}
                    columns["token_counts"] = [len(one.token_ids)]
                end = pb.SessionEnd(request_id=request_id, finish_reason=one.finish_reason, usage=one.usage)
                self._out.put(pb.SessionResponse(ends=[end] if one.finish_reason else [], **columns))
                ended = ended or bool(one.finish_reason)
            if not ended and not self.ended.is_set() and request_id not in self.cancelled:
                self._out.put(pb.SessionResponse(ends=[pb.SessionEnd(request_id=request_id)]))
        except Refused:
            pass
        seen.ended.set()
        self._leave()

    def is_active(self) -> bool:
        return not self.ended.is_set()

    def abort_with_status(self, status: Any) -> None:
        """What scripts refuse with; the end goes to the request whose thread this is."""
        [details] = [value for key, value in status.trailing_metadata if key == "grpc-status-details-bin"]
        info = from_proto(status_pb2.Status.FromString(details))
        self._out.put(pb.SessionResponse(ends=[pb.SessionEnd(request_id=info.request_id, status=details)]))
        raise Refused

    def _leave(self) -> None:
        with self._lock:
            self._num_live -= 1
            if self._num_live == 0:
                self._hang_up()

    def _hang_up(self) -> None:
        self.ended.set()
        self._out.put(None)
