"""How byte-level GGUF vocabularies split a text before their merges apply, by `tokenizer.ggml.pre`.

Each entry is what the tokenizer.json of that model family has. A text split otherwise gives ids the model
never saw, and an answer that is worse without any error: so names that are not here are refused, not guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenization:
    """What a value of `tokenizer.ggml.pre` stands for."""

    split: Callable[[], PreTokenizer]
    """Makes the pre-tokenizer."""
    normalize: Callable[[], Normalizer] | None = None
    """Makes the normalizer, if the family has one."""
    ignore_merges: bool = False
    """A word that is a token is taken whole, whatever the merges would make of it."""
    add_bos: bool = False
    """Whether a file that does not say so begins a text with its begin-of-text token."""


def _gpt2() -> PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm() -> PreTokenizer:
    # Every digit by itself, and first: whitespace before a digit is then split as whitespace at an end.
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split_by(pattern: str) -> Callable[[], PreTokenizer]:
    def make() -> PreTokenizer:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    return make


_LLAMA3_FAMILY = PreTokenization(split=_split_by(_LLAMA3), ignore_merges=True, add_bos=True)
_QWEN2_FAMILY = PreTokenization(split=_split_by(_QWEN2), normalize=normalizers.NFC)

PRE_TOKENIZATIONS: dict[str, PreTokenization] = {
    "default": PreTokenization(split=_gpt2),
    "gpt-2": PreTokenization(split=_gpt2),
    "llama-bpe": _LLAMA3_FAMILY,
    "llama-v3": _LLAMA3_FAMILY,
    "llama3": _LLAMA3_FAMILY,
    "qwen2": _QWEN2_FAMILY,
    "smollm": PreTokenization(split=_smollm),
}
"""By the name in the file."""
