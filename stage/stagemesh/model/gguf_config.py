"""ModelConfig from the metadata of a GGUF file."""

from __future__ import annotations

from stagemesh.model.config import (
    SUPPORTED_ARCHITECTURES,
    GenerationDefaults,
    ModelConfig,
    unsupported_architecture,
)
from stagemesh.model.fields import Fields
from stagemesh.model.gguf_file import GGUFFile
from stagemesh.model.rope import FactorRopeScaling, LinearRopeScaling, RopeConfig, RopeScaling
from stagemesh.wire.errors import ModelError

_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def read_gguf_config(file: GGUFFile) -> ModelConfig:
    """Reads what a GGUF file says of its model.

    Raises:
        ModelError: A key is missing, or the file asks for something that is not built, by name.
    """
    values = Fields(str(file.path), file.metadata)
    architecture = values.text("general.architecture")
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise unsupported_architecture(architecture)
    _check_supported(values, file)
    hidden_size = values.integer("llama.embedding_length")
    num_heads = values.integer("llama.attention.head_count")
    if num_heads <= 0:
        raise ModelError(
            f"{file.path}: llama.attention.head_count is {num_heads}, expected a positive number"
        )
    head_dim = values.integer("llama.attention.key_length", hidden_size // num_heads)
    rotated = values.integer("llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ModelError(
            f"{file.path}: llama.rope.dimension_count is {rotated}, expected the head size {head_dim}; "
            "partly rotated heads are not supported"
        )
    embedding = file.tensors.get("token_embd.weight")
    vocab_size = embedding.shape[0] if embedding is not None else values.integer("llama.vocab_size")
    bos = sorted(values.token_ids("tokenizer.ggml.bos_token_id"))
    ends = set[int]().union(*(values.token_ids(f"tokenizer.ggml.{key}") for key in _END_KEYS))
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        num_layers=values.integer("llama.block_count"),
        num_heads=num_heads,
        num_kv_heads=values.integer("llama.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        intermediate_size=values.integer("llama.feed_forward_length"),
        vocab_size=vocab_size,
        rms_norm_eps=values.number("llama.attention.layer_norm_rms_epsilon"),
        rope=RopeConfig(theta=values.number("llama.rope.freq_base", 10000.0), scaling=_scaling(values, file)),
        tie_embeddings="output.weight" not in file.tensors,
        max_context=values.integer("llama.context_length"),
        bos_token_id=bos[0] if bos else None,
        end_token_ids=tuple(sorted(token for token in ends if token < vocab_size)),
        generation=_read_generation(values),
    )


def _check_supported(values: Fields, file: GGUFFile) -> None:
    if values.integer("split.count", 1) > 1:
        raise ModelError(
            f"{file.path} is one of {values.integer('split.count')} parts; "
            "join them first (llama-gguf-split --merge FIRST_PART WHOLE)"
        )
    if values.integer("llama.expert_count", 0) > 0:
        raise unsupported_architecture("llama with experts (MoE)")
    biased = next((name for name in file.tensors if name.endswith(".bias")), None)
    if biased is not None:
        raise ModelError(f"{file.path} has the tensor {biased}; models with biases are not supported")


def _scaling(values: Fields, file: GGUFFile) -> RopeScaling | None:
    kind = values.text("llama.rope.scaling.type", "none")
    factors = file.tensors.get("rope_freqs.weight")
    if kind == "linear":
        return LinearRopeScaling(factor=values.number("llama.rope.scaling.factor"))
    if kind != "none":
        raise ModelError(
            f"{file.path}: rope scaling {kind!r} is not supported; "
            "supported: none, linear, rope_freqs.weight (llama3)"
        )
    if factors is None:
        return None
    if factors.type_name != "F32":
        raise ModelError(f"{file.path}: tensor rope_freqs.weight is {factors.type_name}, expected F32")
    return FactorRopeScaling(factors=tuple(factors.data.ravel().tolist()))


def _read_generation(values: Fields) -> GenerationDefaults:
    prefix = "general.sampling."
    return GenerationDefaults(
        temperature=values.number(prefix + "temp") if prefix + "temp" in values else None,
        top_k=values.integer(prefix + "top_k") if prefix + "top_k" in values else None,
        top_p=values.number(prefix + "top_p") if prefix + "top_p" in values else None,
    )
