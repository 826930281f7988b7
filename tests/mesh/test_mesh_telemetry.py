"""Traces and metrics of a real mesh, received by a real OTLP receiver and scraped over HTTP."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from mesh_calls import generate, make_prompt, make_request, read_answer, refusal
from mesh_processes import START_TIMEOUT_S, STOP_TIMEOUT_S, wait_for
from opentelemetry import trace as otel
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from otlp_receiver import ReceivedSpan, Spans, otlp_grpc_receiver, otlp_http_receiver
from running_mesh import CALL_TIMEOUT_S, RunningMesh
from scraped_metrics import metrics_of_name, scrape
from sim_models import SIM, write_sim_model

from stagemesh.client import Client
from stagemesh.v1 import inference_pb2
from stagemesh.wire.telemetry.names import (
    PART_MS,
    PARTS,
    Attribute,
    RouterMetric,
    Span,
    StageMetric,
    metrics_of,
)

SCRAPED = ("--metrics", "127.0.0.1:0")
KV = ("--kv-memory", "576KiB")
"""48 blocks: little, so that a few requests are enough for a preemption."""


@pytest.fixture(scope="module")
def sim_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sim_model(tmp_path_factory.mktemp("sim-model"))


@pytest.fixture(scope="module")
def received() -> Iterator[Spans]:
    """What a receiver gets that the OTEL_* variables of this process and its children name."""
    with otlp_grpc_receiver() as (endpoint, spans), pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        yield spans


@pytest.fixture(scope="module")
def mesh(sim_model: Path, received: Spans, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    """Three stages and a router with metrics, every request sampled."""
    folder = tmp_path_factory.mktemp("telemetry")
    running = RunningMesh(
        folder, sim_model, (1, 2, 1), stage_flags=(*SIM, *KV, *SCRAPED, "--trace-ranks"), router_flags=SCRAPED
    )
    try:
        running.wait_ready()
        yield running
    finally:
        running.close()


@pytest.fixture(scope="module")
def client_spans(received: Spans) -> Iterator[None]:
    """This process has a tracer provider, as an application that uses OpenTelemetry does."""
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    provider = TracerProvider(resource=Resource.create({Attribute.SERVICE_NAME: "application"}))
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter()))
    # Not set_tracer_provider: what it sets cannot be taken back, and the tests after these have none.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(otel, "get_tracer", provider.get_tracer)
        yield
    provider.shutdown()


def whole_trace(spans: Spans, request_id: str) -> tuple[ReceivedSpan, list[ReceivedSpan]]:
    """The router's span of a request and its children, once the stages' are there."""

    def look() -> tuple[ReceivedSpan, list[ReceivedSpan]] | None:
        for span in spans.all:
            if span.kind == 2 and span.attributes[Attribute.RESPONSE_ID] == request_id:
                children = spans.children(span)
                if Counter(child.name for child in children)[Span.DECODE] == 3:
                    return span, children
        return None

    return wait_for(look, f"the spans of {request_id}")


def parts_of(spans: Spans, stage: ReceivedSpan) -> list[ReceivedSpan]:
    """The parts of a stage's time in a step, in order, once they are there."""

    def look() -> list[ReceivedSpan] | None:
        found = [span for span in spans.children(stage) if span.name != Span.RANK]
        return found if {span.name for span in found} >= set(PARTS[1:]) else None

    return wait_for(look, "the parts of a stage's span")


def ranks_of(spans: Spans, stage: ReceivedSpan) -> list[ReceivedSpan]:
    return [span for span in spans.children(stage) if span.name == Span.RANK]


def steps_of(spans: Spans, request: ReceivedSpan) -> list[ReceivedSpan]:
    """Roots of the microbatches that carried a request."""
    return [s for s in spans.named(Span.STEP) if (request.trace_id, request.span_id) in s.links]


