"""A tokenizer from the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping

import tokenizers
from tokenizers import AddedToken, decoders, normalizers, processors
from tokenizers.models import BPE

from stagemesh.router.text.gguf_vocab import GGUFVocab
from stagemesh.router.text.pre_tokenizers import PRE_TOKENIZATIONS
from stagemesh.router.text.spm_merges import merges_from_scores
from stagemesh.router.text.tokenizer import Tokenizer
from stagemesh.wire.errors import ModelError

_SPACE = "▁"


def tokenizer_from_gguf(metadata: Mapping[str, object], *, source: str) -> Tokenizer | None:
    """Builds the tokenizer that GGUF metadata describes.

    Args:
        metadata: Plain values by key.
        source: The file, for messages.

    Returns:
        None if the file has no tokenizer.

    Raises:
        ModelError: The tokenizer is of a kind that is not supported, or damaged.
    """
    if metadata.get("tokenizer.ggml.model") in (None, "none", "no_vocab"):
        return None
    vocab = GGUFVocab.from_metadata(metadata, source)
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if vocab.model not in builders:
        raise ModelError(
            f"{source}: tokenizer.ggml.model {vocab.model!r} is not supported; "
            f"supported are {', '.join(sorted(builders))}"
        )
    try:
        backend, add_bos = builders[vocab.model](vocab)
    except ModelError:
        raise
    except Exception as error:
        # tokenizers raises bare Exception for a merge whose token is not in the vocabulary.
        raise ModelError(f"{source}: the tokenizer is damaged: {error}") from error
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in vocab.special])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in vocab.user_defined])
    _add_begin_and_end(backend, vocab, add_bos if vocab.add_bos is None else vocab.add_bos)
    return Tokenizer(backend, special_tokens=vocab.named, chat_template=vocab.chat_template)


def _byte_level(vocab: GGUFVocab) -> tuple[tokenizers.Tokenizer, bool]:
    known = PRE_TOKENIZATIONS.get(vocab.pre or "")
    if known is None:
        raise ModelError(
            f"{vocab.source}: tokenizer.ggml.pre {vocab.pre!r} is not supported; "
            f"supported are {', '.join(sorted(PRE_TOKENIZATIONS))}"
        )
    if vocab.merges is None:
        raise ModelError(f"{vocab.source}: tokenizer.ggml.merges is missing; the file is damaged")
    backend = tokenizers.Tokenizer(
        BPE(vocab=_ids(vocab), merges=vocab.merges, ignore_merges=known.ignore_merges)
    )
    if known.normalize is not None:
        backend.normalizer = known.normalize()
    backend.pre_tokenizer = known.split()
    backend.decoder = decoders.ByteLevel()
    return backend, known.add_bos


def _sentencepiece(vocab: GGUFVocab) -> tuple[tokenizers.Tokenizer, bool]:
    """As the tokenizer.json of Llama 2 has it, and as llama.cpp tokenizes.

    A space goes before every stretch of text between special tokens, whatever it begins with. transformers 5
    builds another from the same file: it adds one at the beginning of the whole text only, and none if a
    space is there already.
    """
    ids = _ids(vocab)
    merges, scores = vocab.merges, vocab.mergeable_scores
    if merges is None:
        if scores is None:
            raise ModelError(f"{vocab.source}: tokenizer.ggml.scores is missing; the file is damaged")
        merges = merges_from_scores(ids, scores)
    backend = tokenizers.Tokenizer(
        BPE(
            vocab=ids,
            merges=merges,
            unk_token=vocab.named.get("unk_token", "<unk>" if "<unk>" in ids else None),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    to_mark = normalizers.Replace(" ", _SPACE)
    to_text = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocab.add_space_prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), to_mark])
        to_text.append(decoders.Strip(content=" ", left=1))
    else:
        backend.normalizer = to_mark
    backend.decoder = decoders.Sequence(to_text)
    return backend, True


def _ids(vocab: GGUFVocab) -> dict[str, int]:
    return {token: id_ for id_, token in enumerate(vocab.tokens)}


def _add_begin_and_end(backend: tokenizers.Tokenizer, vocab: GGUFVocab, add_bos: bool) -> None:
    begin = vocab.named.get("bos_token") if add_bos else None
    end = vocab.named.get("eos_token") if vocab.add_eos else None
    if begin is None and end is None:
        return
    backend.post_processor = processors.TemplateProcessing(
        single=[*([begin] if begin else []), "$A", *([end] if end else [])],
        special_tokens=[(t, backend.token_to_id(t)) for t in dict.fromkeys((begin, end)) if t],
    )
