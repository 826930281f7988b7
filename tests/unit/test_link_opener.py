"""Links that NCCL cannot open, over stages that only answer."""

from __future__ import annotations

import asyncio

import pytest

from stagemesh.router.lane.forming import NCCL_TRIES, LinkOpener
from stagemesh.router.lane.stage_link import StageLink
from stagemesh.v1 import stage_pb2
from stagemesh.wire.errors import StageLostError


class AnsweringStub:
    """Says yes to every link, but for what it is told to fail with over NCCL."""

    def __init__(self) -> None:
        self.problem: StageLostError | None = None
        self.silent: StageLostError | None = None
        """What its PrepareLink ends with after a while."""
        self.opened: list[str] = []

    async def PrepareLink(
        self, request: stage_pb2.PrepareLinkRequest, timeout: float
    ) -> stage_pb2.PrepareLinkResponse:
        if self.silent:
            await asyncio.sleep(0.05)
            raise self.silent
        return stage_pb2.PrepareLinkResponse()

    async def ConnectLink(
        self, request: stage_pb2.ConnectLinkRequest, timeout: float
    ) -> stage_pb2.ConnectLinkResponse:
        if request.transport == "nccl" and self.problem:
            raise self.problem
        self.opened.append(request.transport)
        return stage_pb2.ConnectLinkResponse()


def make_stages() -> tuple[list[StageLink], list[AnsweringStub]]:
    """Three stages with a GPU each."""
    stages, stubs = [], []
    for index in range(3):
        stage = StageLink.__new__(StageLink)
        stage.index, stage.address = index, f"host:{index}"
        stage.description = stage_pb2.DescribeResponse(transports=["nccl", "grpc"], host_id="one")
        stage.description.ranks.add(gpu_id=f"gpu-{index}")
        stubs.append(AnsweringStub())
        stage.stub = stubs[-1]  # type: ignore[assignment]
        stages.append(stage)
    return stages, stubs


def cannot(what: str = "rank 0 cannot open the link: unhandled system error") -> StageLostError:
    return StageLostError(what, reason="LINK_FAILED")


def fail_to_open(opener: LinkOpener, stages: list[StageLink], times: int) -> None:
    for epoch in range(times):
        with pytest.raises(StageLostError):
            asyncio.run(opener.open(stages, epoch))


def test_where_nccl_fails_again_and_again_another_transport_takes_over() -> None:
    """Between stages 1 and 2; the other pairs keep NCCL."""
    stages, stubs = make_stages()
    opener = LinkOpener(1.0)
    # Of its two links stage 2 opens the receiving end of the first; the ring to stage 0 works.
    connect = stubs[2].ConnectLink

    async def refuse_one(
        request: stage_pb2.ConnectLinkRequest, timeout: float
    ) -> stage_pb2.ConnectLinkResponse:
        if request.transport == "nccl" and not request.sender:
            raise cannot()
        return await connect(request, timeout)

    stubs[2].ConnectLink = refuse_one  # type: ignore[method-assign]
    fail_to_open(opener, stages, NCCL_TRIES)
    asyncio.run(opener.open(stages, 9))
    assert [stage.link_transport for stage in stages] == ["nccl", "grpc", "nccl"]
    assert stages[1].link_reason == (
        f"nccl failed {NCCL_TRIES} times in a row, the last time: rank 0 cannot open the link: unhandled system error"
    )
    assert stages[0].link_reason == "best on both ends"


def test_a_failure_now_and_then_costs_no_link_its_transport() -> None:
    stages, stubs = make_stages()
    opener = LinkOpener(1.0)
    for _ in range(3):
        stubs[1].problem = cannot()
        fail_to_open(opener, stages, NCCL_TRIES - 1)
        stubs[1].problem = None
        asyncio.run(opener.open(stages, 9))
        assert [stage.link_transport for stage in stages] == ["nccl"] * 3


def test_a_stage_that_is_lost_is_no_failure_of_nccl() -> None:
    stages, stubs = make_stages()
    opener = LinkOpener(1.0)
    stubs[1].problem = StageLostError("its worker ended", reason="STAGE_LOST")
    fail_to_open(opener, stages, NCCL_TRIES + 1)
    stubs[1].problem = None
    asyncio.run(opener.open(stages, 9))
    assert [stage.link_transport for stage in stages] == ["nccl"] * 3


def test_a_transport_that_was_asked_for_is_not_given_up() -> None:
    stages, stubs = make_stages()
    opener = LinkOpener(1.0, "nccl")
    stubs[0].problem = cannot()
    fail_to_open(opener, stages, NCCL_TRIES + 2)
    assert all("grpc" not in stub.opened for stub in stubs)


def test_no_end_connects_before_every_stage_has_prepared() -> None:
    """A stage whose worker hangs leaves the workers of the others as they are, and costs no pair its NCCL."""
    stages, stubs = make_stages()
    opener = LinkOpener(1.0)
    stubs[1].silent = cannot("rank 0 did not prepare the link within 5 s")
    fail_to_open(opener, stages, NCCL_TRIES + 1)
    assert [stub.opened for stub in stubs] == [[], [], []]
    stubs[1].silent = None
    asyncio.run(opener.open(stages, 9))
    assert [stage.link_transport for stage in stages] == ["nccl"] * 3
