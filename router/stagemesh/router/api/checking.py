"""A GenerateRequest into a scheduler's Request: every field checked, every refusal naming field and value."""

from __future__ import annotations

import math
import secrets

import numpy as np
import numpy.typing as npt

from stagemesh.router.api.served_model import ServedModel
from stagemesh.router.scheduler import Request, Sampling
from stagemesh.v1 import inference_pb2
from stagemesh.wire.errors import FailedPreconditionError, InvalidArgumentError, UnimplementedError

MAX_REQUEST_ID = 128
MIN_TEMPERATURE = 1e-5
"""Below it sampling is greedy: dividing by less would overflow, and chooses the same token."""
NOT_BUILT = (
    "stop",
    "logprobs",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_p",
    "n",
    "json_schema",
    "adapter",
)
"""Fields of GenerateRequest that are refused by name."""
_HARMLESS = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_p": 0.0,
}
"""Values that ask for nothing."""


def check(message: inference_pb2.GenerateRequest, model: ServedModel) -> Request:
    """The request to schedule.

    Raises:
        InvalidArgumentError: A field is out of range, or the prompt is empty or too long.
        FailedPreconditionError: Text for a model without a tokenizer, chat for one without a template.
        UnimplementedError: An option that is known and not built.
    """
    _refuse_not_built(message)
    request_id = message.request_id or secrets.token_hex(8)
    if len(request_id) > MAX_REQUEST_ID or not request_id.isprintable() or not request_id.isascii():
        raise _bad(
            "request_id",
            f"has {len(request_id)} characters; expected at most {MAX_REQUEST_ID}, printable ASCII",
        )
    prompt = _prompt(message, model)
    return Request(
        request_id=request_id,
        prompt=prompt,
        max_tokens=_max_tokens(message, len(prompt), model.max_context),
        open_ended=not message.HasField("max_tokens"),
        sampling=_sampling(message, model),
        end_token_ids=frozenset() if message.ignore_eos else model.end_token_ids,
        priority=message.priority,
    )


def _refuse_not_built(message: inference_pb2.GenerateRequest) -> None:
    for descriptor, value in message.ListFields():
        if descriptor.name in NOT_BUILT and value != _HARMLESS.get(descriptor.name):
            raise UnimplementedError(
                f"option '{descriptor.name}' is not built in this release; leave it out",
                reason="OPTION_NOT_BUILT",
                field=descriptor.name,
            )


def _prompt(message: inference_pb2.GenerateRequest, model: ServedModel) -> npt.NDArray[np.uint32]:
    kind = message.WhichOneof("prompt")
    if kind == "token_ids":
        _check_length(kind, len(message.token_ids.ids), model)
        ids = np.array(message.token_ids.ids, np.uint32)
        if len(ids) and ids.max() >= model.vocab_size:
            where = int(ids.argmax())
            raise _bad("token_ids.ids", f"[{where}] is {ids[where]}; expected an id below {model.vocab_size}")
    elif kind is None:
        raise _bad("prompt", "is missing; give text, token_ids or chat")
    elif model.tokenizer is None:
        raise FailedPreconditionError(
            f"model {model.name} has no tokenizer and takes token ids only; give token_ids",
            reason="NO_TOKENIZER",
            field=kind,
        )
    elif kind == "text":
        ids = np.array(model.tokenizer.encode(message.text, enough=model.max_context), np.uint32)
    else:
        ids = np.array(
            model.tokenizer.encode_chat(message.chat.messages, enough=model.max_context), np.uint32
        )
    if kind != "token_ids" and len(ids) and ids.max() >= model.vocab_size:
        raise _bad(
            kind,
            f"has token {ids.max()} of the tokenizer, and the model knows those below {model.vocab_size}; "
            "leave out what makes that token",
        )
    if not len(ids):
        raise _bad(kind, "is an empty prompt; give at least one token", "EMPTY_PROMPT")
    _check_length(kind, len(ids), model)
    return ids


def _check_length(kind: str, num_tokens: int, model: ServedModel) -> None:
    if num_tokens >= model.max_context:
        # A text is not encoded further than is enough to know that.
        more = " or more" if kind != "token_ids" and num_tokens > 2 * model.max_context else ""
        raise _bad(
            kind,
            f"is {num_tokens} tokens{more}; the context is {model.max_context}, and one must be left for the answer",
            "PROMPT_TOO_LONG",
        )


def _max_tokens(message: inference_pb2.GenerateRequest, prompt_tokens: int, max_context: int) -> int:
    room = max_context - prompt_tokens
    if not message.HasField("max_tokens"):
        return room
    if not 1 <= message.max_tokens <= room:
        raise _bad(
            "max_tokens",
            f"is {message.max_tokens}; expected 1 to {room}, what the context of {max_context} leaves "
            f"after a prompt of {prompt_tokens}",
        )
    return message.max_tokens


def _sampling(message: inference_pb2.GenerateRequest, model: ServedModel) -> Sampling:
    defaults = model.generation

    def chosen(name: str, default: float | None, fallback: float) -> float:
        if message.HasField(name):
            return float(getattr(message, name))
        return fallback if default is None else default

    temperature = chosen("temperature", defaults.temperature, 1.0)
    top_p = chosen("top_p", defaults.top_p, 1.0)
    top_k = int(chosen("top_k", defaults.top_k, 0))
    if not (math.isfinite(temperature) and temperature >= 0):
        raise _bad("temperature", f"is {temperature:g}; expected 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise _bad("top_p", f"is {top_p:g}; expected above 0 and at most 1")
    if temperature < MIN_TEMPERATURE:
        temperature = 0.0
    seed = message.seed if message.HasField("seed") else secrets.randbits(64)
    return Sampling(temperature=temperature, top_k=min(top_k, model.vocab_size), top_p=top_p, seed=seed)


def _bad(field: str, what: str, reason: str = "BAD_FIELD") -> InvalidArgumentError:
    return InvalidArgumentError(f"{field} {what}", field=field, reason=reason)
