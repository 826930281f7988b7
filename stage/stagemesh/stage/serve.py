"""Runs a stage until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from importlib.metadata import version

import uvloop
from grpc_health.v1.health_pb2 import HealthCheckResponse

from stagemesh.stage.config import StageConfig
from stagemesh.stage.leader.leader import SERVICE_NAME, StageLeader
from stagemesh.stage.leader.service import RAW_METHODS, StageService
from stagemesh.stage.leader.stats import StageStats
from stagemesh.stage.leader.step_spans import StepSpans
from stagemesh.stage.memory import GIB
from stagemesh.stage.plan import plan_stage
from stagemesh.stage.telemetry import open_metrics, stage_label, start_exporter
from stagemesh.stage.toolchain import check_toolchain
from stagemesh.v1 import stage_pb2
from stagemesh.wire.address import check_listen
from stagemesh.wire.logs import setup_logging
from stagemesh.wire.service import add_health, add_reflection, add_service, bind, make_server
from stagemesh.wire.telemetry.metric_settings import MetricSettings

log = logging.getLogger(__name__)

SHUTDOWN_GRACE_S = 2.0


def run(config: StageConfig) -> None:
    """Serve until SIGTERM or SIGINT; StagemeshError if the stage cannot start."""
    name = f"stage {config.stage.partition('/')[0]}" if config.stage else f"stage {config.layers or 'all'}"
    setup_logging(config.log_level, config.log_json, name)
    uvloop.run(_serve(config, name))


async def _serve(config: StageConfig, name: str) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    check_listen(config.listen, insecure=config.insecure, key="--listen")
    plan = plan_stage(config)
    if plan.gpus:
        check_toolchain(os.environ)
    for rank, memory in enumerate(plan.memory.ranks if plan.memory else ()):
        gpu, others = plan.gpus[rank].index, plan.used_bytes[rank] / GIB
        log.info("rank %d will hold of GPU %d %s; others hold %.2f", rank, gpu, memory.describe(), others)
    exporter = start_exporter(config)
    pushed = MetricSettings.read(os.environ)
    server = make_server()
    health = add_health(server)
    await health.set(SERVICE_NAME, HealthCheckResponse.NOT_SERVING)
    spans = StepSpans(exporter, ranks=config.trace_ranks) if exporter else None
    stats = StageStats(stage_label(config)) if config.metrics or pushed else None
    leader = StageLeader(config, plan, name, health, version("stagemesh"), spans, stats)
    descriptor = stage_pb2.DESCRIPTOR.services_by_name["StageService"]
    add_service(server, descriptor, StageService(leader), raw=RAW_METHODS)
    add_reflection(server, descriptor)
    address = bind(server, config.listen, key="--listen")
    metrics = open_metrics(config, leader, plan.num_blocks, exporter, spans, pushed)
    await server.start()
    log.info("listening on %s", address)
    if exporter:
        exporter.announce()
    if metrics:
        metrics.announce()
    supervisor = asyncio.create_task(leader.supervise())
    waiter = asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait({supervisor, waiter}, return_when=asyncio.FIRST_COMPLETED)
        if supervisor.done():
            supervisor.result()
        log.info("stopping")
    finally:
        await health.set(SERVICE_NAME, HealthCheckResponse.NOT_SERVING)
        await leader.aclose()
        waiter.cancel()
        supervisor.cancel()
        await asyncio.gather(supervisor, waiter, return_exceptions=True)
        await server.stop(SHUTDOWN_GRACE_S)
        # Side by side: each may wait for a receiver that does not answer.
        await asyncio.gather(
            *([asyncio.to_thread(exporter.close)] if exporter else []),
            *([metrics.close()] if metrics else []),
        )
