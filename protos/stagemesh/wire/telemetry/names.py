"""Every name that traces and metrics use: spans, attributes, instruments, buckets.

Names of the OpenTelemetry semantic conventions where these have one (gen_ai.*, error.type, rpc.*); the rest is under
stagemesh. Needs nothing but Python, so that the client can use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SCOPE = "stagemesh"
"""Instrumentation scope of every span and instrument."""
PROVIDER = "stagemesh"
"""Value of gen_ai.provider.name."""


class Span:
    """Names of spans. The trace of a request: GENERATE of the client, GENERATE of the router, QUEUE, then
    PREFILL and DECODE of each stage. The trace of a microbatch: STEP, then STAGE of each stage with its parts."""

    GENERATE = "generate"
    """Followed by the model's name where it is known, as the GenAI conventions ask for."""
    QUEUE = "queue"
    PREFILL = "prefill"
    """One chunk of a prompt on one stage."""
    DECODE = "decode"
    """All decode steps of a request on one stage."""
    DECODE_STEP = "decode step"
    """One decode step of a request on one stage; with --trace full only."""
    STEP = "step"
    STAGE = "stage"
    RANK = "rank"
    """The step on one tensor-parallel rank; with --trace-ranks only."""
    WAIT_FOR_SLOT = "queue"
    """On a stage: the step before it still runs."""
    WAIT = "wait_for_upstream"
    RECEIVE = "receive"
    COMPUTE = "compute"
    SEND = "send"


PARTS = (Span.WAIT_FOR_SLOT, Span.WAIT, Span.RECEIVE, Span.COMPUTE, Span.SEND)
"""Of a step on a stage, in the order in which they follow each other."""
SPANS_OF_A_STEP = 1 + len(PARTS)
"""On a stage, at most."""


class Attribute:
    """Keys of span attributes and of metric labels."""

    # GenAI semantic conventions.
    OPERATION = "gen_ai.operation.name"
    PROVIDER = "gen_ai.provider.name"
    MODEL = "gen_ai.request.model"
    MAX_TOKENS = "gen_ai.request.max_tokens"
    TEMPERATURE = "gen_ai.request.temperature"
    TOP_P = "gen_ai.request.top_p"
    TOP_K = "gen_ai.request.top_k"
    SEED = "gen_ai.request.seed"
    RESPONSE_ID = "gen_ai.response.id"
    FINISH_REASONS = "gen_ai.response.finish_reasons"
    INPUT_TOKENS = "gen_ai.usage.input_tokens"
    OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
    CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"
    TOKEN_TYPE = "gen_ai.token.type"
    TIME_TO_FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"
    INPUT_MESSAGES = "gen_ai.input.messages"
    """The prompt; only with OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT=true."""

    # Other semantic conventions.
    ERROR_TYPE = "error.type"
    """A gRPC status code, such as UNAVAILABLE."""
    RPC_SYSTEM = "rpc.system.name"
    RPC_METHOD = "rpc.method"
    SERVER_ADDRESS = "server.address"
    SERVER_PORT = "server.port"
    SERVICE_NAME = "service.name"
    SERVICE_VERSION = "service.version"
    SERVICE_INSTANCE = "service.instance.id"

    # Ours.
    LANE = "stagemesh.lane"
    EPOCH = "stagemesh.epoch"
    STAGE = "stagemesh.stage"
    """Index of the stage in its lane, from 0."""
    RANK = "stagemesh.rank"
    STEP = "stagemesh.step"
    """Number of the step within its epoch."""
    ROWS = "stagemesh.step.rows"
    TOKENS = "stagemesh.step.tokens"
    """Positions that the step computes."""
    PREFILL_TOKENS = "stagemesh.step.prefill_tokens"
    STEPS = "stagemesh.steps"
    """How many steps a span sums up."""
    QUEUE_MS = "stagemesh.queue_ms"
    WAIT_MS = "stagemesh.wait_for_upstream_ms"
    RECEIVE_MS = "stagemesh.receive_ms"
    COMPUTE_MS = "stagemesh.compute_ms"
    SEND_MS = "stagemesh.send_ms"
    SENT_BYTES = "stagemesh.sent_bytes"
    PRIORITY = "stagemesh.priority"
    PREEMPTIONS = "stagemesh.preemptions"
    PHASE = "stagemesh.phase"
    """prefill, decode or mixed."""
    PART = "stagemesh.part"
    """One of PARTS."""
    STATE = "stagemesh.state"
    LINK = "stagemesh.link"
    """activations or ring."""
    TRANSPORT = "stagemesh.transport"
    FINISH = "stagemesh.finish_reason"


PART_MS = (
    Attribute.QUEUE_MS,
    Attribute.WAIT_MS,
    Attribute.RECEIVE_MS,
    Attribute.COMPUTE_MS,
    Attribute.SEND_MS,
)
"""Attribute with the milliseconds of each of PARTS."""


