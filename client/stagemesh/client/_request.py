"""From keyword arguments to a GenerateRequest. Pure; both clients use it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypedDict, cast

from stagemesh.v1 import inference_pb2 as pb
from stagemesh.wire.errors import InvalidArgumentError
from stagemesh.wire.service import MAX_MESSAGE_BYTES


class Message(TypedDict):
    """A message of a conversation."""

    role: str
    """"system", "user", "assistant" or what else the model's template knows."""
    content: str


class RequestOptions(TypedDict, total=False):
    """Options of a request. What is left out, or None, is the model's or the router's choice."""

    max_tokens: int | None
    """Tokens to generate at most, at least 1. Left out: to the end of the context."""
    temperature: float | None
    """0 is greedy. Left out: the model's generation config, else 1.0."""
    top_k: int | None
    """Sample among the k most probable tokens; 0 is off."""
    top_p: float | None
    """Sample among the fewest tokens whose probability reaches it; in (0, 1]."""
    seed: int | None
    """The same seed gives the same tokens. Left out: drawn at random."""
    ignore_eos: bool
    """Go on past end tokens, up to max_tokens."""
    priority: int
    """Higher goes first; default 0."""
    request_id: str
    """Unique among live requests. Left out: made here."""
    stop: Sequence[str]
    """Strings that end the generation. This and what follows is refused by name by a mesh without it."""
    logprobs: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    min_p: float | None
    n: int | None
    json_schema: str | None
    adapter: str | None


class RequestSpec(RequestOptions, total=False):
    """One of many requests, with options of its own: exactly one of prompt, token_ids and messages."""

    prompt: str
    """A text to go on from."""
    token_ids: Iterable[int]
    """Token ids to go on from."""
    messages: Iterable[Message]
    """A conversation to answer."""


Prompt: TypeAlias = str | RequestSpec | Sequence[int] | Sequence[Message]
"""A text, token ids, a conversation, or any of them with options of its own."""

MAX_REQUEST_BYTES = MAX_MESSAGE_BYTES - 4096
"""Of one request. It may share a message, and a message too long would end all that share its session."""
_OPTIONS = frozenset(RequestOptions.__annotations__)


def build_request(
    *,
    prompt: str | None = None,
    token_ids: Iterable[int] | None = None,
    messages: Iterable[Message] | None = None,
    options: RequestOptions,
) -> pb.GenerateRequest:
    """The request on the wire; an option that is None stays unset, which differs from 0.

    Raises:
        InvalidArgumentError: Not exactly one prompt, or a value its field cannot hold. Limits that depend
            on the model are the router's to check.
        TypeError: An option of that name does not exist.
    """
    given = [name for name, value in _prompts(prompt, token_ids, messages) if value is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise InvalidArgumentError(
            f"prompt: give exactly one of a text, token_ids and messages (got {found})",
            reason="INVALID_PROMPT",
            field="prompt",
        )
    unknown = sorted(set(options) - _OPTIONS)
    if unknown:
        raise TypeError(f"unknown option '{unknown[0]}'; known are {', '.join(sorted(_OPTIONS))}")
    request = pb.GenerateRequest()
    if prompt is not None:
        _set(request, "text", prompt)
    elif token_ids is not None:
        _set(request, "token_ids", token_ids)
    elif messages is not None:
        _set(request, "chat", messages)
    for name, value in options.items():
        if value is not None:
            _set(request, name, value)
    if (size := request.ByteSize()) > MAX_REQUEST_BYTES:
        raise InvalidArgumentError(
            f"the request has {size} bytes; a router takes at most {MAX_REQUEST_BYTES}",
            reason="INVALID_VALUE",
            field=request.WhichOneof("prompt") or "",
        )
    return request


def build_requests(prompts: Iterable[Prompt], options: RequestOptions) -> list[pb.GenerateRequest]:
    """A request for each prompt; raises as `build_request`, naming the place of the prompt."""
    requests = []
    for index, prompt in enumerate(prompts):
        try:
            requests.append(build_request(**_parts(prompt, options)))
        except InvalidArgumentError as error:
            raise InvalidArgumentError(
                f"prompts[{index}]: {error.message}", reason=error.reason, field=error.field
            ) from error
    return requests


def _parts(prompt: Prompt, options: RequestOptions) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt, "options": options}
    if isinstance(prompt, Mapping):
        spec = dict(prompt)
        kinds = {name: spec.pop(name, None) for name in ("prompt", "token_ids", "messages")}
        return {**kinds, "options": cast(RequestOptions, {**options, **spec})}
    if isinstance(prompt, bytes) or not isinstance(prompt, Iterable):
        raise InvalidArgumentError(
            f"{prompt!r:.80} is no prompt; expected a text, token ids, messages or a dict with one of them",
            reason="INVALID_PROMPT",
            field="prompt",
        )
    parts = list(prompt)
    is_chat = bool(parts) and isinstance(parts[0], Mapping)
    return {"messages" if is_chat else "token_ids": parts, "options": options}


def _prompts(
    prompt: str | None, token_ids: Iterable[int] | None, messages: Iterable[Message] | None
) -> list[tuple[str, Any]]:
    return [("a text", prompt), ("token_ids", token_ids), ("messages", messages)]


def _set(request: pb.GenerateRequest, name: str, value: Any) -> None:
    try:
        if name == "token_ids":
            # An empty list is a prompt too; the router says what is wrong with it.
            request.token_ids.SetInParent()
            request.token_ids.ids.extend(value)
        elif name == "chat":
            request.chat.SetInParent()
            request.chat.messages.extend(pb.ChatMessage(**message) for message in value)
        elif name == "stop":
            request.stop.extend([value] if isinstance(value, str) else value)
        else:
            setattr(request, name, value)
    except (TypeError, ValueError) as error:
        shown = "messages" if name == "chat" else name
        raise InvalidArgumentError(
            f"{shown}: {value!r:.80} does not fit: {error}", reason="INVALID_VALUE", field=name
        ) from error
