"""Text to token ids and back: tokenizers from model files, chat templates, incremental detokenization.

Needs `tokenizers` and `jinja2`; no torch and no transformers.
"""

from __future__ import annotations

from pathlib import Path

from stagemesh.router.text.detokenizer import IncrementalDetokenizer
from stagemesh.router.text.from_folder import tokenizer_from_folder
from stagemesh.router.text.from_gguf import tokenizer_from_gguf
from stagemesh.router.text.tokenizer import ChatMessage, Tokenizer

__all__ = [
    "ChatMessage",
    "IncrementalDetokenizer",
    "Tokenizer",
    "load_tokenizer",
    "tokenizer_from_folder",
    "tokenizer_from_gguf",
]


def load_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer of a model: a Hugging Face folder or a GGUF file.

    Returns:
        None if the model comes without one. It then serves token ids, and text is refused.

    Raises:
        ModelError: The tokenizer is damaged or of a kind that is not supported.
    """
    if path.is_dir():
        return tokenizer_from_folder(path)
    # Here, so that a folder can be served where the gguf package is not installed.
    from stagemesh.model.gguf_file import open_gguf

    return tokenizer_from_gguf(open_gguf(path).metadata, source=str(path))
