"""What `stagemesh up` waits for: a router that serves and says what."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from scripted_router import WAIT_S, ScriptedRouter

from stagemesh.client.cli._probe import MeshProbe
from stagemesh.v1 import inference_pb2 as pb
from stagemesh.wire.errors import UnimplementedError


class HesitantRouter(ScriptedRouter):
    """Serves, but refuses with these codes, one after the other, to say what."""

    def __init__(self, *codes: grpc.StatusCode) -> None:
        super().__init__()
        self.codes = list(codes)

    def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        if self.codes:
            context.abort(self.codes.pop(0), "not now")
        return super().GetModel(request, context)


async def test_a_router_that_is_late_to_say_what_it_serves_is_asked_again() -> None:
    progress: list[str] = []
    with HesitantRouter(grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE) as router:
        probe = MeshProbe(router.address, router.address, progress.append)
        await asyncio.wait_for(probe.until_ready(), WAIT_S)
    assert probe.model_name == "scripted"
    assert not router.codes
    assert len(progress) >= 2


async def test_what_no_waiting_mends_is_raised() -> None:
    with HesitantRouter(grpc.StatusCode.UNIMPLEMENTED) as router:
        probe = MeshProbe(router.address, router.address, lambda words: None)
        with pytest.raises(UnimplementedError):
            await asyncio.wait_for(probe.until_ready(), WAIT_S)