def test_one_trace_from_the_client_to_the_last_stage(
    mesh: RunningMesh, received: Spans, client_spans: None
) -> None:
    tracer = otel.get_tracer("application")
    with Client(mesh.listen) as client, tracer.start_as_current_span("job") as job:
        answer = client.complete(token_ids=make_prompt(600), max_tokens=12, temperature=0, ignore_eos=True)
    server, children = whole_trace(received, answer.request_id)
    (call,) = [s for s in received.all if s.service == "application" and s.name == Span.GENERATE]
    assert server.trace_id == call.trace_id == f"{job.get_span_context().trace_id:032x}"
    assert call.parent_id == f"{job.get_span_context().span_id:016x}"
    assert server.parent_id == call.span_id
    assert (call.kind, server.kind, server.service) == (3, 2, "stagemesh-router")
    for span in (call, server):
        assert span.attributes[Attribute.OPERATION] == "text_completion"
        assert span.attributes[Attribute.INPUT_TOKENS] == 600
        assert span.attributes[Attribute.OUTPUT_TOKENS] == 12
        assert span.attributes[Attribute.FINISH_REASONS] == ["length"]
        assert Attribute.INPUT_MESSAGES not in span.attributes
        assert 0 < span.attributes[Attribute.TIME_TO_FIRST_CHUNK] < span.duration_ns / 1e9
    # 600 tokens are two chunks of at most 512; a chunk is a span on each of three stages.
    assert Counter(s.name for s in children) == {Span.QUEUE: 1, Span.PREFILL: 6, Span.DECODE: 3}
    for name in (Span.PREFILL, Span.DECODE):
        stages = Counter(s.attributes[Attribute.STAGE] for s in children if s.name == name)
        assert set(stages) == {0, 1, 2}
    assert {s.attributes[Attribute.STEPS] for s in children if s.name == Span.DECODE} == {11}


def test_a_microbatch_is_a_trace_of_its_own_with_a_span_for_each_stage(
    mesh: RunningMesh, received: Spans
) -> None:
    answer = generate(mesh, make_prompt(9), 6)
    server, _ = whole_trace(received, answer.request_id)
    roots = wait_for(lambda: r if len(r := steps_of(received, server)) == 6 else None, "six steps")
    for root in roots:
        assert root.trace_id != server.trace_id
        assert root.parent_id == ""
        stages = wait_for(lambda r=root: s if len(s := received.children(r)) == 3 else None, "three stages")
        assert [s.service for s in sorted(stages, key=lambda s: s.service)] == [
            "stagemesh-stage-0",
            "stagemesh-stage-1",
            "stagemesh-stage-2",
        ]
        assert {s.attributes[Attribute.STEP] for s in stages} == {root.attributes[Attribute.STEP]}
        for stage in stages:
            parts = [s.name for s in parts_of(received, stage) if s.name != Span.WAIT_FOR_SLOT]
            assert parts == list(PARTS[1:])
            # A rank reports when it is idle or has many steps: later than its stage.
            count = 2 if stage.service == "stagemesh-stage-1" else 1
            ranks = wait_for(
                lambda s=stage, n=count: r if len(r := ranks_of(received, s)) == n else None, "ranks"
            )
            assert {s.attributes[Attribute.RANK] for s in ranks} == set(range(count))
            for rank in ranks:
                whole_ms = sum(rank.attributes[key] for key in PART_MS)
                assert abs(whole_ms * 1e6 - rank.duration_ns) <= 0.05 * rank.duration_ns
    links = {
        link
        for span in received.named(Span.PREFILL)
        if span.trace_id == server.trace_id
        for link in span.links
    }
    assert links <= {(root.trace_id, root.span_id) for root in roots}
    assert len(links) == 1, "a chunk names the microbatch that carried it"


def test_the_times_add_up(mesh: RunningMesh, received: Spans) -> None:
    earlier = mesh.lane
    answer = generate(mesh, make_prompt(40), 10)
    server, children = whole_trace(received, answer.request_id)
    roots = wait_for(lambda: r if len(r := steps_of(received, server)) == 10 else None, "ten steps")
    for root in roots:
        for stage in wait_for(lambda r=root: s if len(s := received.children(r)) == 3 else None, "stages"):
            parts = parts_of(received, stage)
            assert abs(sum(p.duration_ns for p in parts) - stage.duration_ns) <= 0.05 * stage.duration_ns
            assert all(stage.start_ns <= p.start_ns and p.end_ns <= stage.end_ns for p in parts)
            assert all(a.end_ns <= b.start_ns for a, b in itertools.pairwise(parts)), "parts overlap"
    # Stages are on another clock than the router: they lie within the request up to the error of its estimate.
    error_ns = 1_000_000 + max(stage.clock_error_ns for stage in (*earlier.stages, *mesh.lane.stages))
    queue = next(s for s in children if s.name == Span.QUEUE)
    assert queue.start_ns <= server.start_ns + error_ns
    for span in children:
        assert server.start_ns - error_ns <= span.start_ns
        assert span.end_ns <= server.end_ns + error_ns or span.name == Span.DECODE, "lookahead runs on"
    for stage in range(3):
        mine = [s for s in children if s.attributes.get(Attribute.STAGE) == stage]
        busy_ms = sum(
            s.attributes[key]
            for s in mine
            for key in (Attribute.RECEIVE_MS, Attribute.COMPUTE_MS, Attribute.SEND_MS)
        )
        assert busy_ms <= server.duration_ns / 1e6


