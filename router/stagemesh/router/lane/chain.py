"""Whether stages make a lane. Pure; every refusal says both sides' values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stagemesh.v1 import stage_pb2
from stagemesh.wire import protocol
from stagemesh.wire.errors import ChainError


@dataclass(frozen=True, slots=True)
class Member:
    """A stage of the chain."""

    index: int
    address: str
    description: stage_pb2.DescribeResponse

    @property
    def name(self) -> str:
        """As errors call it."""
        return f"stage {self.index} ({self.address})"

    @property
    def layers(self) -> range:
        """Half-open."""
        return range(self.description.layer_begin, self.description.layer_end)


def check_chain(members: Sequence[Member], model_fingerprint: str, max_context: int) -> None:
    """ChainError unless the stages cover every layer once, in order, and agree on all they must share."""
    for member in members:
        described = member.description
        if not protocol.compatible(described.protocol_major, described.protocol_minor):
            raise _refusal(
                f"{member.name} speaks protocol {described.protocol_major}.{described.protocol_minor}, "
                f"the router {protocol.MAJOR}.{protocol.MINOR}; they may be one minor version apart",
                member,
                "protocol",
            )
        if described.model_fingerprint != model_fingerprint:
            raise _refusal(
                f"{member.name} has another model than the router: fingerprint {described.model_fingerprint[:12]}, "
                f"expected {model_fingerprint[:12]}; start both with the same --model",
                member,
                "model_fingerprint",
            )
        if described.max_context < max_context:
            raise _refusal(
                f"{member.name} takes sequences of {described.max_context} tokens, the router of {max_context}; "
                f"give the router --max-context {described.max_context}",
                member,
                "max_context",
            )
    first = members[0]
    for member in members[1:]:
        for field in ("dtype", "block_size"):
            ours, theirs = getattr(first.description, field), getattr(member.description, field)
            if ours != theirs:
                raise _refusal(
                    f"{member.name} has {field} {theirs}, {first.name} has {ours}; give both the same",
                    member,
                    field,
                )
    _check_layers(members)


def _check_layers(members: Sequence[Member]) -> None:
    expected = 0
    for member in members:
        begin, end = member.layers.start, member.layers.stop
        if begin > expected:
            raise _refusal(
                f"layers {expected}:{begin} are on no stage: {member.name} begins at layer {begin}, expected {expected}",
                member,
                "layers",
            )
        if begin < expected:
            raise _refusal(
                f"layers {begin}:{min(expected, end)} are on two stages: {member.name} has {begin}:{end}, "
                f"expected it to begin at {expected}",
                member,
                "layers",
            )
        expected = end
    total = members[0].description.num_layers
    if expected != total:
        raise _refusal(
            f"layers {expected}:{total} are on no stage: {members[-1].name} is the last and ends at layer {expected}",
            members[-1],
            "layers",
        )


def _refusal(message: str, member: Member, field: str) -> ChainError:
    return ChainError(message, reason="CHAIN_REFUSED", stage=member.name, metadata={"differs": field})
