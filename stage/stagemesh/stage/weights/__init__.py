"""Loads what one rank of one stage holds, and nothing else of the model."""

from stagemesh.stage.weights.shard import load_shard

__all__ = ["load_shard"]
