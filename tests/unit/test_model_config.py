"""What config.json, generation_config.json and GGUF metadata say of a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from stagemesh.model.config import GenerationDefaults, ModelConfig
from stagemesh.model.gguf_config import read_gguf_config
from stagemesh.model.gguf_file import open_gguf
from stagemesh.model.hf_config import read_hf_config
from stagemesh.model.rope import FactorRopeScaling, LinearRopeScaling, Llama3RopeScaling, RopeConfig
from stagemesh.wire.errors import ModelError

LLAMA_31_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
TINYLLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}


def read(tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return read_hf_config(tmp_path)


def test_reads_what_transformers_4_wrote(tmp_path: Path) -> None:
    assert read(tmp_path, TINYLLAMA) == ModelConfig(
        architecture="llama",
        hidden_size=2048,
        num_layers=22,
        num_heads=32,
        num_kv_heads=4,
        head_dim=64,
        intermediate_size=5632,
        vocab_size=32000,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=10000.0, scaling=None),
        tie_embeddings=False,
        max_context=2048,
        bos_token_id=1,
        end_token_ids=(2,),
        generation=GenerationDefaults(),
        stored_dtype="bfloat16",
    )


def test_reads_what_transformers_5_writes(tmp_path: Path) -> None:
    LlamaConfig(
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        vocab_size=101,
        rope_parameters={**LLAMA_31_SCALING, "rope_theta": 500000.0},
        architectures=["LlamaForCausalLM"],
        tie_word_embeddings=True,
    ).save_pretrained(tmp_path)
    config = read_hf_config(tmp_path)
    assert (config.head_dim, config.heads_per_kv_head, config.tie_embeddings) == (16, 2, True)
    assert config.rope.theta == 500000.0
    assert config.rope.scaling == Llama3RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
    )


def test_end_tokens_are_the_union_of_both_files(tmp_path: Path) -> None:
    config = read(tmp_path, TINYLLAMA, {"eos_token_id": [31999, 2, 7], "temperature": 0.6, "top_p": 0.9})
    assert config.end_token_ids == (2, 7, 31999)
    assert config.generation == GenerationDefaults(temperature=0.6, top_k=None, top_p=0.9)


def test_sampling_turned_off_gives_no_defaults(tmp_path: Path) -> None:
    config = read(tmp_path, TINYLLAMA, {"do_sample": False, "temperature": 0.6, "top_k": 5})
    assert config.generation == GenerationDefaults()


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ({"temperature": -3.0}, "temperature -3, expected 0 or more.*generation_config.json"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, "top_p 0, expected more than 0"),
        ({"top_p": 1.5}, "top_p 1.5"),
    ],
)
def test_defaults_that_no_request_could_ask_for_are_refused(
    tmp_path: Path, defaults: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        read(tmp_path, TINYLLAMA, defaults)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3_moe"}, "'qwen3_moe' is not supported; supported: llama"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope scaling 'yarn'.*default, linear, llama3"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "has no low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'gptq'"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide', expected a whole number"),
        ({"num_hidden_layers": 0}, "num_layers is 0"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 5}, "32 heads on 5 KV heads"),
        ({"head_dim": 63}, "head_dim is 63"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ],
)
def test_unsupported_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as refusal:
        read(tmp_path, {**TINYLLAMA, **change})
    assert "\n" not in str(refusal.value)


def test_damaged_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ModelError, match=r"config\.json is damaged"):
        read_hf_config(tmp_path)


def write_gguf(path: Path, *, freqs: np.ndarray[Any, Any] | None = None, **values: Any) -> ModelConfig:
    writer = gguf.GGUFWriter(str(path), values.pop("architecture", "llama"))
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_eos_token_id(2)
    for key, value in values.items():
        name = key.replace("__", ".")
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)
    writer.add_tensor("token_embd.weight", np.zeros((50, 64), np.float32))
    if freqs is not None:
        writer.add_tensor("rope_freqs.weight", freqs)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_gguf_config(open_gguf(path))


def test_reads_gguf(tmp_path: Path) -> None:
    freqs = np.linspace(1, 8, 8, dtype=np.float32)
    config = write_gguf(
        tmp_path / "m.gguf",
        freqs=freqs,
        tokenizer__ggml__eot_token_id=7,
        tokenizer__ggml__bos_token_id=1,
        general__sampling__temp=0.5,
    )
    assert config == ModelConfig(
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=96,
        vocab_size=50,
        rms_norm_eps=float(np.float32(1e-5)),
        rope=RopeConfig(theta=5000.0, scaling=FactorRopeScaling(factors=tuple(freqs.tolist()))),
        tie_embeddings=True,
        max_context=512,
        bos_token_id=1,
        end_token_ids=(2, 7),
        generation=GenerationDefaults(temperature=0.5),
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architecture": "gemma3"}, "'gemma3' is not supported; supported: llama"),
        ({"llama__rope__scaling__type": "yarn"}, "rope scaling 'yarn'"),
        ({"llama__expert_count": 8}, "MoE"),
        ({"split__count": 3}, "one of 3 parts"),
        ({"general__sampling__top_p": 0.0}, "top_p 0"),
        ({"llama__rope__dimension_count": 8}, "rope.dimension_count is 8, expected the head size 16"),
    ],
)
def test_unsupported_gguf_is_refused_by_name(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        write_gguf(tmp_path / "m.gguf", **values)


@pytest.mark.parametrize(
    ("parameters", "rope"),
    [
        ({"rope_type": "default", "rope_theta": 10000.0}, RopeConfig(theta=10000.0)),
        (
            {"rope_type": "linear", "rope_theta": 100000.0, "factor": 4.0},
            RopeConfig(theta=100000.0, scaling=LinearRopeScaling(factor=4.0)),
        ),
        (
            {**LLAMA_31_SCALING, "rope_theta": 500000.0},
            RopeConfig(
                theta=500000.0,
                scaling=Llama3RopeScaling(
                    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
                ),
            ),
        ),
    ],
)
def test_frequencies_equal_transformers(parameters: dict[str, Any], rope: RopeConfig) -> None:
    config = LlamaConfig(
        hidden_size=1024, num_attention_heads=8, max_position_embeddings=131072, rope_parameters=parameters
    )
    reference = LlamaRotaryEmbedding(config).inv_freq
    ours = rope.inverse_frequencies(128)
    assert ours.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(ours), reference, rtol=1e-6, atol=0)
    if rope.scaling is not None:
        plain = replace(rope, scaling=None).inverse_frequencies(128)
        assert np.abs(plain / ours - 1).max() > 2.9
        # The same scaling as GGUF stores it, a divisor per frequency.
        as_factors = replace(rope, scaling=FactorRopeScaling(factors=tuple((plain / ours).tolist())))
        np.testing.assert_allclose(as_factors.inverse_frequencies(128), ours, rtol=1e-6)
