"""The public gRPC server of one public side: InferenceService, health and reflection."""

from __future__ import annotations

import asyncio

from grpc_health.v1.health_pb2 import HealthCheckResponse

from stagemesh.router.api.inference_service import InferenceService
from stagemesh.router.api.streams import Streams
from stagemesh.v1 import inference_pb2
from stagemesh.wire.service import add_health, add_reflection, add_service, bind, make_server

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]


class PublicServer:
    """Serves some streams; NOT_SERVING until it is told otherwise.

    Args:
        streams: Get the requests.
        share_port: Other workers of this router listen on the same port.
    """

    def __init__(self, streams: Streams, *, share_port: bool = False) -> None:
        self._server = make_server(share_port=share_port)
        self._health = add_health(self._server)
        self._tasks: set[asyncio.Task[None]] = set()
        add_service(self._server, SERVICE, InferenceService(streams))
        add_reflection(self._server, SERVICE)
        self.set_serving(False)

    async def start(self, listen: str) -> str:
        """Listen; returns the address with its port. ConfigError if it is taken."""
        address = bind(self._server, listen, key="--listen")
        await self._server.start()
        return address

    def set_serving(self, serving: bool) -> None:
        """Its health says whether the mesh takes requests."""
        status = HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING
        self._tasks.add(task := asyncio.create_task(self._health.set(SERVICE.full_name, status)))
        task.add_done_callback(self._tasks.discard)

    async def stop(self, grace_s: float) -> None:
        """Take no more calls; those that run have so long to end."""
        await self._server.stop(grace_s)
