"""A tokenizer from a Hugging Face folder: tokenizer.json, tokenizer_config.json, chat_template.jinja."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import tokenizers
from tokenizers import AddedToken

from stagemesh.router.text.tokenizer import Tokenizer
from stagemesh.wire.errors import ModelError

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FURTHER = ("additional_special_tokens", "extra_special_tokens")


def tokenizer_from_folder(folder: Path) -> Tokenizer | None:
    """Reads the tokenizer of a model folder.

    tokenizer.json is taken at its word: what it does with spaces, and whether its post-processor adds
    begin-of-text. `add_bos_token` in tokenizer_config.json says nothing beside it, as in transformers.

    Returns:
        None without a tokenizer.json: the model then serves token ids only.

    Raises:
        ModelError: A file is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        # tokenizers raises bare Exception for whatever is wrong with the file.
        raise ModelError(f"{path} is damaged, or newer than the installed tokenizers: {error}") from error
    config = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    named = {name: content for name in _NAMED if (content := _content(config.get(name)))}
    _mark_special(backend, [*named.values(), *_further(config)])
    return Tokenizer(backend, special_tokens=named, chat_template=_chat_template(folder, config))


def _mark_special(backend: tokenizers.Tokenizer, tokens: list[str]) -> None:
    """Makes tokens special that only the configuration says are; one without an id is left out."""
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    new = [t for t in dict.fromkeys(tokens) if t not in special and backend.token_to_id(t) is not None]
    if new:
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in new])


def _chat_template(folder: Path, config: Mapping[str, object]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"cannot read {path}: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        # Several by name, as for tool use; `default` is the plain one.
        templates = {
            entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)
        }
        template = templates.get("default")
    return template if isinstance(template, str) else None


def _further(config: Mapping[str, object]) -> Iterator[str]:
    for key in _FURTHER:
        entries = config.get(key)
        if isinstance(entries, dict):
            entries = list(entries.values())
        for entry in entries if isinstance(entries, list) else []:
            if content := _content(entry):
                yield content


def _content(token: object) -> str | None:
    """A token as a string, or as a serialized AddedToken."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _read_json(path: Path) -> dict[str, object]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is damaged: expected a JSON object, found {type(value).__name__}")
    return value
