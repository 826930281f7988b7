"""Tokenizers from GGUF metadata: what is built, and what is refused how."""

from __future__ import annotations

import pytest

from stagemesh.router.text import Tokenizer, tokenizer_from_gguf
from stagemesh.router.text.pre_tokenizers import PRE_TOKENIZATIONS
from stagemesh.router.text.spm_merges import merges_from_scores
from stagemesh.wire.errors import ModelError

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(**changes: object) -> dict[str, object]:
    tokens = ["<s>", "</s>", "a", "b", "c", "Ġ", "1", "ab", "Ġab", "abc", "ĠĠ", "<think>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, *[1] * 9, 4],
        "tokenizer.ggml.merges": ["a b", "Ġ ab", "Ġ Ġ"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        **{f"tokenizer.{key.replace('__', '.')}": value for key, value in changes.items()},
    }


def sentencepiece(**changes: object) -> dict[str, object]:
    learned = ["▁", "a", "b", "ab", "▁ab", "▁a", "<unknown piece>"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *BYTES, *learned],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 7],
        "tokenizer.ggml.scores": [0.0] * 259 + [-9.0, -9.0, -9.0, -1.0, -2.0, -3.0, -4.0],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **{f"tokenizer.{key.replace('__', '.')}": value for key, value in changes.items()},
    }


def build(metadata: dict[str, object]) -> Tokenizer:
    tokenizer = tokenizer_from_gguf(metadata, source="m.gguf")
    assert tokenizer is not None
    return tokenizer


def tokens_of(tokenizer: Tokenizer, text: str) -> list[str | None]:
    return [tokenizer.backend.id_to_token(id_) for id_ in tokenizer.encode(text)]


def test_no_tokenizer() -> None:
    assert tokenizer_from_gguf({"general.architecture": "llama"}, source="m.gguf") is None
    assert tokenizer_from_gguf({"tokenizer.ggml.model": "none"}, source="m.gguf") is None


def test_byte_level() -> None:
    tokenizer = build(byte_level(chat_template="{{ bos_token }}"))
    assert tokens_of(tokenizer, "ab ab") == ["ab", "Ġab"]
    assert tokens_of(tokenizer, "a<think>b</s>") == ["a", "<think>", "b", "</s>"]
    assert tokenizer.special_ids == {0, 1}
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.vocab_size == 12
    assert tokenizer.has_chat_template
    assert not build(byte_level()).has_chat_template
    assert tokenizer.decode([0, 8, 11, 1]) == " ab<think>"
    assert tokenizer.decode([0, 8, 1], skip_special=False) == "<s> ab</s>"


def test_pre_decides_the_split() -> None:
    # smollm takes digits off first: both spaces are then whitespace at an end; GPT-2 gives one to the digit.
    assert tokens_of(build(byte_level()), "a  1") == ["a", "ĠĠ", "1"]
    assert tokens_of(build(byte_level(ggml__pre="gpt-2")), "a  1") == ["a", "Ġ", "Ġ", "1"]
    # Llama 3 takes a word that is a token whole, though no merge makes it.
    assert tokens_of(build(byte_level(ggml__pre="llama-bpe")), "abc") == ["<s>", "abc"]
    assert tokens_of(build(byte_level(ggml__pre="gpt-2")), "abc") == ["ab", "c"]


def test_begin_and_end() -> None:
    both = build(byte_level(ggml__add_bos_token=True, ggml__add_eos_token=True))
    assert both.encode("a") == [0, 2, 1]
    assert both.encode("a", add_special=False) == [2]
    assert both.encode("") == [0, 1]
    assert build(byte_level()).encode("a") == [2]
    # Files of these families may leave the key out, and mean yes.
    assert build(byte_level(ggml__pre="llama-bpe")).encode("a") == [0, 2]
    assert build(byte_level(ggml__pre="llama-bpe", ggml__add_bos_token=False)).encode("a") == [2]
    assert build(sentencepiece()).encode("a")[0] == 1
    without = byte_level(ggml__add_bos_token=True)
    del without["tokenizer.ggml.bos_token_id"]
    assert build(without).encode("a") == [2]


def test_sentencepiece() -> None:
    tokenizer = build(sentencepiece())
    assert tokens_of(tokenizer, "ab") == ["<s>", "▁ab"]
    assert tokens_of(tokenizer, " ab") == ["<s>", "▁", "▁ab"]
    assert tokens_of(tokenizer, "é") == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("ab é ")) == "ab é "
    assert tokenizer.special_ids == {0, 1, 2}
    bare = build(sentencepiece(ggml__add_space_prefix=False))
    assert tokens_of(bare, "ab") == ["<s>", "ab"]
    assert bare.decode(bare.encode(" ab")) == " ab"


def test_merges_from_scores() -> None:
    vocab = {"a", "b", "c", "ab", "bc", "abc"}
    scores = {"a": -9.0, "b": -9.0, "c": -9.0, "abc": -2.0, "ab": -1.0, "bc": -2.0}
    assert merges_from_scores(vocab, scores) == [("a", "b"), ("ab", "c"), ("a", "bc"), ("b", "c")]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (byte_level(ggml__pre="tekken"), "tokenizer.ggml.pre 'tekken' is not supported; supported are "),
        (byte_level(ggml__pre=None), "tokenizer.ggml.pre None is not supported; supported are "),
        (
            byte_level(ggml__model="bert"),
            "tokenizer.ggml.model 'bert' is not supported; supported are gpt2, llama",
        ),
        (byte_level(ggml__model=3), "tokenizer.ggml.model is 3, expected str"),
        (byte_level(ggml__tokens=None), "tokenizer.ggml.tokens is missing or empty"),
        (byte_level(ggml__tokens=[]), "tokenizer.ggml.tokens is missing or empty"),
        (byte_level(ggml__tokens=["a", 1]), "tokenizer.ggml.tokens is not a list of str"),
        (byte_level(ggml__token_type=[1, 1]), "tokenizer.ggml.token_type has 2 entries for 12 tokens"),
        (byte_level(ggml__merges=None), "tokenizer.ggml.merges is missing"),
        (byte_level(ggml__merges=["ab"]), "tokenizer.ggml.merges has 'ab'"),
        (byte_level(ggml__merges=["x y"]), "the tokenizer is damaged"),
        (byte_level(ggml__bos_token_id=12), "bos_token_id is 12, but there are 12 tokens"),
        (byte_level(ggml__eos_token_id=-1), "eos_token_id is -1, but there are 12 tokens"),
        (byte_level(chat_template=["x"]), "tokenizer.chat_template is \\['x'\\], expected str"),
        (sentencepiece(ggml__scores=None), "tokenizer.ggml.scores is missing"),
        (sentencepiece(ggml__scores=[0.0]), "tokenizer.ggml.scores has 1 entries for 266 tokens"),
    ],
)
def test_refused(metadata: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        tokenizer_from_gguf(metadata, source="m.gguf")
    assert str(caught.value).startswith("m.gguf: ")


def test_the_refusal_lists_what_is_supported() -> None:
    with pytest.raises(ModelError) as caught:
        tokenizer_from_gguf(byte_level(ggml__pre="falcon"), source="m.gguf")
    assert all(name in str(caught.value) for name in PRE_TOKENIZATIONS)


@pytest.mark.parametrize("pre", PRE_TOKENIZATIONS)
def test_every_supported_pre_works(pre: str) -> None:
    assert "abab" in build(byte_level(ggml__pre=pre)).decode(build(byte_level(ggml__pre=pre)).encode("abab"))
