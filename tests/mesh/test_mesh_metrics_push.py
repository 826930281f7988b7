"""Metrics of a real mesh, pushed to a real OTLP receiver."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mesh_calls import generate, make_prompt
from mesh_processes import wait_for
from otlp_metrics_receiver import PushedMetrics, otlp_grpc_metrics_receiver, otlp_http_metrics_receiver
from running_mesh import RunningMesh
from scraped_metrics import metrics_of_name, scrape
from sim_models import SIM, write_sim_model

from stagemesh.wire.telemetry.histogram import BulkHistogram
from stagemesh.wire.telemetry.metric_settings import MetricSettings
from stagemesh.wire.telemetry.metrics import Metrics
from stagemesh.wire.telemetry.names import Metric, RouterMetric, StageMetric, metrics_of
from stagemesh.wire.telemetry.resource import service_attributes
from stagemesh.wire.telemetry.variables import HTTP

ROUTER = "stagemesh-router"
STAGES = ("stagemesh-stage-0", "stagemesh-stage-1")
KINDS = {"counter": "sum", "gauge": "gauge", "histogram": "histogram"}


@pytest.fixture(scope="module")
def pushed() -> Iterator[PushedMetrics]:
    """What comes to the receiver that the OTEL_* variables of this process and its children name."""
    with otlp_grpc_metrics_receiver() as (endpoint, metrics), pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_METRICS_EXPORTER", "otlp")
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        patch.setenv("OTEL_TRACES_EXPORTER", "none")
        patch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "200")
        yield metrics


@pytest.fixture(scope="module")
def pushing(pushed: PushedMetrics, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    """Two stages without an endpoint; the router has one beside the push."""
    folder = tmp_path_factory.mktemp("pushed")
    model = write_sim_model(folder / "model")
    running = RunningMesh(folder, model, (1, 1), stage_flags=SIM, router_flags=("--metrics", "127.0.0.1:0"))
    try:
        running.wait_ready()
        yield running
    finally:
        running.close()


def test_every_metric_comes_with_its_kind_and_unit(pushing: RunningMesh, pushed: PushedMetrics) -> None:
    generate(pushing, make_prompt(40), 8)
    groups: list[tuple[str, tuple[Metric, ...]]] = [(ROUTER, metrics_of(RouterMetric))]
    groups += [(stage, metrics_of(StageMetric)) for stage in STAGES]
    for service, metrics in groups:
        wanted = {metric.name for metric in metrics}

        def look(service: str = service, wanted: set[str] = wanted) -> bool:
            return pushed.names(service) >= wanted

        wait_for(look, f"all of {service}, not without {wanted - pushed.names(service)}")
        for metric in metrics:
            assert pushed.kind(service, metric.name) == (KINDS[metric.kind], metric.unit)
    assert pushed.services == {ROUTER, *STAGES}


def test_numbers_go_on_from_push_to_push(pushing: RunningMesh, pushed: PushedMetrics) -> None:
    """Cumulative, as a scrape would have them; each step is in the histogram of each stage once."""
    tokens, steps = RouterMetric.TOKENS, StageMetric.STEP.name
    endpoint = pushing.router.said(r"metrics on http://(\S+)/metrics").group(1)

    def output_tokens() -> float:
        samples = metrics_of_name(scrape(endpoint), tokens.prometheus)
        return sum(value for name, value in samples.items() if '"output"' in name)

    before = output_tokens()
    generate(pushing, make_prompt(40), 8)
    pushing.wait_idle()
    assert output_tokens() == before + 8
    wait_for(
        lambda: pushed.total(ROUTER, tokens.name, gen_ai_token_type="output") == before + 8,
        "the tokens of the answer",
    )
    num_steps = pushing.lane.num_steps
    for stage in STAGES:
        wait_for(
            lambda stage=stage: pushed.total(stage, steps, stagemesh_part="compute") == num_steps,
            f"{num_steps} steps of {stage}",
        )
    assert scrape(endpoint)[RouterMetric.STEPS.prometheus] == num_steps


def test_the_last_numbers_are_pushed_at_the_end(pushing: RunningMesh, pushed: PushedMetrics) -> None:
    """Last of this mesh."""
    count = pushed.num_pushes
    assert pushing.router.stop() == 0
    assert pushed.num_pushes > count
    assert [stage.stop() for stage in pushing.stages] == [0, 0]


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_receiver_that_is_not_there_stops_nothing(
    protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", protocol)
    monkeypatch.delenv("OTEL_METRICS_EXPORTER", raising=False)
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "100")
    mesh = RunningMesh(tmp_path, write_sim_model(tmp_path / "model"), (1,), stage_flags=SIM)
    try:
        mesh.wait_ready()
        mesh.router.said("metrics to http://127.0.0.1:9 every 0.1 s")
        assert len(generate(mesh, make_prompt(9), 8).token_ids) == 8
        mesh.router.said(r"127\.0\.0\.1:9|Failed to export|Transient error")
        assert [service.stop() for service in (mesh.router, *mesh.stages)] == [0, 0]
    finally:
        mesh.close()


def test_over_http(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: what goes out is the same."""
    with otlp_http_metrics_receiver() as (endpoint, came):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        settings = MetricSettings(endpoint=endpoint, protocol=HTTP)
        metrics = Metrics(service_attributes("me", version="1", instance="here"), settings)
        metrics.observe_one(RouterMetric.STEPS, lambda: 7)
        histogram = BulkHistogram(RouterMetric.QUEUE)
        histogram.of().add(0.5)
        metrics.add(histogram)
        metrics.close()
        assert came.num_pushes == 1
        assert came.total("me", RouterMetric.STEPS.name) == 7
        assert came.total("me", RouterMetric.QUEUE.name) == 1
