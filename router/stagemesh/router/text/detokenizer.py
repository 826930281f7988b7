"""Token ids to text while they arrive."""

from __future__ import annotations

from collections.abc import Sequence

from stagemesh.router.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """The text of one generated sequence, delivered as soon as it is final.

    Never returns half a character, nor a U+FFFD that a later id would have completed. Everything returned,
    joined, equals `tokenizer.decode` of all ids, which is transformers' `decode` with skip_special_tokens:
    special tokens are skipped; SentencePiece's leading space is dropped at the beginning of the sequence;
    spaces are not cleaned up (`clean_up_tokenization_spaces` is ignored, as transformers 5 does for BPE:
    cleaning would turn "it ' s" into "it's").

    Args:
        tokenizer: Shared by all sequences.
    """

    __slots__ = ("_stream",)

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._stream = tokenizer.decoding.stream()

    def push(self, ids: Sequence[int]) -> str:
        """Takes the next ids, in any portions, and returns the text that became final; often empty."""
        return self._stream.push(ids)

    def finish(self) -> str:
        """Returns what was held back, an incomplete character as U+FFFD. Nothing may be pushed afterwards."""
        return self._stream.finish()
