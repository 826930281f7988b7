"""The incremental detokenizer against whole-sequence decoding, on any ids in any portions."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE, WordLevel

from stagemesh.router.text import IncrementalDetokenizer, Tokenizer
from stagemesh.router.text.byte_fallback import ByteFallbackDecoding
from stagemesh.router.text.byte_level import ByteLevelDecoding, byte_alphabet
from stagemesh.router.text.window import WindowDecoding

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = [
    "▁",
    "▁▁",
    "a",
    "▁the",
    "é",
    "你",
    "▁你好",
    "\n",
    "�",
    "<0x4>",
    "0x41",
    "<0xZZ>",
    "▁<0x41>",
    ".",
    "'s",
]


def byte_level() -> Tokenizer:
    spelling = {byte: char for char, byte in byte_alphabet().items()}
    cut = ["你好"[:1].encode()[:2], "🙂".encode()[1:], "é".encode() + b"\xf0", b"\xff\xfe", b" the", b"\n\n"]
    tokens = [*spelling.values(), *("".join(spelling[byte] for byte in piece) for piece in cut)]
    backend = Backend(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    return with_added(backend)


def byte_fallback(*, strip: int) -> Tokenizer:
    tokens = [*BYTES, *PIECES]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Backend(BPE(vocab=vocab, merges=[], byte_fallback=True))
    chain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*chain, *([decoders.Strip(" ", strip, 0)] if strip else [])])
    return with_added(backend)


def other(decoder: decoders.Decoder | None) -> Tokenizer:
    tokens = ["▁", "▁a", "b", "▁▁c", "##d", ".", "n't", "é", "[UNK]", "�"]
    backend = Backend(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    if decoder is not None:
        backend.decoder = decoder
    return with_added(backend)


def with_added(backend: Backend) -> Tokenizer:
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.add_tokens([AddedToken("<think>", special=False), AddedToken("<｜x é｜>", special=False)])
    return Tokenizer(backend, special_tokens={})


TOKENIZERS = {
    "byte level": (byte_level(), ByteLevelDecoding),
    "byte fallback": (byte_fallback(strip=0), ByteFallbackDecoding),
    "byte fallback, one space less": (byte_fallback(strip=1), ByteFallbackDecoding),
    "byte fallback, two spaces less": (byte_fallback(strip=2), ByteFallbackDecoding),
    "metaspace": (other(decoders.Metaspace()), WindowDecoding),
    "wordpiece": (other(decoders.WordPiece()), WindowDecoding),
    "no decoder": (other(None), WindowDecoding),
}
BY_NAME = pytest.mark.parametrize("name", TOKENIZERS)

# Bytes that begin, continue and break characters, so that short sequences meet every case.
telling = st.sampled_from(
    [0x41, 0x20, 0x80, 0xBF, 0xC3, 0xA9, 0xE4, 0xBD, 0xA0, 0xED, 0xF0, 0x9F, 0x99, 0x82, 0xFF]
)
byte_text = st.text(max_size=4).map(lambda text: list(text.encode("utf-8", "ignore")))


def any_ids(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    # A little past the end: a model's embedding may be padded, and such ids are nothing.
    one = st.integers(0, tokenizer.vocab_size + 3).map(lambda id_: [id_])
    portions = [one, one]
    if tokenizer.vocab_size > 256:
        alphabet = list(byte_alphabet().values())
        place = {byte: i for i, byte in enumerate(alphabet)} if tokenizer is BYTE_LEVEL else None
        as_ids = (lambda data: [place[b] for b in data]) if place else list
        portions += [byte_text.map(as_ids), st.lists(telling, max_size=4).map(as_ids)]
    return st.lists(st.one_of(portions), max_size=12).map(lambda lists: [id_ for ids in lists for id_ in ids])


BYTE_LEVEL = TOKENIZERS["byte level"][0]


def id_of(tokenizer: Tokenizer, token: str) -> int:
    id_ = tokenizer.backend.token_to_id(token)
    assert id_ is not None
    return id_


@BY_NAME
def test_kind(name: str) -> None:
    tokenizer, kind = TOKENIZERS[name]
    assert type(tokenizer.decoding) is kind


@BY_NAME
@given(st.data())
def test_any_portions_give_the_whole_text(name: str, data: st.DataObject) -> None:
    tokenizer, _ = TOKENIZERS[name]
    ids = data.draw(any_ids(tokenizer))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    detokenizer = IncrementalDetokenizer(tokenizer)
    bounds = [0, *cuts, len(ids)]
    texts = [detokenizer.push(ids[a:b]) for a, b in pairwise(bounds)]
    assert "".join(texts) + detokenizer.finish() == tokenizer.decode(ids)


@given(any_ids(BYTE_LEVEL))
def test_byte_level_holds_back_one_character_at_most(ids: list[int]) -> None:
    detokenizer, text = IncrementalDetokenizer(BYTE_LEVEL), ""
    for end, id_ in enumerate(ids, start=1):
        text += detokenizer.push([id_])
        whole = BYTE_LEVEL.decode(ids[:end])
        assert whole.startswith(text)
        # Two only where the beginning of an encoded surrogate waits for its third byte.
        assert len(whole) - len(text) <= (2 if whole.endswith("��") else 1)


@pytest.mark.parametrize("strip", [0, 1, 2])
@given(data=st.data())
def test_byte_fallback_holds_back_only_the_run_of_bytes(strip: int, data: st.DataObject) -> None:
    tokenizer = byte_fallback(strip=strip)
    ids = data.draw(any_ids(tokenizer))
    detokenizer, text, end_of_text = IncrementalDetokenizer(tokenizer), "", 0
    for end, id_ in enumerate(ids, start=1):
        text += detokenizer.push([id_])
        token = tokenizer.backend.id_to_token(id_)
        if token is not None and id_ >= len(BYTES) and id_ not in tokenizer.special_ids:
            end_of_text = end
        assert text == tokenizer.decode(ids[:end_of_text])


def test_a_character_appears_when_its_last_byte_does() -> None:
    smile = [list(byte_alphabet().values()).index(byte) for byte in "🙂".encode()]
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL)
    assert [detokenizer.push([id_]) for id_ in smile] == ["", "", "", "🙂"]
    assert detokenizer.push(smile[:3]) == ""
    assert detokenizer.finish() == "�"


def test_special_tokens_do_not_break_a_character() -> None:
    tokenizer = byte_fallback(strip=1)
    end = id_of(tokenizer, "</s>")
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push([0xC3, end, 0xA9, end]) == ""
    assert detokenizer.push([id_of(tokenizer, "a")]) == "éa"
    assert detokenizer.push([]) == detokenizer.finish() == ""


def test_added_text_is_kept() -> None:
    for tokenizer in (BYTE_LEVEL, byte_fallback(strip=1)):
        ids = [id_of(tokenizer, token) for token in ("<think>", "<s>", "<｜x é｜>")]
        assert IncrementalDetokenizer(tokenizer).push(ids) == "<think><｜x é｜>"


def test_the_byte_alphabet_is_that_of_tokenizers() -> None:
    alphabet = byte_alphabet()
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ("".join(map(chr, range(128))), "éÿ", "你好🙂\u2028"):
        ((spelled, _),) = splitter.pre_tokenize_str(text)
        assert bytes(alphabet[char] for char in spelled) == text.encode()
