"""Chat templates that fail, and what a template may not do."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel

from stagemesh.router.text import Tokenizer
from stagemesh.wire.errors import FailedPreconditionError, InvalidArgumentError, StagemeshError


@dataclass(frozen=True)
class Message:
    role: str
    content: str


CHAT = [Message("user", "hi")]


def tokenizer(template: str | None) -> Tokenizer:
    backend = Backend(WordLevel({"<s>": 0, "hi": 1, "[UNK]": 2}, unk_token="[UNK]"))
    return Tokenizer(backend, special_tokens={"bos_token": "<s>"}, chat_template=template)


def refused(template: str | None, chat: list[Message]) -> StagemeshError:
    with pytest.raises(StagemeshError) as caught:
        tokenizer(template).encode_chat(chat)
    assert caught.value.field == "chat"
    return caught.value


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ messages[7].content }}", "refuses these messages: "),
        ("{{ messages[0].content + 1 }}", "refuses these messages: "),
        ("{{ 1 // 0 }}", "refuses these messages: "),
        ("{{ messages[0].missing.further }}", "refuses these messages: "),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages: "),
        ("{{ messages.append(1) }}", "refuses these messages: "),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "refuses these messages: "),
        ("{% include 'other' %}", "refuses these messages: "),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "refuses these messages: "),
    ],
)
def test_a_template_that_fails(template: str, message: str) -> None:
    error = refused(template, CHAT)
    assert isinstance(error, InvalidArgumentError)
    assert error.reason == "CHAT_TEMPLATE"
    assert message in error.message


@pytest.mark.parametrize(
    "template", ["{% if %}", "{% for m in messages %}", "{{ x | no_such_filter }}", "{% novel %}"]
)
def test_a_template_that_does_not_compile(template: str) -> None:
    assert tokenizer(template).encode("hi") == [1]
    for _ in range(2):
        error = refused(template, CHAT)
        assert isinstance(error, FailedPreconditionError)
        assert error.reason == "BROKEN_CHAT_TEMPLATE"


def test_no_template() -> None:
    assert refused(None, CHAT).reason == "NO_CHAT_TEMPLATE"
    assert isinstance(refused(None, []), FailedPreconditionError)


def test_no_messages() -> None:
    error = refused("{{ bos_token }}", [])
    assert isinstance(error, InvalidArgumentError)
    assert error.reason == "EMPTY_PROMPT"


def test_nothing_is_added_to_what_the_template_writes() -> None:
    assert tokenizer("hi").encode_chat(CHAT) == [1]
    assert tokenizer("{{ messages[0].role }}: {{ messages[0]['content'] }}").render_chat(CHAT) == "user: hi"


def test_a_template_cannot_change_the_next_request() -> None:
    template = "{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}"
    shared = tokenizer(template)
    assert shared.render_chat(CHAT) == shared.render_chat(CHAT) == "1"