TTFT_BUCKETS_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0)
TOKEN_BUCKETS_S = (
    *(0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1),
    *(0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5),
)
REQUEST_BUCKETS_S = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
QUEUE_BUCKETS_S = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)
STEP_BUCKETS_S = (
    *(0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05),
    *(0.075, 0.1, 0.25, 0.5, 1.0, 2.5),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One instrument. Prometheus sees dots as underscores, with the unit and, on counters, _total appended."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    description: str
    buckets: tuple[float, ...] = ()

    @property
    def prometheus(self) -> str:
        """The name in a scrape; of a histogram without _bucket, _sum and _count."""
        name = self.name.replace(".", "_")
        suffix = {"s": "_seconds", "By": "_bytes"}.get(self.unit, "")
        if not name.endswith(suffix):
            name += suffix
        return name + ("_total" if self.kind == "counter" else "")


def _histogram(name: str, buckets: tuple[float, ...], description: str) -> Metric:
    return Metric(name=name, kind="histogram", unit="s", description=description, buckets=buckets)


def _counter(name: str, description: str, unit: str = "1") -> Metric:
    return Metric(name=name, kind="counter", unit=unit, description=description)


def _gauge(name: str, description: str, unit: str = "{item}") -> Metric:
    return Metric(name=name, kind="gauge", unit=unit, description=description)


class RouterMetric:
    """Instruments of the router. Labels are named in the descriptions."""

    TTFT = _histogram(
        "gen_ai.server.time_to_first_token", TTFT_BUCKETS_S, "From a request's arrival to its first token."
    )
    TIME_PER_TOKEN = _histogram(
        "gen_ai.server.time_per_output_token",
        TOKEN_BUCKETS_S,
        "Of a request that ended: the mean time of its tokens after the first.",
    )
    DURATION = _histogram(
        "gen_ai.server.request.duration",
        REQUEST_BUCKETS_S,
        "From a request's arrival to its end, whatever end.",
    )
    INTER_TOKEN = _histogram(
        "stagemesh.inter_token.duration", TOKEN_BUCKETS_S, "From each token of a request to its next one."
    )
    QUEUE = _histogram(
        "stagemesh.queue.duration", QUEUE_BUCKETS_S, "From a request's arrival to its first step."
    )
    TOKENS = _counter(
        "stagemesh.tokens", "Tokens of prompts taken and of answers (gen_ai_token_type: input, output)."
    )
    FINISHED = _counter("stagemesh.requests.finished", "Requests that ended well (stagemesh_finish_reason).")
    ERRORS = _counter(
        "stagemesh.requests.failed", "Requests refused or failed, by gRPC status code (error_type)."
    )
    RUNNING = _gauge("stagemesh.requests.running", "Requests with a slot now.", "{request}")
    WAITING = _gauge("stagemesh.requests.waiting", "Requests in the waiting queue now.", "{request}")
    BLOCKS = _gauge("stagemesh.kv.blocks", "KV blocks of the lane (stagemesh_state: used, free).", "{block}")
    CACHE_QUERIED = _counter(
        "stagemesh.prefix_cache.queried_tokens", "Prompt tokens looked up in the prefix cache."
    )
    CACHE_HIT = _counter("stagemesh.prefix_cache.hit_tokens", "Prompt tokens found in the prefix cache.")
    PREEMPTIONS = _counter("stagemesh.preemptions", "Running requests that gave up their memory.")
    STEPS = _counter("stagemesh.steps", "Steps sent to the lane.")
    IN_FLIGHT = _gauge("stagemesh.steps.in_flight", "Steps without an answer now.", "{step}")
    LANE_READY = _gauge("stagemesh.lane.ready", "1 while the lane takes requests.", "{lane}")
    LANE_FORMED = _counter("stagemesh.lane.formed", "Times the lane was formed: 1 and its restarts.")
    STAGE_BUSY = _gauge(
        "stagemesh.stage.busy",
        "Share of the last ten seconds in which a stage computed (stagemesh_stage).",
        "1",
    )
    STAGE_BUBBLE = _gauge(
        "stagemesh.stage.bubble",
        "Part of the last ten seconds' time with a step in flight in which a stage had nothing to do (stagemesh_stage).",
        "1",
    )
    SPANS_DROPPED = _counter(
        "stagemesh.spans.dropped",
        "Spans lost: the OTLP receiver did not take them, OTEL_BSP_MAX_QUEUE_SIZE is too small, or their export failed.",
    )


class StageMetric:
    """Instruments of a stage; every one has the label stagemesh_stage."""

    STEP = _histogram(
        "stagemesh.step.duration",
        STEP_BUCKETS_S,
        "Parts of a step on this stage (stagemesh_phase: prefill, decode, mixed; stagemesh_part: queue, "
        "wait_for_upstream, receive, compute, send).",
    )
    TOKENS = _counter("stagemesh.stage.tokens", "Positions computed (stagemesh_phase).")
    LINK_BYTES = _counter(
        "stagemesh.link.sent",
        "Bytes sent to the neighbour (stagemesh_link: activations, ring; stagemesh_transport).",
        "By",
    )
    LINK_TIME = _histogram(
        "stagemesh.link.duration",
        STEP_BUCKETS_S,
        "From a tensor handed to the link until the transport took it (stagemesh_link, stagemesh_transport).",
    )
    READY = _gauge("stagemesh.stage.ready", "1 while the workers are loaded and serve.", "{stage}")
    STARTS = _counter("stagemesh.workers.started", "Starts of the worker group: 1 and its restarts.")
    LANES = _counter("stagemesh.lanes.opened", "Lanes opened on this stage, one an epoch.")
    LANE_ERRORS = _counter(
        "stagemesh.lanes.failed", "Lanes that ended with an error, by gRPC status code (error_type)."
    )
    BLOCKS = _gauge("stagemesh.stage.kv.blocks", "KV blocks this stage has room for.", "{block}")
    SPANS_DROPPED = _counter(
        "stagemesh.spans.dropped",
        "Spans lost: the OTLP receiver did not take them, OTEL_BSP_MAX_QUEUE_SIZE is too small, or their export failed.",
    )


def metrics_of(group: type) -> tuple[Metric, ...]:
    """The instruments of RouterMetric or StageMetric."""
    return tuple(value for value in vars(group).values() if isinstance(value, Metric))
