"""A GenerateRequest becomes a Request of the scheduler, with defaults in their order, or is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from served_models import IDS

from stagemesh.model.config import GenerationDefaults
from stagemesh.router.api.checking import check
from stagemesh.router.api.served_model import ServedModel
from stagemesh.router.scheduler import Request
from stagemesh.v1 import inference_pb2
from stagemesh.wire.errors import FailedPreconditionError, InvalidArgumentError, UnimplementedError

CONTEXT = 32
VOCAB_SIZE = 50


class LetterTokenizer:
    """A token a letter; chat is the letters of all messages."""

    has_chat_template = True

    def encode(self, text: str, *, enough: int | None = None) -> list[int]:
        return [ord(letter) % VOCAB_SIZE for letter in text]

    def encode_chat(self, messages: Any, *, enough: int | None = None) -> list[int]:
        return self.encode("".join(message.content for message in messages))


def model(*, tokenizer: Any = None, generation: GenerationDefaults | None = None) -> ServedModel:
    return replace(
        IDS,
        vocab_size=VOCAB_SIZE,
        max_context=CONTEXT,
        end_token_ids=frozenset([2, 3]),
        generation=generation or GenerationDefaults(),
        tokenizer=tokenizer,
    )


def message(**fields: Any) -> inference_pb2.GenerateRequest:
    values: dict[str, Any] = {}
    if not {"text", "chat", "token_ids"} & set(fields):
        values["token_ids"] = inference_pb2.TokenIds(ids=[4, 5, 6])
    return inference_pb2.GenerateRequest(**values | fields)


def checked(served: ServedModel | None = None, **fields: Any) -> Request:
    return check(message(**fields), served or model())


def test_unset_fields_have_the_defaults_of_the_contract() -> None:
    request = checked()
    assert request.prompt.tolist() == [4, 5, 6]
    assert request.max_tokens == CONTEXT - 3, "not to the end of the context"
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.top_p) == (1.0, 0, 1.0)
    assert request.end_token_ids == {2, 3}
    assert request.priority == 0
    assert request.request_id


def test_unset_fields_take_the_models_generation_config() -> None:
    served = model(generation=GenerationDefaults(temperature=0.6, top_k=20, top_p=0.9))
    sampling = checked(served).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.6, 20, 0.9)


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_token_of_the_tokenizer_that_the_model_does_not_have(kind: str) -> None:
    """Added to the tokenizer and never to the embedding; on a stage it would be an index out of range."""

    class Larger(LetterTokenizer):
        def encode(self, text: str, *, enough: int | None = None) -> list[int]:
            return [VOCAB_SIZE if letter == "!" else 1 for letter in text]

    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="a!b")])
    fields: dict[str, Any] = {"text": {"text": "a!b"}, "chat": {"chat": chat}}[kind]
    with pytest.raises(
        InvalidArgumentError, match=f"{kind} has token {VOCAB_SIZE} of the tokenizer"
    ) as caught:
        checked(model(tokenizer=Larger()), **fields)
    assert (caught.value.reason, caught.value.field) == ("BAD_FIELD", kind)
    assert checked(model(tokenizer=Larger()), text="ab").prompt.tolist() == [1, 1]


def test_zero_is_not_unset() -> None:
    served = model(generation=GenerationDefaults(temperature=0.6, top_k=20, top_p=0.9))
    sampling = checked(served, temperature=0.0, top_k=0, top_p=1.0, seed=0).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed) == (0.0, 0, 1.0, 0)


def test_seeds_and_ids_that_are_not_given_differ() -> None:
    requests = [checked() for _ in range(8)]
    assert len({request.sampling.seed for request in requests}) == 8
    assert len({request.request_id for request in requests}) == 8


def test_given_values_arrive() -> None:
    request = checked(
        request_id="mine", max_tokens=7, temperature=0.5, top_k=3, top_p=0.25, seed=2**64 - 1, priority=-4
    )
    assert (request.request_id, request.max_tokens, request.priority) == ("mine", 7, -4)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed) == (0.5, 3, 0.25, 2**64 - 1)


def test_ignore_eos_takes_the_end_tokens_away() -> None:
    assert checked(ignore_eos=True).end_token_ids == frozenset()


def test_top_k_above_the_vocabulary_is_the_vocabulary() -> None:
    assert checked(top_k=2**31).sampling.top_k == VOCAB_SIZE


def test_text_and_chat_are_tokenized() -> None:
    served = model(tokenizer=LetterTokenizer())
    expected = LetterTokenizer().encode("hello")
    assert checked(served, text="hello").prompt.tolist() == expected
    chat = inference_pb2.Chat(
        messages=[
            inference_pb2.ChatMessage(role="user", content="hel"),
            inference_pb2.ChatMessage(role="user", content="lo"),
        ]
    )
    assert checked(served, chat=chat).prompt.tolist() == expected


@pytest.mark.parametrize(
    ("fields", "field", "reason"),
    [
        ({"text": ""}, "text", "EMPTY_PROMPT"),
        ({"chat": inference_pb2.Chat()}, "chat", "EMPTY_PROMPT"),
        ({"token_ids": inference_pb2.TokenIds()}, "token_ids", "EMPTY_PROMPT"),
        ({"text": "x" * CONTEXT}, "text", "PROMPT_TOO_LONG"),
        ({"token_ids": inference_pb2.TokenIds(ids=[1] * CONTEXT)}, "token_ids", "PROMPT_TOO_LONG"),
        ({"token_ids": inference_pb2.TokenIds(ids=[VOCAB_SIZE])}, "token_ids.ids", "BAD_FIELD"),
        ({"token_ids": inference_pb2.TokenIds(ids=[2**32 - 1])}, "token_ids.ids", "BAD_FIELD"),
        ({"max_tokens": 0}, "max_tokens", "BAD_FIELD"),
        ({"max_tokens": CONTEXT - 2}, "max_tokens", "BAD_FIELD"),
        ({"temperature": -1e-6}, "temperature", "BAD_FIELD"),
        ({"temperature": math.nan}, "temperature", "BAD_FIELD"),
        ({"temperature": -math.inf}, "temperature", "BAD_FIELD"),
        ({"top_p": 0.0}, "top_p", "BAD_FIELD"),
        ({"top_p": 1.0001}, "top_p", "BAD_FIELD"),
        ({"top_p": math.nan}, "top_p", "BAD_FIELD"),
        ({"request_id": "ü"}, "request_id", "BAD_FIELD"),
        ({"request_id": "i" * 129}, "request_id", "BAD_FIELD"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_fields(fields: dict[str, Any], field: str, reason: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        checked(model(tokenizer=LetterTokenizer()), **fields)
    assert (refused.value.field, refused.value.reason) == (field, reason)
    assert refused.value.message.startswith(field)


def test_no_prompt_at_all() -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        check(inference_pb2.GenerateRequest(max_tokens=3), model())
    assert refused.value.field == "prompt"


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_text_needs_a_tokenizer(kind: str) -> None:
    given_prompt = {
        "text": "hi",
        "chat": inference_pb2.Chat(messages=[inference_pb2.ChatMessage(content="hi")]),
    }
    with pytest.raises(FailedPreconditionError) as refused:
        checked(**{kind: given_prompt[kind]})
    assert (refused.value.field, refused.value.reason) == (kind, "NO_TOKENIZER")


def test_every_field_of_the_message_is_taken_or_refused_by_name() -> None:
    """A field that is added to the proto must not be ignored silently."""
    taken = {"request_id", "text", "token_ids", "chat", "max_tokens", "temperature", "top_k", "top_p", "seed"}
    taken |= {"ignore_eos", "priority", "traceparent", "timeout_ms"}
    samples: dict[str, Any] = {"stop": ["x"], "json_schema": "{}", "adapter": "a", "n": 2, "logprobs": 0}
    for descriptor in inference_pb2.GenerateRequest.DESCRIPTOR.fields:
        if descriptor.name in taken:
            continue
        with pytest.raises(UnimplementedError) as refused:
            checked(**{descriptor.name: samples.get(descriptor.name, 0.5)})
        assert refused.value.field == descriptor.name
        assert f"'{descriptor.name}'" in refused.value.message


@given(
    length=st.integers(0, CONTEXT + 3),
    max_tokens=st.none() | st.integers(0, CONTEXT + 3),
    temperature=st.floats(width=32),
    top_p=st.floats(width=32),
)
def test_what_is_taken_is_what_the_scheduler_may_trust(
    length: int, max_tokens: int | None, temperature: float, top_p: float
) -> None:
    prompt = inference_pb2.TokenIds(ids=[1] * length)
    good = (
        0 < length < CONTEXT
        and (max_tokens is None or 1 <= max_tokens <= CONTEXT - length)
        and 0 <= temperature < math.inf
        and 0 < top_p <= 1
    )
    fields = {"token_ids": prompt, "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
    if not good:
        with pytest.raises(InvalidArgumentError):
            checked(**fields)
        return
    request = checked(**fields)
    assert len(request.prompt) == length
    assert 1 <= request.max_tokens <= CONTEXT - length
