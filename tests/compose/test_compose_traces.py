"""One request's trace, as an OTLP receiver in a container of its own gets it."""

from __future__ import annotations

import pytest
from compose_project import Project
from compose_questions import ask
from compose_traces import SeenSpan, request_root, wait_for_spans

pytestmark = pytest.mark.compose

STAGES = {0, 1, 2}
CLOCKS_NS = 20_000_000
"""How far the router's estimate of a stage's clock may be off on a machine that has other work."""


def of_trace(found: list[SeenSpan], trace_id: str, name: str) -> list[SeenSpan]:
    return [span for span in found if span.trace_id == trace_id and span.name == name]


def stages_of(found: list[SeenSpan]) -> set[int | None]:
    return {span.stage for span in found}


def test_a_request_has_a_span_for_every_stage_under_one_trace_id(mesh: Project) -> None:
    ask(mesh, "traced")

    def complete(found: list[SeenSpan]) -> bool:
        root = request_root(found, "traced")
        return (
            root is not None
            and any(span.span_id == root.parent_id for span in found)
            and all(
                stages_of(of_trace(found, root.trace_id, name)) == STAGES for name in ("prefill", "decode")
            )
        )

    found = wait_for_spans(mesh, complete, "trace with prefill and decode of every stage")
    root = request_root(found, "traced")
    assert root is not None
    [client] = [span for span in found if span.span_id == root.parent_id]
    assert (client.service, client.parent_id) == ("stagemesh-client", ""), "the trace begins at the client"
    for name in ("prefill", "decode"):
        spans = of_trace(found, root.trace_id, name)
        assert all(span.start_ns >= root.start_ns - CLOCKS_NS for span in spans)
        assert all(span.end_ns <= root.end_ns + CLOCKS_NS for span in spans)
        assert all(span.end_ns > span.start_ns for span in spans)
        assert all(span.attributes["stagemesh.compute_ms"] > 0 for span in spans)


def test_a_microbatch_has_a_span_of_each_stages_own_under_one_trace_id(mesh: Project) -> None:
    """Made by the stages themselves, in containers of their own, and linked to the request."""
    ask(mesh, "traced-steps")

    def steps(found: list[SeenSpan]) -> list[SeenSpan]:
        root = request_root(found, "traced-steps")
        return [span for span in found if span.name == "step" and root and root.trace_id in span.links]

    def complete(found: list[SeenSpan]) -> bool:
        return any(stages_of(of_trace(found, step.trace_id, "stage")) == STAGES for step in steps(found))

    found = wait_for_spans(mesh, complete, "microbatch with a span of every stage")
    whole = [s for s in steps(found) if stages_of(of_trace(found, s.trace_id, "stage")) == STAGES]
    services = {span.service for span in of_trace(found, whole[0].trace_id, "stage")}
    assert len(services) == 3, services
    for stage in of_trace(found, whole[0].trace_id, "stage"):
        parts = {span.name for span in found if span.parent_id == stage.span_id}
        assert {"compute", "send"} <= parts
