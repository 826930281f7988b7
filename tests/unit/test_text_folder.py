"""Tokenizers from Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from stagemesh.router.text import load_tokenizer
from stagemesh.wire.errors import InvalidArgumentError, ModelError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    vocab = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "<extra>": 4, "[UNK]": 5}
    backend = Backend(WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    # As a training run may leave them; a served prompt must be neither cut nor padded.
    backend.enable_truncation(max_length=3)
    backend.enable_padding(length=3)
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def configure(folder: Path, name: str = "tokenizer_config.json", **values: object) -> None:
    (folder / name).write_text(json.dumps(values))


def test_without_tokenizer(tmp_path: Path) -> None:
    configure(tmp_path, bos_token="<s>", chat_template="x")
    assert load_tokenizer(tmp_path) is None


def test_tokenizer_json_alone(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    assert tokenizer.encode("a b a b a") == [0, 2, 3, 2, 3, 2]
    assert tokenizer.encode("a") == [0, 2]
    assert tokenizer.encode("a", add_special=False) == [2]
    assert (tokenizer.vocab_size, set(tokenizer.special_ids), len(tokenizer.special_tokens)) == (6, {0}, 0)
    assert not tokenizer.has_chat_template


def test_special_tokens_of_the_configuration(folder: Path) -> None:
    configure(
        folder,
        bos_token={"content": "<s>", "lstrip": False},
        pad_token="<absent>",
        unk_token=None,
        additional_special_tokens=["<extra>", {"content": "b"}],
        add_bos_token=False,
    )
    configure(folder, "special_tokens_map.json", eos_token="</s>", bos_token="<old>")
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<absent>"}
    # <absent> gets no id: the model has no row for it.
    assert (set(tokenizer.special_ids), tokenizer.vocab_size) == ({0, 1, 3, 4}, 6)
    # The post-processor has the word, as in transformers.
    assert tokenizer.encode("a") == [0, 2]
    assert tokenizer.decode([0, 2, 4, 2, 1]) == "a a"


@pytest.mark.parametrize(
    ("template", "file", "expected"),
    [
        ("in config", None, "in config"),
        ("in config", "in file", "in file"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], None, "d"),
        ([{"name": "tool_use", "template": "t"}], None, None),
        (None, None, None),
        ("", None, None),
    ],
)
def test_where_the_chat_template_is(
    folder: Path, template: object, file: str | None, expected: str | None
) -> None:
    configure(folder, chat_template=template)
    if file is not None:
        (folder / "chat_template.jinja").write_text(file)
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    assert tokenizer.has_chat_template == (expected is not None)
    if expected is not None:

        class Hello:
            role = "user"
            content = "hello"

        assert tokenizer.render_chat([Hello()]) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", "tokenizer.json is damaged"),
        ("tokenizer.json", b"", "tokenizer.json is damaged"),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "Novel"}}', "tokenizer.json is damaged"),
        ("tokenizer_config.json", b'{"bos_token": ', "tokenizer_config.json is damaged"),
        ("tokenizer_config.json", b"\xff\xfe\x00", "tokenizer_config.json is damaged"),
        (
            "tokenizer_config.json",
            b"[1]",
            "tokenizer_config.json is damaged: expected a JSON object, found list",
        ),
        ("chat_template.jinja", b"\xff", "cannot read .*chat_template.jinja"),
    ],
)
def test_damaged(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_a_lone_surrogate_is_refused(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    with pytest.raises(InvalidArgumentError) as caught:
        tokenizer.encode("a \ud800")
    assert (caught.value.reason, caught.value.field) == ("INVALID_TEXT", "text")
