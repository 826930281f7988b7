"""The tokens of one request on their way to its client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from stagemesh.router.scheduler import Delta, Finish, Request
from stagemesh.router.text import IncrementalDetokenizer, Tokenizer
from stagemesh.router.tracing.request_trace import RequestTrace
from stagemesh.v1 import inference_pb2
from stagemesh.wire.errors import StagemeshError

FINISH_REASONS = {
    Finish.STOP: inference_pb2.FINISH_REASON_STOP,
    Finish.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    Finish.ABORT: inference_pb2.FINISH_REASON_ABORT,
}


@dataclass(slots=True)
class StreamTimes:
    """Monotonic seconds of what happened to a request; 0 where it has not."""

    arrived: float
    admitted: float = 0.0
    """Its first step was sent."""
    first_token: float = 0.0
    ended: float = 0.0


class RequestStream:
    """Collects the deltas of a request until its writer takes them: tokens coalesce while the writer is busy.

    Args:
        request: Whose tokens.
        tokenizer: None where the model has none; the text stays empty then.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        self.request = request
        self.times = StreamTimes(time.monotonic())
        self.num_tokens = 0
        self.num_cached = 0
        """Prompt tokens found in the prefix cache."""
        self.finish: Finish | None = None
        self.error: StagemeshError | None = None
        self.trace: RequestTrace | None = None
        """Set where the request is sampled."""
        self.on_change: Callable[[RequestStream], None] | None = None
        """Called at every push and at the end, by a writer that serves many streams."""
        self.expiry: asyncio.TimerHandle | None = None
        """Runs when its own timeout has passed."""
        self._detokenizer = IncrementalDetokenizer(tokenizer) if tokenizer else None
        self._token_ids: list[int] = []
        self._wake = asyncio.Event()

    @property
    def finish_reason(self) -> inference_pb2.FinishReason:
        """On the wire; unspecified while it runs."""
        return FINISH_REASONS[self.finish] if self.finish else inference_pb2.FINISH_REASON_UNSPECIFIED

    @property
    def usage(self) -> inference_pb2.Usage:
        """Tokens so far."""
        return inference_pb2.Usage(
            prompt_tokens=len(self.request.prompt),
            completion_tokens=self.num_tokens,
            cached_tokens=self.num_cached,
        )

    def push(self, delta: Delta) -> None:
        """New tokens, or the end."""
        if not self.num_tokens and delta.token_ids:
            self.times.first_token = time.monotonic()
        self.num_tokens += len(delta.token_ids)
        self._token_ids += delta.token_ids
        if delta.finish:
            self.finish = delta.finish
            self.times.ended = time.monotonic()
        self._changed()

    def fail(self, error: StagemeshError) -> None:
        """It ends with an error; what it already has is still delivered."""
        self.error = error
        self.times.ended = time.monotonic()
        self._changed()

    def take(self) -> tuple[list[int], str]:
        """The token ids that came since the last call, and the text that became final with them."""
        token_ids, self._token_ids = self._token_ids, []
        if self._detokenizer is None:
            return token_ids, ""
        # An end token that ended the request is not part of the answer.
        stopped = self.finish is Finish.STOP
        text = self._detokenizer.push(token_ids[:-1] if stopped else token_ids)
        return token_ids, text + self._detokenizer.finish() if self.finish else text

    async def next(self) -> inference_pb2.GenerateResponse:
        """The next message; its finish_reason is set in the last. Raises what `fail` was given."""
        await self._wake.wait()
        self._wake.clear()
        token_ids, text = self.take()
        if self.error:
            if not token_ids:
                raise self.error
            self._wake.set()
        response = inference_pb2.GenerateResponse(token_ids=token_ids, text=text)
        if self.finish:
            response.finish_reason = self.finish_reason
            response.usage.CopyFrom(self.usage)
        return response

    def _changed(self) -> None:
        self._wake.set()
        if self.on_change:
            self.on_change(self)
