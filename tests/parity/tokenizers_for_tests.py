"""Tokenizers trained on a small corpus, as Hugging Face folders and as GGUF files without tensors.

They are made with `tokenizers`, `gguf` and transformers alone, so that nothing of stagemesh's own reading of
these formats goes into them.
"""

from __future__ import annotations

import inspect
import json
import os
import textwrap
from pathlib import Path

import gguf
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers.models import BPE
from transformers.tokenization_utils_base import generate_merges

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_TEMPLATE = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role']"
    " + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def demo_gguf() -> Path:
    """The demo model: $STAGEMESH_DEMO_MODEL, else wherever `make` put it."""
    named = os.environ.get("STAGEMESH_DEMO_MODEL")
    places = [Path(named)] if named else []
    places += sorted((REPOSITORY / ".cache").rglob(DEMO_FILE)) if (REPOSITORY / ".cache").is_dir() else []
    for place in places:
        if place.is_file():
            return place
    pytest.fail(f"{DEMO_FILE} is nowhere: run `make model`, or set STAGEMESH_DEMO_MODEL to its path")


def corpus() -> list[str]:
    """Some code and some prose in several scripts; no emoji, which are to stay outside the vocabulary."""
    prose = [
        "The quick brown fox jumps over the lazy dog, and then it's gone. We've seen 1234 of them in 2024.",
        "Привет, мир! Сегодня хорошая погода, и мы идём гулять по городу.",
        "你好，世界！今天天气很好，我们去公园散步。日本語のテキストもあります。",
        "Übermäßig schöne Größen, naïve café, señor, garçon, smørrebrød.",
        "שלום עולם, مرحبا بالعالم, नमस्ते दुनिया.",
        '<html><body>https://example.org/path?q=1&r=2</body></html>\r\n\t{"key": [1, 22, 333]}',
    ]
    code = inspect.getsource(textwrap).splitlines(keepends=True)
    # What the families split apart differently: digits, letters after punctuation, newlines after either.
    apart = [f"{n} ({n % 7}).x\n\n=={n}=\n   {n}'LL\n" for n in range(100, 400)]
    return [*code, *prose * 20, *apart]


def llama3_tokenizer() -> Tokenizer:
    """As the tokenizer.json of Llama 3: special tokens last, begin-of-text from the post-processor."""
    tokenizer = Tokenizer(BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    special = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"]
    tokenizer.add_special_tokens([AddedToken(f"<|{t}|>", special=True, normalized=False) for t in special])
    # Not special: it is text of its own, and has characters inside and outside the byte alphabet.
    tokenizer.add_tokens([AddedToken("<tool é>", special=False, normalized=False)])
    begin = "<|begin_of_text|>"
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
            ),
        ]
    )
    return tokenizer


def llama2_pieces() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types of a SentencePiece-style vocabulary: specials, bytes, then learned pieces."""
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False)
    trained.train_from_iterator(corpus(), trainer)
    model = json.loads(trained.to_str())["model"]
    merged = ["".join(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    # Runs of spaces, which Llama 2 has and which training on split words cannot find.
    merged += ["▁▁", "▁▁▁▁"]
    letters = [token for token in model["vocab"] if token not in set(merged)]
    learned = [*dict.fromkeys(merged), *letters]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    scores = [0.0] * 259 + [-float(i) for i in range(len(learned))]
    types = [2, 3, 3, *[6] * 256, *[1] * len(learned)]
    return tokens, scores, types


def llama2_tokenizer() -> Tokenizer:
    """As the tokenizer.json of Llama 2 and TinyLlama."""
    tokens, scores, _ = llama2_pieces()
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = generate_merges(vocab, dict(zip(tokens, scores, strict=True)))
    tokenizer = Tokenizer(
        BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def write_folder(folder: Path, tokenizer: Tokenizer, named: dict[str, str], template: str) -> Path:
    """A Hugging Face folder with a tokenizer in it, and nothing else."""
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True, **named}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    return folder


def write_gguf(
    path: Path,
    *,
    model: str,
    pre: str,
    tokens: list[str],
    types: list[int],
    template: str,
    bos_id: int,
    eos_id: int,
    scores: list[float] | None = None,
    merges: list[str] | None = None,
) -> Path:
    """A GGUF file with a tokenizer and the hyperparameters transformers asks for, but no tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if scores is not None:
        writer.add_token_scores(scores)
    if merges is not None:
        writer.add_token_merges(merges)
    writer.add_bos_token_id(bos_id)
    writer.add_eos_token_id(eos_id)
    writer.add_add_bos_token(True)
    writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_llama3_gguf(path: Path, tokenizer: Tokenizer) -> Path:
    """The GGUF that llama.cpp's converter would make of `llama3_tokenizer`."""
    by_id = {i: token for token, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    tokens = [by_id[i] for i in range(len(by_id))]
    added = tokenizer.get_added_tokens_decoder()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return write_gguf(
        path,
        model="gpt2",
        pre="llama-bpe",
        tokens=tokens,
        types=[(3 if added[i].special else 4) if i in added else 1 for i in range(len(by_id))],
        template=LLAMA3_TEMPLATE,
        bos_id=tokens.index("<|begin_of_text|>"),
        eos_id=tokens.index("<|eot_id|>"),
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
    )


def write_llama2_gguf(path: Path) -> Path:
    """The GGUF that llama.cpp's converter would make of `llama2_tokenizer`."""
    tokens, scores, types = llama2_pieces()
    return write_gguf(
        path,
        model="llama",
        pre="default",
        tokens=tokens,
        types=types,
        scores=scores,
        template=LLAMA2_TEMPLATE,
        bos_id=1,
        eos_id=2,
    )
