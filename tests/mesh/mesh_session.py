"""A Session call from the client's side."""

from __future__ import annotations

import queue
from collections import defaultdict
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from google.rpc import status_pb2
from mesh_calls import Answer, Refusal, to_refusal
from running_mesh import CALL_TIMEOUT_S, RunningMesh

from stagemesh.v1 import inference_pb2


@dataclass(slots=True)
class Session:
    """Read message by message."""

    mesh: RunningMesh
    answers: dict[str, Answer] = field(default_factory=lambda: defaultdict(Answer))
    refused: dict[str, Refusal] = field(default_factory=dict)
    call: Any = None
    _outgoing: queue.SimpleQueue[inference_pb2.SessionRequest | None] = field(
        default_factory=queue.SimpleQueue
    )

    def __enter__(self) -> Session:
        self.call = self.mesh.stub.Session(iter(self._outgoing.get, None), timeout=CALL_TIMEOUT_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._outgoing.put(None)
        if kind:
            self.call.cancel()

    def send(self, *starts: inference_pb2.GenerateRequest, cancel: tuple[str, ...] = ()) -> None:
        self._outgoing.put(inference_pb2.SessionRequest(start=starts, cancel=cancel))

    def half_close(self) -> None:
        self._outgoing.put(None)

    def read(self) -> bool:
        """Take one message; False at the end of the stream."""
        response = next(self.call, None)
        if response is None:
            return False
        assert len(response.request_ids) == len(response.texts) == len(response.token_counts)
        assert sum(response.token_counts) == len(response.token_ids)
        offset = 0
        for request_id, text, count in zip(
            response.request_ids, response.texts, response.token_counts, strict=True
        ):
            answer = self.answers[request_id]
            assert not answer.finish_reason, f"{request_id} went on after its end"
            answer.token_ids += response.token_ids[offset : offset + count]
            answer.text += text
            offset += count
        for end in response.ends:
            if end.status:
                assert end.request_id not in self.refused
                self.refused[end.request_id] = to_refusal(status_pb2.Status.FromString(end.status))
            else:
                answer = self.answers[end.request_id]
                assert not answer.finish_reason, f"{end.request_id} ended twice"
                answer.finish_reason, answer.usage = end.finish_reason, end.usage
        return True

    def read_all(self) -> None:
        while self.read():
            pass

    def read_until_ended(self, *request_ids: str) -> None:
        while not all(self.answers[name].finish_reason or name in self.refused for name in request_ids):
            assert self.read(), "the session ended first"
