"""The tokens of one request on their way to its client."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Sequence
from typing import Protocol

from stagemesh.router.scheduler import Finish, Request
from stagemesh.router.text import Tokenizer
from stagemesh.router.tracing.request_trace import RequestTrace
from stagemesh.v1 import inference_pb2
from stagemesh.wire.errors import StagemeshError

FINISH_REASONS = {
    Finish.STOP: inference_pb2.FINISH_REASON_STOP,
    Finish.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    Finish.ABORT: inference_pb2.FINISH_REASON_ABORT,
}


NO_TOKENS = array("I")


class Reader(Protocol):
    """Who writes a stream's tokens to its client."""

    def note(self, stream: RequestStream) -> None:
        """The stream has something again: told once, until `RequestStream.take`."""


class RequestStream:
    """Collects the tokens of a request until its reader takes them: they coalesce while the reader is busy.

    Args:
        handle: Names it to the scheduler's side.
        request: Whose tokens.
        tokenizer: None where the model has none; the text stays empty then.
        reader: Told when there is something to take.
        arrived: Monotonic seconds.
    """

    __slots__ = (
        "_text",
        "arrived",
        "ended",
        "error",
        "finish",
        "first_token",
        "handle",
        "num_cached",
        "num_tokens",
        "pending",
        "reader",
        "request",
        "trace",
    )

    def __init__(
        self, handle: int, request: Request, tokenizer: Tokenizer | None, reader: Reader, arrived: float
    ) -> None:
        self.handle = handle
        self.request = request
        self.reader = reader
        self.arrived = arrived
        self.first_token = 0.0
        self.ended = 0.0
        """Monotonic seconds; 0 until then."""
        self.trace: RequestTrace | None = None
        """Set where the request is sampled."""
        self.pending = NO_TOKENS[:]
        """Token ids that were not taken yet; 4 bytes each, for a client that does not read lets them wait."""
        self.num_tokens = 0
        """Taken so far."""
        self.num_cached = 0
        self.finish: Finish | None = None
        self.error: StagemeshError | None = None
        self._text = tokenizer.decoding.stream() if tokenizer else None

    @property
    def finish_reason(self) -> inference_pb2.FinishReason:
        """On the wire; unspecified while it runs."""
        return FINISH_REASONS[self.finish] if self.finish else inference_pb2.FINISH_REASON_UNSPECIFIED

    @property
    def usage(self) -> inference_pb2.Usage:
        """Tokens taken so far."""
        return inference_pb2.Usage(
            prompt_tokens=len(self.request.prompt),
            completion_tokens=self.num_tokens,
            cached_tokens=self.num_cached,
        )

    def end(self, finish: Finish, num_cached: int) -> None:
        """It ended well."""
        self.finish, self.num_cached = finish, num_cached
        self.ended = time.monotonic()
        if not self.pending:
            self.reader.note(self)

    def fail(self, error: StagemeshError) -> None:
        """It ends with an error; what it already has is still delivered."""
        self.error = error
        self.ended = time.monotonic()
        if not self.pending:
            self.reader.note(self)

    def take(self) -> tuple[Sequence[int], str]:
        """The token ids that came since the last call, and the text that became final with them."""
        token_ids = self.pending
        self.pending = NO_TOKENS[:]
        if not self.num_tokens:
            self.first_token = time.monotonic()
        self.num_tokens += len(token_ids)
        if self._text is None:
            return token_ids, ""
        if self.finish is None:
            return token_ids, self._text.push(token_ids)
        # An end token that ended the request is not part of the answer.
        text = self._text.push(token_ids[:-1] if self.finish is Finish.STOP else token_ids)
        return token_ids, text + self._text.finish()


class OneStream:
    """Reader of a single stream: what Generate writes from."""

    def __init__(self) -> None:
        self._wake = asyncio.Event()

    def note(self, stream: RequestStream) -> None:
        self._wake.set()

    async def next(self, stream: RequestStream) -> inference_pb2.GenerateResponse:
        """The next message; its finish_reason is set in the last. Raises the error the stream ended with."""
        await self._wake.wait()
        self._wake.clear()
        token_ids, text = stream.take()
        if stream.error:
            if not token_ids:
                raise stream.error
            self._wake.set()
        response = inference_pb2.GenerateResponse(token_ids=token_ids, text=text)
        if stream.finish:
            response.finish_reason = stream.finish_reason
            response.usage.CopyFrom(stream.usage)
        return response
