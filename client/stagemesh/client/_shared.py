"""One session under the concurrent calls of a client, without I/O: whose is what, and when to hang up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from stagemesh.client._chunks import end_error, session_deltas
from stagemesh.v1 import inference_pb2 as pb
from stagemesh.wire.errors import DeadlineExceededError, StagemeshError


class Inbox:
    """What has come for one request and was not taken yet; merged, so that a slow reader costs no memory.

    Args:
        wake: Called when something comes, in whatever thread it comes.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        # Reentrant, for the collector of garbage may end a forgotten stream while this thread is in here.
        self._lock = threading.RLock()
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._end: pb.SessionEnd | None = None
        self._error: StagemeshError | None = None
        self.closed = False
        """Nothing more comes, and everything was taken."""

    def put(self, text: str, token_ids: tuple[int, ...]) -> None:
        """A delta came."""
        with self._lock:
            self._texts.append(text)
            self._token_ids += token_ids
        self._wake()

    def end(self, end: pb.SessionEnd | None, error: StagemeshError | None) -> None:
        """The request ended: well, with an error, or (both None) because nobody wants it."""
        with self._lock:
            self._end, self._error = end, error
            self.closed = end is None and error is None
        self._wake()

    def take(self) -> pb.GenerateResponse | None:
        """Everything so far as one message; None if there is nothing. Raises the error of the request."""
        with self._lock:
            if self._error and not self._token_ids:
                self.closed = True
                raise self._error
            if not self._token_ids and self._end is None:
                return None
            response = pb.GenerateResponse(text="".join(self._texts), token_ids=self._token_ids)
            self._texts, self._token_ids = [], []
            if self._end is not None:
                self.closed = True
                response.finish_reason = self._end.finish_reason
                if self._end.HasField("usage"):
                    response.usage.CopyFrom(self._end.usage)
                self._end = None
            return response


class SharedSession:
    """The requests of one Session call. It hangs up when the last of them has ended.

    Args:
        send: Queues a message to the router; None closes the client's side.
        metadata: The call was opened with; requests with other metadata need a call of their own.
    """

    def __init__(
        self, send: Callable[[pb.SessionRequest | None], None], metadata: tuple[tuple[str, str], ...]
    ) -> None:
        self.metadata = metadata
        self._send = send
        # Reentrant: a stream may be forgotten, and so cancelled, at any point of this thread's work.
        self._lock = threading.RLock()
        self._inboxes: dict[str, Inbox] = {}
        self._open = True

    @property
    def num_live(self) -> int:
        """Requests on it."""
        return len(self._inboxes)

    def start(self, request: pb.GenerateRequest, inbox: Inbox) -> bool:
        """Send a request; False if the session has hung up already."""
        with self._lock:
            if not self._open or request.request_id in self._inboxes:
                return False
            self._inboxes[request.request_id] = inbox
            self._send(pb.SessionRequest(start=[request]))
            return True

    def cancel(self, request_id: str, inbox: Inbox) -> None:
        """Want no more of a request."""
        with self._lock:
            if self._inboxes.get(request_id) is inbox:
                del self._inboxes[request_id]
                self._send(pb.SessionRequest(cancel=[request_id]))
                self._hang_up_if_idle()
        inbox.end(None, None)

    def take(self, response: pb.SessionResponse) -> None:
        """A message came."""
        for request_id, text, token_ids in session_deltas(response):
            if inbox := self._inboxes.get(request_id):
                inbox.put(text, token_ids)
        with self._lock:
            for end in response.ends:
                if inbox := self._inboxes.pop(end.request_id, None):
                    error = end_error(end)
                    inbox.end(None if error else end, error)
            self._hang_up_if_idle()

    def lost(self, error: StagemeshError) -> None:
        """The call is over; whatever was live on it has ended."""
        with self._lock:
            self._open = False
            left, self._inboxes = self._inboxes, {}
            self._send(None)
        for request_id, inbox in left.items():
            inbox.end(None, error.of_request(request_id))

    def _hang_up_if_idle(self) -> None:
        if self._open and not self._inboxes:
            self._open = False
            self._send(None)


class Deadline:
    """Of one request on a shared session, whose call has none.

    Args:
        timeout_s: From now; None is for ever.
        request_id: For the error.
    """

    def __init__(self, timeout_s: float | None, request_id: str) -> None:
        self._timeout_s = timeout_s
        self._ends = None if timeout_s is None else time.monotonic() + timeout_s
        self._request_id = request_id

    def left_s(self) -> float | None:
        """Seconds; None is for ever. Raises DeadlineExceededError when there are none."""
        if self._ends is None:
            return None
        left_s = self._ends - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceededError(
                f"the deadline of {self._timeout_s:.3g} s passed", request_id=self._request_id
            )
        return left_s
