"""What every server of a mesh has beside its own service: liveness, readiness and reflection."""

from __future__ import annotations

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from mesh_processes import Service, address_of
from running_mesh import CALL_TIMEOUT_S, RunningMesh

SERVERS = {
    "public": ("InferenceService", "InferenceService"),
    "admin": ("AdminService", "InferenceService"),
    "stage": ("StageService", "StageService"),
}
"""Its service, and the one whose health is its readiness."""


@pytest.fixture
def addresses(single_mesh: RunningMesh, lone_stage: Service) -> dict[str, str]:
    return {
        "public": single_mesh.listen,
        "admin": single_mesh.admin_listen,
        "stage": address_of(lone_stage),
    }


@pytest.mark.parametrize("server", SERVERS)
def test_it_has_health_and_reflection(addresses: dict[str, str], server: str) -> None:
    service, readiness = (f"stagemesh.v1.{name}" for name in SERVERS[server])
    with grpc.insecure_channel(addresses[server]) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", readiness):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=CALL_TIMEOUT_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as raised:
            health.Check(health_pb2.HealthCheckRequest(service="else"), timeout=CALL_TIMEOUT_S)
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND
        asked = iter(
            [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol=service),
            ]
        )
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        listed, found = stub.ServerReflectionInfo(asked, timeout=CALL_TIMEOUT_S)
        names = {one.name for one in listed.list_services_response.service}
        assert names == {service, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
        assert found.file_descriptor_response.file_descriptor_proto
