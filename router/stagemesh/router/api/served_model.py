"""What the router knows of the model it serves: limits, end tokens, defaults, tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from stagemesh.model.config import GenerationDefaults
from stagemesh.model.source import open_model
from stagemesh.router.config import RouterConfig
from stagemesh.router.text import Tokenizer, load_tokenizer
from stagemesh.wire.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """Read once, at start."""

    name: str
    architecture: str
    fingerprint: str
    vocab_size: int
    max_context: int
    end_token_ids: frozenset[int]
    generation: GenerationDefaults
    tokenizer: Tokenizer | None


def load_served_model(config: RouterConfig) -> ServedModel:
    """Open the model's files; the weights are not read."""
    source = open_model(config.model, weights=False)
    model = source.config
    max_context = config.max_context or model.max_context
    if max_context > model.max_context:
        raise ConfigError(f"--max-context {max_context}: the model's context is {model.max_context} tokens")
    return ServedModel(
        name=config.served_model_name or source.name,
        architecture=model.architecture,
        fingerprint=source.fingerprint,
        vocab_size=model.vocab_size,
        max_context=max_context,
        end_token_ids=frozenset(model.end_token_ids),
        generation=model.generation,
        tokenizer=load_tokenizer(source.path),
    )