def test_the_sampled_flag_of_the_caller_decides(mesh: RunningMesh, received: Spans) -> None:
    parents = {flag: f"00-{digit * 32}-{digit * 16}-{flag}" for flag, digit in (("00", "a"), ("01", "b"))}
    for flag, traceparent in parents.items():
        metadata = (("traceparent", traceparent),)
        call = mesh.stub.Generate(
            make_request(request_id=f"flag-{flag}"), metadata=metadata, timeout=CALL_TIMEOUT_S
        )
        read_answer(call)
    server, _ = whole_trace(received, "flag-01")
    assert (server.trace_id, server.parent_id) == ("b" * 32, "b" * 16)
    assert not received.of_trace("a" * 32)
    assert not [s for s in received.all if s.attributes.get(Attribute.RESPONSE_ID) == "flag-00"]
    shown = subprocess.run(
        [sys.executable, "-m", "stagemesh.client.cli", "trace", "flag-01", "--admin", mesh.admin_listen],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"trace {'b' * 32}" in shown
    assert "limits: its steps kept it busy" in shown


def test_requests_of_a_session_have_a_context_each_or_that_of_their_call(
    mesh: RunningMesh, received: Spans
) -> None:
    own = make_request(request_id="own", traceparent=f"00-{'c' * 32}-{'c' * 16}-01")
    starts = iter([inference_pb2.SessionRequest(start=[own, make_request(request_id="of-the-call")])])
    metadata = (("traceparent", f"00-{'d' * 32}-{'d' * 16}-01"),)
    for _ in mesh.stub.Session(starts, metadata=metadata, timeout=CALL_TIMEOUT_S):
        pass
    assert whole_trace(received, "own")[0].trace_id == "c" * 32
    assert whole_trace(received, "of-the-call")[0].trace_id == "d" * 32


def test_a_refusal_is_a_span_with_its_error(mesh: RunningMesh, received: Spans) -> None:
    answer = refusal(mesh, request_id="refused", temperature=-1.0)
    assert answer.code is grpc.StatusCode.INVALID_ARGUMENT
    refused = {Attribute.RESPONSE_ID: "refused", Attribute.ERROR_TYPE: "INVALID_ARGUMENT"}
    (span,) = wait_for(
        lambda: [s for s in received.all if refused.items() <= s.attributes.items()], "the refusal's span"
    )
    assert span.error == answer.message


def wait_healthy(router: str) -> None:
    """A busy machine may keep the router from its turn for a second, which its endpoint takes for ill."""

    def look() -> bytes:
        try:
            return urllib.request.urlopen(f"http://{router}/healthz", timeout=CALL_TIMEOUT_S).read()
        except urllib.error.HTTPError:
            return b""

    assert wait_for(look, "a healthy router") == b"ok\n"


def test_every_metric_is_there_and_moves(mesh: RunningMesh) -> None:
    """Two looks, and between them requests that bring about whatever is counted."""
    router = mesh.router.said(r"metrics on http://(\S+)/metrics").group(1)
    stage = mesh.stages[1].said(r"metrics on http://(\S+)/metrics").group(1)
    generate(mesh, make_prompt(64), 4)
    before = {address: scrape(address) for address in (router, stage)}
    seen: dict[str, set[float]] = {}

    def look() -> None:
        for name, value in scrape(router).items():
            seen.setdefault(name, set()).add(value)

    for _ in range(2):
        # Twelve sequences that want more memory together than there is: some wait, some yield.
        calls = [
            mesh.stub.Generate(make_request(make_prompt(64, seed), 60), timeout=CALL_TIMEOUT_S)
            for seed in range(12)
        ]
        for call in calls:
            next(call)
            look()
        for call in calls:
            read_answer(call)
        refusal(mesh, temperature=-1.0)
    look()
    after = {address: scrape(address) for address in (router, stage)}
    # What stays as it is on a mesh whose stages, lane and receiver are all well.
    steady = {
        *(RouterMetric.LANE_READY, RouterMetric.LANE_FORMED, RouterMetric.SPANS_DROPPED),
        *(
            StageMetric.READY,
            StageMetric.STARTS,
            StageMetric.LANES,
            StageMetric.BLOCKS,
            StageMetric.SPANS_DROPPED,
        ),
        StageMetric.LANE_ERRORS,
    }
    for address, group in ((router, RouterMetric), (stage, StageMetric)):
        for metric in metrics_of(group):
            values = metrics_of_name(after[address], metric.prometheus)
            if metric is StageMetric.LANE_ERRORS:
                assert set(values.values()) == {0.0}, "a lane failed"
            assert values, f"{metric.prometheus} is not in the scrape"
            earlier = metrics_of_name(before[address], metric.prometheus)
            moved = values != earlier or any(len(seen.get(name, ())) > 1 for name in values)
            assert moved is (metric not in steady), f"{metric.prometheus}: {earlier} then {values}"
    wait_healthy(router)
    assert urllib.request.urlopen(f"http://{router}/readyz").read() == b"ok\n"


def test_health_and_readiness_differ_when_a_stage_is_lost(mesh: RunningMesh) -> None:
    """And the counters of restarts move. Last of this mesh."""
    router = mesh.router.said(r"metrics on http://(\S+)/metrics").group(1)
    stage = mesh.stages[0].said(r"metrics on http://(\S+)/metrics").group(1)
    (worker,) = mesh.worker_pids()[0]
    os.kill(worker, 9)
    started = f'{StageMetric.STARTS.prometheus}{{stagemesh_stage="0"}}'
    wait_for(lambda: scrape(stage).get(started) == 2.0 or None, "the workers' second start")
    formed = RouterMetric.LANE_FORMED.prometheus
    wait_for(lambda: scrape(router)[formed] == 2.0 or None, "the lane's second forming")
    mesh.wait_ready()
    assert sum(metrics_of_name(scrape(stage), StageMetric.LANE_ERRORS.prometheus).values()) == 1.0
    mesh.stages[2].kill()
    mesh.wait_reason("stage 2")
    wait_healthy(router)
    with pytest.raises(urllib.error.HTTPError) as answer:
        urllib.request.urlopen(f"http://{router}/readyz")
    assert answer.value.code == 503
    assert b"stage 2" in answer.value.read()


def test_over_http_with_a_span_for_each_step_and_a_wrong_receiver_at_a_stage(
    sim_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A receiver that does not answer neither stops requests nor keeps a process from ending."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    with otlp_http_receiver() as (endpoint, spans):
        mesh = RunningMesh(tmp_path, sim_model, (1,), stage_flags=SIM, router_flags=("--trace", "full"))
        try:
            # The stage keeps the wrong address; the router gets the right one, and sends a whole tree.
            assert mesh.router.stop() == 0
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
            mesh.start_router()
            mesh.wait_ready()
            answer = generate(mesh, make_prompt(9), 8)
            assert len(answer.token_ids) == 8
            steps = spans.wait(
                lambda all_: Counter(s.name for s in all_) >= Counter({Span.DECODE_STEP: 7, Span.DECODE: 1}),
                "a span for each decode step",
            )
            (decode,) = [s for s in steps if s.name == Span.DECODE]
            assert len(spans.children(decode)) == 7
            assert [s.stop() for s in (mesh.router, *mesh.stages)] == [0, 0], f"not within {STOP_TIMEOUT_S} s"
        finally:
            mesh.close()


@pytest.mark.parametrize(
    ("key", "path"),
    [("OTEL_EXPORTER_OTLP_ENDPOINT", ""), ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "/v1/traces")],
)
def test_router_and_stages_send_one_trace_over_http(
    sim_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, path: str
) -> None:
    """With the headers of the variables, to the signal's own address where there is one."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=mesh")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    with otlp_http_receiver({"x-tenant": "mesh"}) as (endpoint, spans):
        monkeypatch.setenv(key, endpoint + path)
        mesh = RunningMesh(tmp_path, sim_model, (1, 1), stage_flags=SIM)
        try:
            mesh.wait_ready()
            answer = generate(mesh, make_prompt(9), 6)
            (server,) = wait_for(
                lambda: [
                    s
                    for s in spans.all
                    if s.kind == 2 and s.attributes.get(Attribute.RESPONSE_ID) == answer.request_id
                ],
                "the router's span",
            )
            roots = wait_for(lambda: r if len(r := steps_of(spans, server)) == 6 else None, "six steps")
            for root in roots:
                stages = wait_for(
                    lambda r=root: s if len(s := spans.children(r)) == 2 else None, "two stages"
                )
                assert {s.service for s in stages} == {"stagemesh-stage-0", "stagemesh-stage-1"}
                assert {s.trace_id for s in stages} == {root.trace_id}
            assert root.service == server.service == "stagemesh-router"
        finally:
            mesh.close()


def test_a_mesh_that_exports_nowhere_serves(
    sim_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listens where router and stages would send their spans: these are dropped and counted."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    mesh = RunningMesh(tmp_path, sim_model, (1, 1), stage_flags=SIM, router_flags=SCRAPED)
    try:
        mesh.wait_ready()
        for seed in range(4):
            assert len(generate(mesh, make_prompt(9, seed), 8).token_ids) == 8
        for service in (mesh.router, *mesh.stages):
            service.said(r"traces to http://127\.0\.0\.1:9 every 0\.05 s")
        router = mesh.router.said(r"metrics on http://(\S+)/metrics").group(1)
        dropped = RouterMetric.SPANS_DROPPED.prometheus
        wait_for(lambda: scrape(router)[dropped] or None, "dropped spans")
        assert len(generate(mesh, make_prompt(9, 5), 8).token_ids) == 8
        assert [s.stop() for s in (mesh.router, *mesh.stages)] == [0, 0, 0], f"not within {STOP_TIMEOUT_S} s"
    finally:
        mesh.close()


@pytest.mark.parametrize(
    "variables",
    [
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "true"},
    ],
    ids=["no receiver", "disabled"],
)
def test_nothing_of_opentelemetry_is_loaded_where_tracing_is_off(
    sim_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    flags = ("--api-workers", "1")
    mesh = RunningMesh(tmp_path, sim_model, (1, 1), stage_flags=SIM, router_flags=flags)
    try:
        mesh.wait_ready()
        assert len(generate(mesh, make_prompt(9), 8).token_ids) == 8
        for service in (mesh.router, *mesh.stages):
            assert service.stop() == 0
            imported = re.findall(r"^import time:.*\|\s*(\S+)$", service.log.read_text(), re.MULTILINE)
            assert "stagemesh.wire.telemetry.settings" in imported
            assert [name for name in imported if name.startswith("opentelemetry")] == []
            assert "stagemesh.wire.telemetry.exporter" not in imported
    finally:
        mesh.close()


@pytest.mark.parametrize(
    ("variables", "flags", "key"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "nonsense"}, (), "OTEL_EXPORTER_OTLP_ENDPOINT"),
        ({"OTEL_TRACES_SAMPLER_ARG": "abc"}, (), "OTEL_TRACES_SAMPLER_ARG"),
        ({"OTEL_METRICS_EXPORTER": "console"}, (), "OTEL_METRICS_EXPORTER"),
        ({}, ("--metrics", "nonsense"), "--metrics"),
        ({}, ("--metrics", "0.0.0.0:0"), "--metrics"),
        ({}, ("--trace", "everything"), "--trace"),
    ],
)
def test_a_wrong_setting_is_refused_at_start_with_its_key(
    sim_model: Path, variables: dict[str, str], flags: tuple[str, ...], key: str
) -> None:
    command = [sys.executable, "-m", "stagemesh.client.cli", "router", "--model", str(sim_model)]
    ended = subprocess.run(
        [*command, "--stage", "127.0.0.1:1", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", *flags],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {key}: ")
