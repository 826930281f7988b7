"""What a model is: its shape and its defaults, whatever file they were read from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from stagemesh.model.rope import FactorRopeScaling, RopeConfig
from stagemesh.wire.errors import ModelError

SUPPORTED_ARCHITECTURES = ("llama",)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Sampling parameters the model's authors ask for; None where they do not. Checked when made, as a request's are."""

    temperature: float | None = None
    """Also None where the model's generation config turns sampling off."""
    top_k: int | None = None
    """0 means all tokens."""
    top_p: float | None = None
    """Share of probability kept, in (0, 1]."""

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise _bad_default("temperature", self.temperature, "0 or more")
        if self.top_k is not None and self.top_k < 0:
            raise _bad_default("top_k", self.top_k, "0 (all tokens) or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise _bad_default("top_p", self.top_p, "more than 0 and at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder of the Llama family. Checked when made: a ModelError names the value that cannot be."""

    architecture: str = "llama"
    """One of SUPPORTED_ARCHITECTURES."""
    hidden_size: int
    """Width of the residual stream."""
    num_layers: int
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads; divides num_heads."""
    head_dim: int
    """Width of a head; even."""
    intermediate_size: int
    """Columns of the MLP's hidden layer."""
    vocab_size: int
    """Rows of the embedding, padding included."""
    rms_norm_eps: float
    rope: RopeConfig
    tie_embeddings: bool
    """The head is the embedding."""
    max_context: int
    """Tokens of a sequence at most, prompt and answer together."""
    bos_token_id: int | None = None
    """What the tokenizer may put before text."""
    end_token_ids: tuple[int, ...] = ()
    """Every id that ends an answer, ascending."""
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)
    stored_dtype: str | None = None
    """Of the weights in the file, as bfloat16; None where the file does not say or is quantized."""

    def __post_init__(self) -> None:
        if self.architecture not in SUPPORTED_ARCHITECTURES:
            raise unsupported_architecture(self.architecture)
        for name in (
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "vocab_size",
            "max_context",
            "rms_norm_eps",
        ):
            value = getattr(self, name)
            if value <= 0:
                raise ModelError(f"the model's {name} is {value}, expected a positive number")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"the model has {self.num_heads} heads on {self.num_kv_heads} KV heads, "
                "expected a whole number of heads for each KV head"
            )
        if self.head_dim % 2:
            raise ModelError(f"the model's head_dim is {self.head_dim}, expected an even number")
        scaling = self.rope.scaling
        if isinstance(scaling, FactorRopeScaling) and len(scaling.factors) != self.head_dim // 2:
            raise ModelError(
                f"the model has {len(scaling.factors)} rope factors, "
                f"expected head_dim / 2 = {self.head_dim // 2}"
            )

    @property
    def heads_per_kv_head(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size

    @property
    def head_parameters(self) -> int:
        """Weights of the head, and of the embedding: [vocab_size, hidden_size]."""
        return self.vocab_size * self.hidden_size


def _bad_default(name: str, value: float, expected: str) -> ModelError:
    return ModelError(
        f"the model's generation defaults have {name} {value:g}, expected {expected}; mend generation_config.json, "
        "or general.sampling of a GGUF file"
    )


def unsupported_architecture(name: str) -> ModelError:
    """The error for a model of a family that is not built."""
    return ModelError(
        f"model architecture {name!r} is not supported; supported: {', '.join(SUPPORTED_ARCHITECTURES)}",
        reason="UNSUPPORTED_ARCHITECTURE",
    )
