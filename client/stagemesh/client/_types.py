"""What a client gets back."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from stagemesh.wire.errors import StagemeshError


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    """An end token, which is not part of the text."""
    LENGTH = "length"
    """max_tokens, or the end of the context."""
    ABORT = "abort"
    """Someone called abort with its id."""
    ERROR = "error"
    """It failed; of many requests, this one alone: the chunk has the error."""
    UNKNOWN = "unknown"
    """A reason newer than this client."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int
    """Tokens of the prompt."""
    completion_tokens: int
    """Tokens generated, an end token counted."""
    cached_tokens: int
    """Prompt tokens found in the prefix cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """What one message of a stream brought."""

    request_id: str
    """The id the router knows the request by."""
    text: str
    """Text that became final; may be empty, never ends inside a character."""
    token_ids: tuple[int, ...]
    """The tokens behind it, an end token included."""
    finish_reason: FinishReason | None
    """Set in the last chunk."""
    usage: Usage | None
    """Set in the last chunk."""
    error: StagemeshError | None = None
    """Set in the last chunk of a request that failed among many (`generate_many`); a single request raises it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole answer, collected."""

    request_id: str
    """The id the router knows the request by."""
    text: str
    """The text of all chunks."""
    token_ids: tuple[int, ...]
    """The tokens of all chunks, an end token included."""
    finish_reason: FinishReason
    """Why it ended."""
    usage: Usage
    """Tokens counted by the router."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The model a mesh serves, and its limits."""

    name: str
    """The name it is served under."""
    architecture: str
    """Such as "llama"."""
    max_context: int
    """Tokens of prompt and output together, at most."""
    vocab_size: int
    """Token ids are below it."""
    has_tokenizer: bool
    """False: the mesh takes and gives token ids alone."""
    has_chat_template: bool
    """False: chat is refused."""
    end_token_ids: tuple[int, ...]
    """Tokens that end a generation."""
