"""What the receiver's container got."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compose_commands import CommandError
from compose_engine import docker
from compose_project import Project

_TIMEOUT_S = 40.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenSpan:
    """One span."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    links: list[str]
    """Trace ids."""
    attributes: dict[str, Any]

    @property
    def stage(self) -> int | None:
        value = self.attributes.get("stagemesh.stage")
        return None if value is None else int(value)


def spans(mesh: Project) -> list[SeenSpan]:
    """All that came so far."""
    lines = docker("logs", mesh.container("receiver")).splitlines()
    return [SeenSpan(**json.loads(line)) for line in lines if line.startswith("{")]


def wait_for_spans(mesh: Project, enough: Callable[[list[SeenSpan]], bool], what: str) -> list[SeenSpan]:
    """All, once they are enough; CommandError with the names that came if they never are."""
    deadline = time.monotonic() + _TIMEOUT_S
    while not enough(found := spans(mesh)):
        if time.monotonic() > deadline:
            names = sorted({(span.service, span.name, str(span.stage)) for span in found})
            raise CommandError(f"no {what} within {_TIMEOUT_S:g} s; {len(found)} spans came: {names}")
        time.sleep(1.0)
    return found


def request_root(found: list[SeenSpan], request_id: str) -> SeenSpan | None:
    """The router's span of a request."""
    own = (span for span in found if span.service == "stagemesh-router")
    return next((span for span in own if span.attributes.get("gen_ai.response.id") == request_id), None)
