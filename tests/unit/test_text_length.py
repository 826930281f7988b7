"""A text that is far too long is refused by its beginning: to encode all of it would hold up everybody else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from served_models import IDS
from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel

from stagemesh.router.api.checking import check
from stagemesh.router.text import Tokenizer
from stagemesh.v1 import inference_pb2 as pb
from stagemesh.wire.errors import InvalidArgumentError

CONTEXT = 50
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


class Counting:
    """A backend that counts the characters it is given."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.num_characters = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def encode(self, text: str, **options: Any) -> Any:
        self.num_characters += len(text)
        return self._backend.encode(text, **options)


@pytest.fixture
def tokenizer() -> Tokenizer:
    """A token a word, whose length does not matter."""
    backend = Backend(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    made = Tokenizer(backend, special_tokens={}, chat_template=TEMPLATE)
    made.backend = Counting(backend)  # type: ignore[assignment]
    return made


def refusal(tokenizer: Tokenizer, **fields: Any) -> InvalidArgumentError:
    model = replace(IDS, vocab_size=2, max_context=CONTEXT, end_token_ids=frozenset(), tokenizer=tokenizer)
    with pytest.raises(InvalidArgumentError) as raised:
        check(pb.GenerateRequest(**fields), model)
    assert raised.value.reason == "PROMPT_TOO_LONG"
    return raised.value


def characters(tokenizer: Tokenizer) -> int:
    assert isinstance(tokenizer.backend, Counting)
    return tokenizer.backend.num_characters


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_of_a_text_of_a_million_characters_a_thousandth_is_looked_at(tokenizer: Tokenizer, kind: str) -> None:
    text = "a " * 500_000
    given = text if kind == "text" else pb.Chat(messages=[pb.ChatMessage(role="user", content=text)])
    error = refusal(tokenizer, **{kind: given})
    assert "tokens or more; the context is 50" in str(error)
    assert characters(tokenizer) < 1_000


def test_what_is_a_little_too_long_is_counted(tokenizer: Tokenizer) -> None:
    assert "is 60 tokens; the context is 50" in str(refusal(tokenizer, text="a " * 60))


def test_long_words_are_looked_at_until_it_is_sure(tokenizer: Tokenizer) -> None:
    """40 words fit, however long they are; of 4,000 the first 500 are looked at, more or less."""
    assert len(tokenizer.encode("b" * 500 + " ", enough=CONTEXT)) == 1
    assert len(tokenizer.encode(("b" * 500 + " ") * 40, enough=CONTEXT)) == 40
    before = characters(tokenizer)
    error = refusal(tokenizer, text=("b" * 500 + " ") * 4_000)
    assert "or more" in str(error)
    assert characters(tokenizer) - before < 500_000


def test_ids_are_counted_and_not_looked_at(tokenizer: Tokenizer) -> None:
    error = refusal(tokenizer, token_ids=pb.TokenIds(ids=[7] * 1_000))
    assert "is 1000 tokens; the context is 50" in str(error)
