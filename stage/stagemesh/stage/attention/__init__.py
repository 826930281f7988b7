"""Paged attention behind one small interface."""

from stagemesh.stage.attention.interface import PagedAttention
from stagemesh.stage.attention.torch_paged import TorchPagedAttention

__all__ = ["PagedAttention", "TorchPagedAttention"]
