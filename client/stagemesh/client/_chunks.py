"""From messages on the wire to what the caller gets. Pure; both clients use it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from google.rpc import status_pb2

from stagemesh.client._types import Chunk, Completion, FinishReason, ModelInfo, Usage
from stagemesh.v1 import inference_pb2 as pb
from stagemesh.wire.errors import StagemeshError
from stagemesh.wire.status import from_proto

_FINISH_REASONS: dict[int, FinishReason | None] = {
    pb.FINISH_REASON_UNSPECIFIED: None,
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_ABORT: FinishReason.ABORT,
}


def to_chunk(response: pb.GenerateResponse, request_id: str) -> Chunk:
    """One message of a stream; only the first carries the id."""
    return Chunk(
        request_id=request_id,
        text=response.text,
        token_ids=tuple(response.token_ids),
        finish_reason=_FINISH_REASONS.get(response.finish_reason, FinishReason.UNKNOWN),
        usage=_to_usage(response.usage) if response.HasField("usage") else None,
    )


def session_deltas(response: pb.SessionResponse) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """The (request id, text, token ids) of each request that a message of a session brings something for."""
    token_ids, offset = list(response.token_ids), 0
    for request_id, text, count in zip(
        response.request_ids, response.texts, response.token_counts, strict=True
    ):
        yield request_id, text, tuple(token_ids[offset : offset + count])
        offset += count


def end_error(end: pb.SessionEnd) -> StagemeshError | None:
    """Why a request of a session failed; None if it did not."""
    return from_proto(status_pb2.Status.FromString(end.status), end.request_id) if end.status else None


def to_last_chunk(
    end: pb.SessionEnd, text: str = "", token_ids: tuple[int, ...] = (), error: StagemeshError | None = None
) -> Chunk:
    """The end of a request of a session, with what the same message brought of it."""
    return Chunk(
        request_id=end.request_id,
        text=text,
        token_ids=token_ids,
        finish_reason=FinishReason.ERROR
        if error
        else _FINISH_REASONS.get(end.finish_reason, FinishReason.UNKNOWN),
        usage=_to_usage(end.usage) if end.HasField("usage") else None,
        error=error,
    )


def to_completion(request_id: str, chunks: Iterable[Chunk]) -> Completion:
    """All chunks of one stream as one answer."""
    texts: list[str] = []
    token_ids: list[int] = []
    finish_reason = FinishReason.UNKNOWN
    usage: Usage | None = None
    for chunk in chunks:
        texts.append(chunk.text)
        token_ids.extend(chunk.token_ids)
        finish_reason = chunk.finish_reason or finish_reason
        usage = chunk.usage or usage
    return Completion(
        request_id=request_id,
        text="".join(texts),
        token_ids=tuple(token_ids),
        finish_reason=finish_reason,
        usage=usage or Usage(prompt_tokens=0, completion_tokens=len(token_ids), cached_tokens=0),
    )


def to_model_info(response: pb.GetModelResponse) -> ModelInfo:
    """The model and its limits."""
    return ModelInfo(
        name=response.name,
        architecture=response.architecture,
        max_context=response.max_context,
        vocab_size=response.vocab_size,
        has_tokenizer=response.has_tokenizer,
        has_chat_template=response.has_chat_template,
        end_token_ids=tuple(response.end_token_ids),
    )


def _to_usage(usage: pb.Usage) -> Usage:
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )
