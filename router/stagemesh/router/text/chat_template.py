"""A chat template: Jinja in a sandbox, with the helpers that templates written for transformers expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stagemesh.wire.errors import FailedPreconditionError, InvalidArgumentError


class ChatTemplate:
    """Renders messages into the text that a model was trained on.

    The template comes from the model file and the messages from a client, so that neither is trusted: it runs
    in Jinja's sandbox, on plain strings, lists and dicts. It is compiled at first use: a template that does
    not compile is no reason to refuse text.

    Args:
        source: The template.
        special_tokens: Names it may use: {"bos_token": "<s>", ...}.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of the messages, with the opening of the assistant's answer.

        Raises:
            FailedPreconditionError: The template does not compile.
            InvalidArgumentError: The template refuses the messages, or fails on them.
        """
        template = self._compiled
        try:
            return template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except Exception as error:
            # A template is a program: on messages it did not expect it may fail in any way Python can.
            raise InvalidArgumentError(
                f"the model's chat template refuses these messages: {error}",
                reason="CHAT_TEMPLATE",
                field="chat",
            ) from error

    @cached_property
    def _compiled(self) -> jinja2.Template:
        try:
            return _environment().from_string(self._source)
        except jinja2.TemplateSyntaxError as error:
            raise FailedPreconditionError(
                f"the model's chat template does not compile: {error.message} (line {error.lineno}); "
                "send text or token_ids instead of chat",
                reason="BROKEN_CHAT_TEMPLATE",
                field="chat",
            ) from error


class _GenerationTag(Extension):
    """Renders {% generation %} blocks as they are: the tag marks the assistant's turns for training only."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which models were not trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
