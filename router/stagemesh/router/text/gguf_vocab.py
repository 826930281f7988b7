"""The vocabulary that GGUF metadata carries, as plain checked values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from stagemesh.wire.errors import ModelError

T = TypeVar("T")

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFVocab:
    """The `tokenizer.*` keys of one file."""

    source: str
    """The file, for messages."""
    model: str
    """`tokenizer.ggml.model`: gpt2, llama, ..."""
    pre: str | None
    """`tokenizer.ggml.pre`."""
    tokens: list[str]
    """By id."""
    types: list[int]
    """Of each token; all 1 (normal) if the file has none."""
    scores: list[float] | None
    """Of each token; SentencePiece only."""
    merges: list[tuple[str, str]] | None
    """First merge first."""
    named: dict[str, str]
    """{"bos_token": "<s>", ...}, those that the file has."""
    add_bos: bool | None
    """Whether a text begins with the bos token; None if the file does not say."""
    add_eos: bool
    """Whether a text ends with the eos token."""
    add_space_prefix: bool
    """SentencePiece: whether a text begins with a space of its own."""
    chat_template: str | None
    """Jinja source."""

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object], source: str) -> GGUFVocab:
        """Reads the keys.

        Raises:
            ModelError: A key has another type or length than it must, or an id is not in the vocabulary.
        """
        reader = _Reader(metadata, source)
        tokens: list[str] = reader.array("tokenizer.ggml.tokens", str) or []
        if not tokens:
            raise ModelError(f"{source}: tokenizer.ggml.tokens is missing or empty; the file is damaged")
        types = reader.array("tokenizer.ggml.token_type", int, length=len(tokens)) or [1] * len(tokens)
        scores = reader.array("tokenizer.ggml.scores", float, length=len(tokens))
        merges = reader.array("tokenizer.ggml.merges", str)
        named = {}
        for name, key in _NAMED.items():
            id_ = reader.scalar(f"tokenizer.ggml.{key}_token_id", int)
            if id_ is not None:
                if not 0 <= id_ < len(tokens):
                    raise ModelError(
                        f"{source}: tokenizer.ggml.{key}_token_id is {id_}, but there are {len(tokens)} "
                        "tokens; the file is damaged"
                    )
                named[name] = tokens[id_]
        return cls(
            source=source,
            model=reader.scalar("tokenizer.ggml.model", str) or "",
            pre=reader.scalar("tokenizer.ggml.pre", str),
            tokens=tokens,
            types=types,
            scores=scores,
            merges=None if merges is None else [reader.pair(merge) for merge in merges],
            named=named,
            add_bos=reader.scalar("tokenizer.ggml.add_bos_token", bool),
            add_eos=reader.scalar("tokenizer.ggml.add_eos_token", bool) or False,
            add_space_prefix=reader.scalar("tokenizer.ggml.add_space_prefix", bool) is not False,
            chat_template=reader.scalar("tokenizer.chat_template", str),
        )

    @property
    def special(self) -> list[str]:
        """Tokens that stand for no text: unknown, control and the named ones, in the order of their ids."""
        named = set(self.named.values())
        columns = zip(self.tokens, self.types, strict=True)
        return [t for t, type_ in columns if type_ in (_UNKNOWN, _CONTROL) or t in named]

    @property
    def user_defined(self) -> list[str]:
        """Tokens that are text, but are taken whole wherever they occur."""
        return [t for t, type_ in zip(self.tokens, self.types, strict=True) if type_ == _USER_DEFINED]

    @property
    def mergeable_scores(self) -> dict[str, float] | None:
        """Scores of the tokens that merging may make."""
        if self.scores is None:
            return None
        columns = zip(self.tokens, self.scores, self.types, strict=True)
        return {t: score for t, score, type_ in columns if type_ not in (_UNKNOWN, _CONTROL, _BYTE)}


class _Reader:
    """Metadata values by key, checked."""

    def __init__(self, metadata: Mapping[str, object], source: str) -> None:
        self._metadata = metadata
        self._source = source

    def scalar(self, key: str, kind: type[T]) -> T | None:
        value = self._metadata.get(key)
        if value is None or type(value) is kind:
            return value
        raise ModelError(f"{self._source}: {key} is {value!r}, expected {kind.__name__}; the file is damaged")

    def array(self, key: str, kind: type[T], *, length: int | None = None) -> list[T] | None:
        value = self._metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or set(map(type, value)) - {kind}:
            raise ModelError(f"{self._source}: {key} is not a list of {kind.__name__}; the file is damaged")
        if length is not None and len(value) != length:
            raise ModelError(
                f"{self._source}: {key} has {len(value)} entries for {length} tokens; the file is damaged"
            )
        return value

    def pair(self, merge: str) -> tuple[str, str]:
        left, separator, right = merge.partition(" ")
        if not (left and separator and right):
            raise ModelError(
                f"{self._source}: tokenizer.ggml.merges has {merge!r}, expected two tokens and a space; "
                "the file is damaged"
            )
        return left, right
