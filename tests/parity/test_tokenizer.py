"""Tokenizing, detokenizing and chat templates equal transformers' on three hundred hard strings."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tokenizers_for_tests as made
from hard_strings_for_tests import hard_strings
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer
from transformers.tokenization_utils_base import generate_merges

from stagemesh.router.text import IncrementalDetokenizer, Tokenizer, load_tokenizer
from stagemesh.router.text.spm_merges import merges_from_scores

STRINGS = hard_strings()


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class Pair:
    """The same tokenizer twice."""

    ours: Tokenizer
    reference: Any


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, list[list[int]]]:
    """transformers' reading of the demo file, put right, and the ids of STRINGS before that.

    transformers 5 does not know `tokenizer.ggml.pre` = smollm and splits as GPT-2 does; SmolLM2's own
    tokenizer.json has the pre-tokenizer set here.
    """
    path = made.demo_gguf()
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    as_read = [reference.encode(text) for text in STRINGS]
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    return reference, as_read


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, smollm2: tuple[Any, list[list[int]]]) -> dict[str, Pair]:
    folder = tmp_path_factory.mktemp("tokenizers")
    llama2, llama3 = made.llama2_tokenizer(), made.llama3_tokenizer()
    named2 = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    named3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    folder2 = made.write_folder(folder / "llama2", llama2, named2, made.LLAMA2_TEMPLATE)
    folder3 = made.write_folder(folder / "llama3", llama3, named3, made.LLAMA3_TEMPLATE)
    gguf2 = made.write_llama2_gguf(folder / "llama2.gguf")
    gguf3 = made.write_llama3_gguf(folder / "llama3.gguf", llama3)
    reference2 = AutoTokenizer.from_pretrained(folder2)
    reference3 = AutoTokenizer.from_pretrained(folder3)
    # A GGUF is compared with the folder it was made of: transformers builds other tokenizers from the GGUF
    # (`test_transformers_differs_on_gguf` pins where).
    loaded = {
        "smollm2-gguf": (made.demo_gguf(), smollm2[0]),
        "llama2-folder": (folder2, reference2),
        "llama2-gguf": (gguf2, reference2),
        "llama3-folder": (folder3, reference3),
        "llama3-gguf": (gguf3, reference3),
    }
    result = {}
    for name, (path, reference) in loaded.items():
        ours = load_tokenizer(path)
        assert ours is not None
        result[name] = Pair(ours, reference)
    return result


NAMES = ["smollm2-gguf", "llama2-folder", "llama2-gguf", "llama3-folder", "llama3-gguf"]


def test_there_are_three_hundred_strings() -> None:
    assert len(set(STRINGS)) == 300


@pytest.mark.parametrize("name", NAMES)
def test_encode(pairs: dict[str, Pair], name: str) -> None:
    pair = pairs[name]
    for text in STRINGS:
        assert pair.ours.encode(text) == pair.reference.encode(text), repr(text)
        bare = pair.reference.encode(text, add_special_tokens=False)
        assert pair.ours.encode(text, add_special=False) == bare, repr(text)
    begin = pair.ours.encode("x")[0] == pair.reference.bos_token_id
    assert begin == (name != "smollm2-gguf")


@pytest.mark.parametrize("name", NAMES)
def test_decode_of_encodings_in_portions(pairs: dict[str, Pair], name: str) -> None:
    pair = pairs[name]
    rng = random.Random(7)
    for text in STRINGS:
        ids = pair.reference.encode(text)
        whole = pair.reference.decode(ids, skip_special_tokens=True)
        assert pair.ours.decode(ids) == whole, repr(text)
        assert in_portions(pair.ours, ids, rng) == whole, repr(text)
        assert one_by_one(pair.ours, ids) == whole, repr(text)


@pytest.mark.parametrize("name", NAMES)
def test_decode_of_random_ids_in_portions(pairs: dict[str, Pair], name: str) -> None:
    """What a model may generate is no encoding of any text: wrong bytes, special tokens inside characters."""
    pair = pairs[name]
    rng = random.Random(11)
    vocab = range(pair.ours.vocab_size)
    # Most single bytes have low ids in each of the three vocabularies, and most wrong UTF-8 comes of them.
    low, special = range(300), sorted(pair.ours.special_ids)
    num_wrong = 0
    for _ in range(500):
        ids = [rng.choice(rng.choice([vocab, low, low, special])) for _ in range(rng.randint(1, 40))]
        whole = pair.reference.decode(ids, skip_special_tokens=True)
        num_wrong += "\ufffd" in whole
        assert in_portions(pair.ours, ids, rng) == whole, ids
    assert num_wrong > 250


@pytest.mark.parametrize("name", NAMES)
def test_decode_of_text_cut_inside_characters(pairs: dict[str, Pair], name: str) -> None:
    pair = pairs[name]
    rng = random.Random(13)
    ids = pair.reference.encode("a🙂b👩🏽‍🚀 ü𝔘 你好 \u0301x 🇩🇪", add_special_tokens=False)
    for end in range(len(ids) + 1):
        for begin in range(end + 1):
            part = ids[begin:end]
            whole = pair.reference.decode(part, skip_special_tokens=True)
            assert in_portions(pair.ours, part, rng) == whole, part


def in_portions(tokenizer: Tokenizer, ids: list[int], rng: random.Random) -> str:
    detokenizer = IncrementalDetokenizer(tokenizer)
    texts, begin = [], 0
    while begin < len(ids):
        end = begin + rng.randint(0, 4)
        texts.append(detokenizer.push(ids[begin:end]))
        begin = end
    return "".join(texts) + detokenizer.finish()


def one_by_one(tokenizer: Tokenizer, ids: list[int]) -> str:
    detokenizer = IncrementalDetokenizer(tokenizer)
    return "".join([detokenizer.push([id_]) for id_ in ids]) + detokenizer.finish()


CHATS = [
    [Message("user", "What is the capital of France?")],
    [Message("system", "You are terse."), Message("user", "Hi")],
    [Message("user", "Hi"), Message("assistant", "Hello!"), Message("user", "  spaces around  ")],
    [
        Message("system", "Zeile 1\r\nZeile 2 🙂"),
        Message("user", "<|im_end|>\n</s><|eot_id|>inside"),
        Message("assistant", ""),
        Message("user", "你好 1  2   3\n\n"),
    ],
]


@pytest.mark.parametrize("name", NAMES)
def test_chat(pairs: dict[str, Pair], name: str) -> None:
    pair = pairs[name]
    for chat in CHATS:
        messages = [{"role": m.role, "content": m.content} for m in chat]
        rendered = pair.reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert pair.ours.render_chat(chat) == rendered
        assert pair.ours.encode_chat(chat) == pair.reference.encode(rendered, add_special_tokens=False)


TEMPLATES = [
    "{%- for m in messages %}\n    {%- if m.role == 'system' %}{% continue %}{% endif %}\n{{ m | tojson }}\n"
    "{% if loop.index > 1 %}{% break %}{% endif %}\n{%- endfor %}",
    "  {% for m in messages %}\n  {% generation %}{{ m['content'] }}{% endgeneration %}\n  {% endfor %}\nend",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}<b>"
    "{{ m.content }}</b>{% endfor %}{{ bos_token }}{{ unk_token is defined }}{{ pad_token }}",
    "{{ messages | tojson(indent=2) }}{{ strftime_now('%d') | length }}{{ tools is none }}{{ documents }}",
    "{% if tools %}t{% endif %}{{ messages[0].content[:3] | upper }}{{ add_generation_prompt }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_template_features(pairs: dict[str, Pair], tmp_path: Path, template: str) -> None:
    reference = pairs["llama3-folder"].reference
    named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    ours = load_tokenizer(made.write_folder(tmp_path / "model", made.llama3_tokenizer(), named, template))
    assert ours is not None
    for chat in CHATS:
        messages = [{"role": m.role, "content": m.content} for m in chat]
        rendered = reference.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        assert ours.render_chat(chat) == rendered


def test_saved_again_by_transformers(pairs: dict[str, Pair], tmp_path: Path) -> None:
    """transformers writes the chat template to a file of its own, and special tokens in its own way."""
    for name in ("llama2-folder", "llama3-folder"):
        reference = pairs[name].reference
        reference.save_pretrained(tmp_path / name)
        assert (tmp_path / name / "chat_template.jinja").exists()
        ours = load_tokenizer(tmp_path / name)
        assert ours is not None
        assert ours.special_tokens.items() >= {"bos_token": reference.bos_token}.items()
        for text in STRINGS:
            assert ours.encode(text) == reference.encode(text)
        for chat in CHATS:
            assert ours.render_chat(chat) == pairs[name].ours.render_chat(chat)


def test_transformers_differs_on_gguf(
    pairs: dict[str, Pair], smollm2: tuple[Any, list[list[int]]], tmp_path: Path
) -> None:
    """Pins where transformers reads a GGUF tokenizer otherwise, so that we notice when it changes."""
    ours = pairs["smollm2-gguf"].ours
    different = [t for t, ids in zip(STRINGS, smollm2[1], strict=True) if ids != ours.encode(t)]
    assert different, "transformers knows smollm now: compare with it directly"
    for text in different:
        # Digits are split off first, so that whitespace before a digit is split as whitespace at an end.
        assert re.search(r"\s\d", text), repr(text)

    made.write_llama2_gguf(tmp_path / "llama2.gguf")
    llama2 = AutoTokenizer.from_pretrained(tmp_path, gguf_file="llama2.gguf")
    ours = pairs["llama2-gguf"].ours
    different = [text for text in STRINGS if llama2.encode(text) != ours.encode(text)]
    assert different, "transformers adds SentencePiece's space as its tokenizer.json does now"
    for text in different:
        # It adds no space where one is, nor after a special token.
        assert text == "" or text[0] in " ▁" or any(t in text for t in ("<s>", "</s>", "<unk>")), repr(text)


def test_merges_equal_those_of_transformers() -> None:
    """Equal scores too, which a real vocabulary hardly has."""
    rng = random.Random(17)
    for _ in range(200):
        tokens = list(dict.fromkeys("".join(rng.choices("abc", k=rng.randint(1, 5))) for _ in range(40)))
        scores = {token: -float(rng.randint(0, 5)) for token in tokens}
        vocab = {token: i for i, token in enumerate(tokens)}
        assert merges_from_scores(vocab, scores) == generate_merges(vocab, scores)


def test_the_strings_tell_splits_apart(pairs: dict[str, Pair]) -> None:
    """A tokenizer that splits as another family does fails `test_encode`."""
    ours = pairs["llama3-folder"].ours
    state = json.loads(ours.backend.to_str())
    state["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    other = type(ours.backend).from_str(json.dumps(state))
    different = [text for text in STRINGS if other.encode(text).ids != ours.encode(text)]
    assert len(different) > 30
