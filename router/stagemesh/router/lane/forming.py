"""Forming a lane: every stage there, a chain that fits, links open, streams open."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from itertools import pairwise
from typing import TypeVar

import grpc.aio

from stagemesh.router.lane.stage_link import StageLink
from stagemesh.v1 import stage_pb2
from stagemesh.wire.errors import ChainError
from stagemesh.wire.status import from_rpc_error

RPC_TIMEOUT_S = 10.0
Answer = TypeVar("Answer")
TRANSPORTS = ("nccl", "grpc")
"""Best first."""


def choose_transport(sender: StageLink, receiver: StageLink) -> tuple[str, str]:
    """The best transport both ends have, and why it is no better one."""
    theirs = list(receiver.description.transports)
    reasons = [
        f"no {TRANSPORTS[0]} on {end.name}"
        for end in (sender, receiver)
        if TRANSPORTS[0] not in end.description.transports
    ]
    for transport in sender.description.transports:
        if transport not in theirs:
            continue
        if transport == "nccl" and (shared := _gpus_of(sender) & _gpus_of(receiver)):
            reasons.append(f"both ends compute on GPU {min(shared)}, and NCCL joins no GPU to itself")
            continue
        return transport, "; ".join(reasons) or "best on both ends"
    raise ChainError(
        f"{sender.name} offers {list(sender.description.transports)}, {receiver.name} {theirs}: no transport in common",
        reason="CHAIN_REFUSED",
        stage=receiver.name,
    )


def _gpus_of(stage: StageLink) -> set[str]:
    return {rank.gpu_id for rank in stage.description.ranks if rank.gpu_id}


def links_of(stages: Sequence[StageLink]) -> list[tuple[StageLink, StageLink, stage_pb2.LinkKind]]:
    """(sender, receiver, kind) of every link of the lane; one stage alone has none."""
    if len(stages) == 1:
        return []
    hops = list(pairwise(stages))
    return [
        *((sender, receiver, stage_pb2.LINK_KIND_ACTIVATIONS) for sender, receiver in hops),
        (stages[-1], stages[0], stage_pb2.LINK_KIND_RING),
    ]


async def open_stages(stages: Sequence[StageLink], lane: stage_pb2.OpenLaneRequest) -> None:
    """Raise the epoch on all stages; whatever they had open is dropped."""

    async def open_one(stage: StageLink) -> None:
        request = stage_pb2.OpenLaneRequest()
        request.CopyFrom(lane)
        request.stage_index = stage.index
        await stage.stub.OpenLane(request, timeout=RPC_TIMEOUT_S)

    await _all((stage, open_one(stage)) for stage in stages)


async def open_links(stages: Sequence[StageLink], epoch: int, timeout_s: float) -> None:
    """Open every link at once; each has passed a dummy when this returns."""
    links = [(*link, choose_transport(link[0], link[1])[0]) for link in links_of(stages)]
    prepared = await _all(
        (
            receiver,
            receiver.stub.PrepareLink(
                stage_pb2.PrepareLinkRequest(epoch=epoch, kind=kind, transport=transport),
                timeout=RPC_TIMEOUT_S,
            ),
        )
        for _, receiver, kind, transport in links
    )
    connects = []
    for (sender, receiver, kind, transport), answer in zip(links, prepared, strict=True):
        for end in (sender, receiver):
            request = stage_pb2.ConnectLinkRequest(
                epoch=epoch,
                kind=kind,
                transport=transport,
                sender=end is sender,
                peer_address=receiver.address if end is sender else "",
                nccl_unique_ids=answer.nccl_unique_ids,
                timeout_ms=int(timeout_s * 1000),
            )
            connects.append((end, end.stub.ConnectLink(request, timeout=timeout_s + RPC_TIMEOUT_S)))
    await _all(connects)


async def _all(calls: Iterable[tuple[StageLink, Awaitable[Answer]]]) -> list[Answer]:
    """Await all, in order; the first failure is raised as the error it is, with its stage."""

    async def one(stage: StageLink, call: Awaitable[Answer]) -> Answer:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            failure = from_rpc_error(error)
            failure.stage = failure.stage or stage.name
            raise failure from error

    results = await asyncio.gather(*(one(*call) for call in calls), return_exceptions=True)
    answers = []
    for result in results:
        if isinstance(result, BaseException):
            raise result
        answers.append(result)
    return answers
