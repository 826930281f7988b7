"""Loads what one rank of one stage holds, and nothing else of the model."""

from stagemesh.stage.weights.dummy import dummy_shard
from stagemesh.stage.weights.shard import load_shard

__all__ = ["dummy_shard", "load_shard"]
