"""ModelConfig from a Hugging Face folder: config.json and generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path

from stagemesh.model.config import (
    SUPPORTED_ARCHITECTURES,
    GenerationDefaults,
    ModelConfig,
    unsupported_architecture,
)
from stagemesh.model.fields import Fields
from stagemesh.model.rope import LinearRopeScaling, Llama3RopeScaling, RopeConfig, RopeScaling
from stagemesh.wire.errors import ModelError

_CLASSES = ("LlamaForCausalLM",)
_SCALINGS = ("default", "linear", "llama3")


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file; ModelError where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path} is damaged: not JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def read_hf_config(folder: Path) -> ModelConfig:
    """Reads what a folder says of its model.

    Raises:
        ModelError: config.json is missing or damaged, or asks for something that is not built, by name.
    """
    config = Fields(str(folder / "config.json"), read_json(folder / "config.json"))
    _check_supported(config)
    generation_path = folder / "generation_config.json"
    generation = Fields(str(generation_path), read_json(generation_path) if generation_path.exists() else {})
    hidden_size, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    vocab_size = config.integer("vocab_size")
    if num_heads <= 0:
        raise ModelError(f"{config.origin}: num_attention_heads is {num_heads}, expected a positive number")
    max_context = config.integer("max_position_embeddings", 2048)
    bos = sorted(config.token_ids("bos_token_id"))
    ends = config.token_ids("eos_token_id") | generation.token_ids("eos_token_id")
    return ModelConfig(
        architecture=config.text("model_type"),
        hidden_size=hidden_size,
        num_layers=config.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", num_heads),
        head_dim=config.integer("head_dim", hidden_size // num_heads),
        intermediate_size=config.integer("intermediate_size"),
        vocab_size=vocab_size,
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=_read_rope(config, max_context),
        tie_embeddings=config.flag("tie_word_embeddings", False),
        max_context=max_context,
        bos_token_id=bos[0] if bos else None,
        end_token_ids=tuple(sorted(token for token in ends if token < vocab_size)),
        generation=_read_generation(generation),
        stored_dtype=config.text("dtype", config.text("torch_dtype", "")) or None,
    )


def _check_supported(config: Fields) -> None:
    model_type = config.text("model_type")
    if model_type not in SUPPORTED_ARCHITECTURES:
        raise unsupported_architecture(model_type)
    classes = config.raw("architectures")
    if isinstance(classes, list) and classes and not set(classes) & set(_CLASSES):
        raise unsupported_architecture(str(classes[0]))
    scheme = config.section("quantization_config")
    if scheme is not None:
        raise ModelError(
            f"{config.origin}: quantization {scheme.text('quant_method', 'unnamed')!r} is not supported; "
            "use an unquantized safetensors folder or a GGUF file"
        )
    for key in ("attention_bias", "mlp_bias"):
        if config.flag(key, False):
            raise ModelError(f"{config.origin}: {key} is true; models with biases are not supported")
    activation = config.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(f"{config.origin}: hidden_act {activation!r} is not supported; supported: silu")


def _read_rope(config: Fields, max_context: int) -> RopeConfig:
    # transformers 5 writes rope_parameters with the theta in it; 4 wrote rope_theta and rope_scaling.
    section = config.section("rope_parameters") or config.section("rope_scaling")
    theta = config.number("rope_theta", 10000.0)
    for fields in (config, section):
        if fields is not None and fields.number("partial_rotary_factor", 1.0) != 1.0:
            raise ModelError(f"{fields.origin}: partial_rotary_factor other than 1 is not supported")
    if section is None:
        return RopeConfig(theta=theta)
    return RopeConfig(theta=section.number("rope_theta", theta), scaling=_read_scaling(section, max_context))


def _read_scaling(section: Fields, max_context: int) -> RopeScaling | None:
    kind = section.text("rope_type", section.text("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return LinearRopeScaling(factor=section.number("factor"))
    if kind == "llama3":
        return Llama3RopeScaling(
            factor=section.number("factor"),
            low_freq_factor=section.number("low_freq_factor"),
            high_freq_factor=section.number("high_freq_factor"),
            original_max_position=section.integer("original_max_position_embeddings", max_context),
        )
    raise ModelError(
        f"{section.origin}: rope scaling {kind!r} is not supported; supported: {', '.join(_SCALINGS)}"
    )


def _read_generation(generation: Fields) -> GenerationDefaults:
    if not generation.flag("do_sample", True):
        return GenerationDefaults()
    return GenerationDefaults(
        temperature=generation.number("temperature") if "temperature" in generation else None,
        top_k=generation.integer("top_k") if "top_k" in generation else None,
        top_p=generation.number("top_p") if "top_p" in generation else None,
    )
