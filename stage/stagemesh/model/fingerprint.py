"""One value that says whether two hosts hold the same model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from stagemesh.model.config import ModelConfig

_NUM_SAMPLES = 8
_SAMPLE_BYTES = 1024
_DEFAULTS = ("generation", "bos_token_id", "end_token_ids")
"""Fields only the router uses: hosts may differ in them and still compute the same model."""


def fingerprint_config(config: ModelConfig) -> str:
    """The fingerprint of a shape, for models without weights."""
    return _hash(_config_fields(config))


def fingerprint_index(config: ModelConfig, weight_map: Mapping[str, str]) -> str:
    """The fingerprint of a sharded model, which needs none of its shard files."""
    return _hash([_config_fields(config), dict(weight_map)])


def fingerprint_file(
    config: ModelConfig, table: Sequence[tuple[str, str, tuple[int, ...]]], path: Path, begin: int
) -> str:
    """The fingerprint of a model in one file: its shape, its tensors and 8 samples of 1 KiB of its weights.

    Args:
        config: The shape.
        table: Name, type and shape of every tensor, sorted.
        path: The file.
        begin: First byte of the weights in it.
    """
    samples = hashlib.sha256()
    size = path.stat().st_size
    last = max(begin, size - _SAMPLE_BYTES)
    with path.open("rb") as file:
        for index in range(_NUM_SAMPLES):
            file.seek(begin + (last - begin) * index // (_NUM_SAMPLES - 1))
            samples.update(file.read(_SAMPLE_BYTES))
    return _hash([_config_fields(config), table, size - begin, samples.hexdigest()])


def _config_fields(config: ModelConfig) -> dict[str, object]:
    fields = asdict(config)
    # Two scalings with the same fields must differ.
    fields["rope"]["kind"] = type(config.rope.scaling).__name__
    return {key: value for key, value in fields.items() if key not in _DEFAULTS}


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
