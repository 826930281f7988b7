"""`stagemesh health`."""

from __future__ import annotations

from typing import Annotated, Any

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stagemesh.client._channel import CHANNEL_OPTIONS, INFERENCE_SERVICE, call_error
from stagemesh.client._defaults import DEFAULT_ADDRESS
from stagemesh.wire.address import split_address
from stagemesh.wire.errors import NotFoundError, UnavailableError

STAGE_SERVICE = "stagemesh.v1.StageService"
_READINESS_OF = (INFERENCE_SERVICE, STAGE_SERVICE)


def command() -> Any:
    """The function to run."""
    return _health


def _health(
    address: Annotated[
        str, typer.Argument(envvar="STAGEMESH_ADDRESS", metavar="HOST:PORT", help="A router or a stage.")
    ] = DEFAULT_ADDRESS,
    service: Annotated[
        str | None,
        typer.Option(
            "--service", metavar="NAME", help="Of grpc.health.v1; '' is liveness. Unset: is it ready?"
        ),
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", min=0, help="Seconds an answer may take.")] = 5.0,
) -> None:
    """Exits with 0 if it is, with 1 if it is not: for the health checks of containers and of scripts."""
    split_address(address, key="ADDRESS")
    services = _READINESS_OF if service is None else (service,)
    with grpc.insecure_channel(address, CHANNEL_OPTIONS) as channel:
        name, status = _first_known(health_pb2_grpc.HealthStub(channel), services, address, timeout)
    if status != health_pb2.HealthCheckResponse.SERVING:
        word = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
        raise UnavailableError(f"{name or 'the server'} at {address} is {word}")
    print(f"{name or 'the server'} at {address} is SERVING")


def _first_known(stub: Any, services: tuple[str, ...], address: str, timeout_s: float) -> tuple[str, int]:
    """The first of the services that the server knows, and its status."""
    unknown: NotFoundError | None = None
    for name in services:
        request = health_pb2.HealthCheckRequest(service=name)
        try:
            return name, stub.Check(request, timeout=timeout_s).status
        except grpc.RpcError as error:
            mapped = call_error(error, address=address)
            if not isinstance(mapped, NotFoundError):
                raise mapped from error
            unknown = NotFoundError(
                f"{address} has no service {' or '.join(repr(service) for service in services)}; "
                "is it a stagemesh router or stage?"
            )
    assert unknown is not None  # services is never empty
    raise unknown
