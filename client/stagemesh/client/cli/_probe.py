"""Looks at a mesh from outside until it takes requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc

from stagemesh.client import AsyncClient
from stagemesh.client._channel import CHANNEL_OPTIONS
from stagemesh.v1 import admin_pb2 as pb
from stagemesh.v1 import admin_pb2_grpc
from stagemesh.wire.errors import DeadlineExceededError, UnavailableError

_PAUSE_S = 0.1
_TIMEOUT_S = 2.0


class MeshProbe:
    """A router's health and its status, seen while it starts.

    Args:
        address: Of the router's public server.
        admin: Of its admin server.
        on_progress: Told what the mesh is waiting for.
    """

    def __init__(self, address: str, admin: str, on_progress: Callable[[str], None]) -> None:
        self._address = address
        self._admin = admin
        self._on_progress = on_progress
        self.model_name = ""
        """The served name, once it is ready."""

    async def until_ready(self) -> None:
        """Until the health of the inference service is SERVING."""
        channel = grpc.aio.insecure_channel(self._admin, CHANNEL_OPTIONS)
        stub: Any = admin_pb2_grpc.AdminServiceStub(channel)
        async with AsyncClient(self._address) as client, channel:
            while not await self._is_ready(client):
                self._on_progress(await _progress(stub))
                await asyncio.sleep(_PAUSE_S)

    async def _is_ready(self, client: AsyncClient) -> bool:
        """Whether it takes requests and has said what it serves; what waiting may mend is a no."""
        if not await client.ready(timeout=_TIMEOUT_S):
            return False
        try:
            self.model_name = (await client.model(timeout=_TIMEOUT_S)).name
        except (DeadlineExceededError, UnavailableError):
            return False
        return True


async def _progress(stub: Any) -> str:
    try:
        response = await stub.GetStatus(pb.GetStatusRequest(), timeout=_TIMEOUT_S)
    except grpc.RpcError:
        return "starting the router"
    return describe(response.status)


def describe(status: pb.MeshStatus) -> str:
    """What a mesh that is not ready waits for: "stage 0 ready · stage 1 loading"."""
    parts = [
        f"stage {stage.stage_index} {stage.state}" + (f" ({stage.detail})" if stage.detail else "")
        for lane in status.lanes
        for stage in lane.stages
    ]
    reasons = [lane.reason for lane in status.lanes if lane.reason]
    return " · ".join(parts) or "; ".join(reasons) or "the router looks for its stages"
