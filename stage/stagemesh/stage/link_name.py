"""What a link's kind is called in errors and metrics."""

from __future__ import annotations

from stagemesh.v1 import stage_pb2


def link_name(kind: int) -> str:
    """Of a LinkKind: activations, ring."""
    return stage_pb2.LinkKind.Name(kind).removeprefix("LINK_KIND_").lower()
