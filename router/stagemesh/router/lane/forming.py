"""Forming a lane: every stage there, a chain that fits, links open, streams open."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import grpc.aio

from stagemesh.router.lane.stage_link import StageLink
from stagemesh.v1 import stage_pb2
from stagemesh.wire.errors import ChainError, FailedPreconditionError, StagemeshError
from stagemesh.wire.status import from_rpc_error

log = logging.getLogger(__name__)

RPC_TIMEOUT_S = 10.0
Answer = TypeVar("Answer")
AUTO = "auto"
TRANSPORTS = ("nccl", "unix", "grpc")
"""Best first."""
NCCL_TRIES = 3
"""Failures in a row after which two stages are linked over another transport, until the router ends."""


def choose_transport(
    sender: StageLink, receiver: StageLink, wanted: str = AUTO, failed: str = ""
) -> tuple[str, str]:
    """The best transport both ends have, or the wanted one, and why it is no better one.

    Args:
        failed: Why NCCL is given up between these two; empty: it is not.
    """
    reasons: list[str] = []
    for transport in TRANSPORTS:
        if wanted not in (AUTO, transport):
            continue
        against = [failed] if transport == "nccl" and failed else _against(transport, sender, receiver)
        if against is None:
            chosen = "; ".join(reasons) or "best on both ends"
            return transport, chosen if wanted == AUTO else f"--link-transport {wanted}"
        reasons += against
    ours, theirs = list(sender.description.transports), list(receiver.description.transports)
    raise ChainError(
        f"{sender.name} offers {ours}, {receiver.name} {theirs}: no transport in common"
        + (f" that is {wanted}, as --link-transport wants: {'; '.join(reasons)}" if wanted != AUTO else ""),
        reason="CHAIN_REFUSED",
        stage=receiver.name,
    )


def _against(transport: str, sender: StageLink, receiver: StageLink) -> list[str] | None:
    """Why the two cannot use it; None if they can."""
    ends = (sender, receiver)
    missing = [f"no {transport} on {end.name}" for end in ends if transport not in end.description.transports]
    if missing:
        # Stages with GPUs have no unix links: where neither end has them, that explains nothing.
        return [] if transport == "unix" and len(missing) == len(ends) else missing
    if transport == "nccl" and (shared := _gpus_of(sender) & _gpus_of(receiver)):
        return [f"both ends compute on GPU {min(shared)}, and NCCL joins no GPU to itself"]
    if transport == "unix" and sender.description.host_id != receiver.description.host_id:
        return ["unix is for one host, and these are two"]
    return None


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


@dataclass(slots=True)
class _Link:
    sender: StageLink
    receiver: StageLink
    kind: stage_pb2.LinkKind
    transport: str
    reason: str


async def open_stages(stages: Sequence[StageLink], lane: stage_pb2.OpenLaneRequest) -> None:
    """Raise the epoch on all stages; whatever they had open is dropped."""

    async def open_one(stage: StageLink) -> None:
        request = stage_pb2.OpenLaneRequest()
        request.CopyFrom(lane)
        request.stage_index = stage.index
        await stage.stub.OpenLane(request, timeout=RPC_TIMEOUT_S)

    await _all((stage, open_one(stage)) for stage in stages)


class LinkOpener:
    """Opens a lane's links, and remembers between which stages NCCL could not.

    Args:
        timeout_s: A link may take to open.
        wanted: The transport of all links, or AUTO.
    """

    def __init__(self, timeout_s: float, wanted: str = AUTO) -> None:
        self._timeout_s = timeout_s
        self._wanted = wanted
        self._failures: dict[frozenset[str], deque[str]] = {}
        """What NCCL failed with of late between two addresses, since it last worked there."""

    async def open(self, stages: Sequence[StageLink], epoch: int) -> None:
        """Open every link at once; each has passed a dummy when this returns, and its sender knows its transport.

        No end of an NCCL link is told to connect before every stage has prepared: one that waits inside NCCL for a
        worker that hangs ends only with its process, and then the other end of its other link would wait for that.

        Whether a unix link can be is seen by opening it; where it cannot, and another transport is not ruled out, the
        link is opened over grpc. One that NCCL cannot open breaks this epoch, as both ends may hang in it: the error is
        raised, and after NCCL_TRIES of them the two stages get another transport.
        """
        links = [
            _Link(*ends, *choose_transport(ends[0], ends[1], self._wanted, self._given_up(ends[0], ends[1])))
            for ends in links_of(stages)
        ]
        tried = [link for link in links if link.transport == "unix"]
        for link, problem in zip(
            tried, await asyncio.gather(*(_try(one, epoch, self._timeout_s) for one in tried)), strict=True
        ):
            if problem and self._wanted == "unix":
                raise problem
            if problem:
                log.warning("%s to %s: no unix link: %s", link.sender.name, link.receiver.name, problem)
                link.transport, link.reason = "grpc", f"{link.reason}; unix failed: {problem}"
        prepared = await _prepare([link for link in links if link.transport != "unix"], epoch)
        await _together(*(self._connect(*one, epoch) for one in prepared))
        for link in links:
            link.sender.link_transport, link.sender.link_reason = link.transport, link.reason

    async def _connect(self, link: _Link, answer: stage_pb2.PrepareLinkResponse, epoch: int) -> None:
        try:
            await _connect_ends(link, answer, epoch, self._timeout_s)
        except StagemeshError as error:
            if link.transport == "nccl" and error.reason == "LINK_FAILED":
                pair = _pair(link.sender, link.receiver)
                self._failures.setdefault(pair, deque(maxlen=NCCL_TRIES)).append(str(error))
                if given_up := self._given_up(link.sender, link.receiver):
                    log.warning("%s and %s: %s", link.sender.name, link.receiver.name, given_up)
            raise
        if link.transport == "nccl":
            self._failures.pop(_pair(link.sender, link.receiver), None)

    def _given_up(self, sender: StageLink, receiver: StageLink) -> str:
        """Why NCCL is no longer tried between two stages; empty: it is."""
        failures = self._failures.get(_pair(sender, receiver))
        if self._wanted != AUTO or failures is None or len(failures) < NCCL_TRIES:
            return ""
        return f"nccl failed {len(failures)} times in a row, the last time: {failures[-1]}"


def _pair(one: StageLink, other: StageLink) -> frozenset[str]:
    return frozenset((one.address, other.address))


async def _try(link: _Link, epoch: int, timeout_s: float) -> FailedPreconditionError | None:
    """Open a unix link; why it could not be, unless a stage is at fault."""
    try:
        (prepared,) = await _prepare([link], epoch)
        await _connect_ends(*prepared, epoch, timeout_s)
    except FailedPreconditionError as error:
        if error.reason != "TRANSPORT_FAILED":
            raise
        return error
    return None


async def _prepare(links: Sequence[_Link], epoch: int) -> list[tuple[_Link, stage_pb2.PrepareLinkResponse]]:
    """Ask every receiver what its sender needs to know."""
    answers = await _all(
        (
            link.receiver,
            link.receiver.stub.PrepareLink(
                stage_pb2.PrepareLinkRequest(epoch=epoch, kind=link.kind, transport=link.transport),
                timeout=RPC_TIMEOUT_S,
            ),
        )
        for link in links
    )
    return list(zip(links, answers, strict=True))


async def _connect_ends(
    link: _Link, answer: stage_pb2.PrepareLinkResponse, epoch: int, timeout_s: float
) -> None:
    """Tell both ends, at once."""
    connects = []
    for end, other in ((link.sender, link.receiver), (link.receiver, link.sender)):
        sends = end is link.sender
        request = stage_pb2.ConnectLinkRequest(
            epoch=epoch,
            kind=link.kind,
            transport=link.transport,
            sender=sends,
            peer_address=other.address if sends or link.transport == "unix" else "",
            nccl_unique_ids=answer.nccl_unique_ids,
            unix_path=answer.unix_path if sends else "",
            timeout_ms=int(timeout_s * 1000),
        )
        connects.append((end, end.stub.ConnectLink(request, timeout=timeout_s + RPC_TIMEOUT_S)))
    await _all(connects)


async def _all(calls: Iterable[tuple[StageLink, Awaitable[Answer]]]) -> list[Answer]:
    """Await all, in order; the first failure is raised as the error it is, with its stage, and the rest cancelled."""

    async def one(stage: StageLink, call: Awaitable[Answer]) -> Answer:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            failure = from_rpc_error(error)
            failure.stage = failure.stage or stage.name
            raise failure from error

    return await _together(*(one(*call) for call in calls))


async def _together(*doing: Awaitable[Answer]) -> list[Answer]:
    """Await all, in order; the first failure is raised, and the rest cancelled."""
    tasks = [asyncio.ensure_future(one) for one in doing]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
