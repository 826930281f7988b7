"""Runs a router until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from typing import TYPE_CHECKING

import uvloop
from grpc_health.v1.health_pb2 import HealthCheckResponse

from stagemesh.router.api.admin_service import AdminService
from stagemesh.router.api.public_server import PublicServer
from stagemesh.router.api.requests import Requests
from stagemesh.router.api.served_model import load_served_model
from stagemesh.router.api.streams import Streams
from stagemesh.router.config import RouterConfig
from stagemesh.router.scheduler.pace import preload
from stagemesh.router.tracing.tracing import RouterTracing
from stagemesh.router.worker.pool import WorkerPool
from stagemesh.v1 import admin_pb2
from stagemesh.wire.address import check_listen, split_address
from stagemesh.wire.errors import UnavailableError
from stagemesh.wire.logs import setup_logging
from stagemesh.wire.process import settle
from stagemesh.wire.service import add_health, add_reflection, add_service, bind, make_server
from stagemesh.wire.telemetry.metric_settings import MetricSettings

if TYPE_CHECKING:
    from stagemesh.wire.telemetry.metrics_output import MetricsOutput

log = logging.getLogger(__name__)

SERVICE_NAME = "stagemesh.v1.InferenceService"
LINGER_S = 0.1
SHUTDOWN_GRACE_S = 2.0


def run(config: RouterConfig) -> None:
    """Serve until SIGTERM or SIGINT; StagemeshError if the router cannot start."""
    setup_logging(config.log_level, config.log_json, "router")
    uvloop.run(_serve(config))


async def _serve(config: RouterConfig) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    check_listen(config.listen, insecure=config.insecure, key="--listen")
    check_listen(config.admin, insecure=config.insecure, key="--admin")
    for address in config.stages:
        split_address(address, key="--stage")
    model = load_served_model(config)
    tracing = RouterTracing.start(
        listen=config.listen, model_name=model.name, every_step=config.trace == "full"
    )
    admin = make_server()
    admin_health = add_health(admin)

    def on_ready(ready: bool) -> None:
        public.set_serving(ready)
        status = HealthCheckResponse.SERVING if ready else HealthCheckResponse.NOT_SERVING
        background.add(task := loop.create_task(admin_health.set(SERVICE_NAME, status)))
        task.add_done_callback(background.discard)

    background: set[asyncio.Task[None]] = set()
    requests = Requests(config, model, on_ready, tracing)
    public: PublicServer | WorkerPool
    if config.api_workers:
        public = WorkerPool(config, requests)
    else:
        streams = Streams(model, tracing.server if tracing else None)
        streams.backend = requests.connect(streams)
        public = PublicServer(streams)
    on_ready(False)
    administration = admin_pb2.DESCRIPTOR.services_by_name["AdminService"]
    workers = public if isinstance(public, WorkerPool) else None
    add_service(admin, administration, AdminService(requests, workers))
    add_reflection(admin, administration)
    admin_listen = bind(admin, config.admin, key="--admin")
    listen = await public.start(config.listen)
    try:
        metrics = _open_metrics(config, requests, listen, tracing)
    except BaseException:
        await public.stop(0)
        raise
    await admin.start()
    log.info("listening on %s, admin on %s, model %s", listen, admin_listen, model.name)
    if tracing:
        tracing.announce()
    if metrics:
        metrics.announce()
    preload()
    settle()
    lane = asyncio.create_task(requests.lane.run())
    waiter = asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait({lane, waiter}, return_when=asyncio.FIRST_COMPLETED)
        if lane.done():
            lane.result()
        log.info("stopping")
    finally:
        on_ready(False)
        requests.close(
            UnavailableError("the router is shutting down", reason="SHUTTING_DOWN", retry_after_s=1.0)
        )
        await _refuse_the_last(requests)
        waiter.cancel()
        lane.cancel()
        await asyncio.gather(lane, waiter, return_exceptions=True)
        await asyncio.gather(public.stop(SHUTDOWN_GRACE_S), admin.stop(SHUTDOWN_GRACE_S))
        # Side by side: each may wait for a receiver that does not answer.
        await asyncio.gather(
            *([asyncio.to_thread(tracing.close)] if tracing else []), *([metrics.close()] if metrics else [])
        )


async def _refuse_the_last(requests: Requests) -> None:
    """Calls that have come in and were not looked at yet are refused with a word; gRPC would only cancel them."""
    ends = time.monotonic() + SHUTDOWN_GRACE_S
    refused = -1
    while refused != requests.num_failed and time.monotonic() < ends:
        refused = requests.num_failed
        await asyncio.sleep(LINGER_S)


def _open_metrics(
    config: RouterConfig, requests: Requests, listen: str, tracing: RouterTracing | None
) -> MetricsOutput | None:
    """As --metrics and the OTEL_* variables say; None where nobody wants them."""
    pushed = MetricSettings.read(os.environ)
    if config.metrics is None and pushed is None:
        return None
    # Here, lest a router without metrics loads OpenTelemetry.
    from stagemesh.router.metrics import RouterMetrics
    from stagemesh.wire.telemetry.metrics_output import MetricsOutput

    metrics = RouterMetrics(requests, listen, lambda: tracing.num_dropped if tracing else 0, pushed)
    return MetricsOutput(metrics, config.metrics, insecure=config.insecure, pushed=pushed)
