"""A model's tokenizer: text and chats to token ids, and token ids to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import tokenizers

from stagemesh.router.text.chat_template import ChatTemplate
from stagemesh.router.text.decoding import Decoding, decoding_of
from stagemesh.wire.errors import FailedPreconditionError, InvalidArgumentError

HEAD_CHARACTERS = 16
"""A text longer than so many for each id that is wanted is looked at from its beginning first: few tokens are longer."""


class ChatMessage(Protocol):
    """One message of a chat; stagemesh.v1's ChatMessage is one."""

    @property
    def role(self) -> str:
        """ "system", "user", "assistant" or what else the template knows."""

    @property
    def content(self) -> str:
        """What was said."""


class Tokenizer:
    """Wraps a `tokenizers.Tokenizer`. May be shared by threads; keeps no state of a request.

    Special tokens written in a text become their ids, as in transformers: a prompt may spell a template out.

    Args:
        backend: Does the work. Truncation and padding are switched off.
        special_tokens: What the chat template may name: {"bos_token": "<s>", ...}.
        chat_template: Jinja source, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        chat_template: str | None = None,
    ) -> None:
        # A tokenizer.json may carry the truncation of a training run: a served prompt is never cut silently.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        """Ids that decode to nothing, as <s> and <|im_end|>."""
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        """Distinct tokens, added ones included. The model's embedding may be padded beyond it."""
        self.decoding: Decoding = decoding_of(
            backend, special=[t.content for t in added.values() if t.special]
        )
        """How ids become text incrementally; shared by all requests."""
        self._template = ChatTemplate(chat_template, self.special_tokens) if chat_template else None

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` can work at all."""
        return self._template is not None

    def encode(self, text: str, *, add_special: bool = True, enough: int | None = None) -> list[int]:
        """The ids of a text.

        Args:
            text: Any text, also an empty one.
            add_special: Begin-of-text (and end-of-text) as the tokenizer's post-processor has it.
            enough: A text that surely has more ids is not encoded to its end, which could take minutes: it gives those
                of its beginning, more than twice as many. A beginning may be cut within a token.

        Raises:
            InvalidArgumentError: The text has surrogates, which no UTF-8 can carry.
        """
        length = len(text) if enough is None else HEAD_CHARACTERS * enough
        while enough is not None and length < len(text):
            if len(head := self.encode(text[:length], add_special=add_special)) > 2 * enough:
                return head
            length *= 4
        try:
            return self.backend.encode(text, add_special_tokens=add_special).ids
        except TypeError as error:
            # What tokenizers calls a string that is not UTF-8 inside.
            raise InvalidArgumentError(
                "text has a lone surrogate; send valid Unicode",
                reason="INVALID_TEXT",
                field="text",
            ) from error

    def encode_chat(self, messages: Sequence[ChatMessage], *, enough: int | None = None) -> list[int]:
        """The ids of a chat, up to where the assistant's answer begins.

        No begin-of-text is added: the template writes the one it wants. `enough` is as for `encode`.

        Raises:
            FailedPreconditionError: The model has no chat template, or a broken one.
            InvalidArgumentError: No messages, or the template refuses them.
        """
        return self.encode(self.render_chat(messages), add_special=False, enough=enough)

    def render_chat(self, messages: Sequence[ChatMessage]) -> str:
        """The text that `encode_chat` encodes; raises what it raises."""
        if self._template is None:
            raise FailedPreconditionError(
                "the model has no chat template; send text or token_ids instead of chat",
                reason="NO_CHAT_TEMPLATE",
                field="chat",
            )
        if not messages:
            raise InvalidArgumentError(
                "chat has no messages; send at least one", reason="EMPTY_PROMPT", field="chat"
            )
        return self._template.render([{"role": m.role, "content": m.content} for m in messages])

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of ids, all at once. Ids outside the vocabulary count as nothing."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)
