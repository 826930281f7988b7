"""A router or a stage whose tracing is switched while it runs; benchmarks/tracing.py starts it.

    python benchmarks/tracing_switch.py FOLDER router|stage OPTIONS...

It is `stagemesh`, started with the OTEL_* variables of tracing, and with a Unix socket FOLDER/PID. A line there is a
command, answered by a line:

    ratio R     requests are sampled by R from now on; a ratio of 0 takes tracing out: router, streams and
                stage have None where its objects were, as they have where no receiver is named
    reported    answered when the stages have reported their last steps
    settle      every request that ended is worked out, as it would be after a second
    export      spans are exported, as they would be after five seconds

All are for moments without a request. Nothing else differs from the command, so that two turns of one process
differ by tracing alone, and not by two processes' luck with memory.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from stagemesh.client.cli import main as stagemesh
from stagemesh.router import serve as router
from stagemesh.router.api.requests import Requests
from stagemesh.router.api.streams import Streams
from stagemesh.router.tracing.tracing import RouterTracing
from stagemesh.stage import serve as stage
from stagemesh.stage import telemetry
from stagemesh.stage.leader.leader import StageLeader
from stagemesh.stage.leader.step_spans import StepSpans
from stagemesh.wire.telemetry.exporter import SpanExporter
from stagemesh.wire.telemetry.sampling import HeadSampler

REPORTED_S = 1.0
"""Stages have reported their last steps by then."""
POLL_S = 0.02


class RouterSwitch:
    """Tracing of a router without API workers."""

    def __init__(self) -> None:
        self.exporter: SpanExporter
        self.tracing: RouterTracing
        self.requests: Requests
        self.streams: Streams
        self.loop: asyncio.AbstractEventLoop
        switch = self

        class KeptRequests(Requests):
            def __init__(self, config: Any, model: Any, on_ready: Any, tracing: Any) -> None:
                super().__init__(config, model, on_ready, tracing)
                switch.requests, switch.tracing = self, tracing
                switch.exporter = tracing._exporter
                switch.loop = asyncio.get_running_loop()

        class KeptStreams(Streams):
            def __init__(self, model: Any, spans: Any = None) -> None:
                super().__init__(model, spans)
                switch.streams = self

        replace_names(router, Requests=KeptRequests, Streams=KeptStreams)

    def set_ratio(self, ratio: float) -> None:
        """In the event loop."""
        tracing = self.tracing if ratio else None
        self.requests.lane._spans = tracing.steps if tracing else None
        self.requests.history._tracing = tracing
        self.streams.spans = tracing.server if tracing else None
        self.tracing.server._sampler = HeadSampler(replace(self.exporter.settings, ratio=ratio))

    def is_reported(self) -> bool:
        """In the event loop."""
        lane = self.requests.lane
        return all(stage.timings.has(lane.num_steps) for stage in lane.stages)

    def settle(self) -> None:
        """In the event loop."""
        history = self.requests.history
        while history._unsettled:
            history._settle(history._unsettled.popleft()[1])


class StageSwitch:
    """Tracing of a stage."""

    def __init__(self) -> None:
        self.exporter: SpanExporter
        self.leader: StageLeader
        self.spans: StepSpans
        self.loop: asyncio.AbstractEventLoop
        switch = self

        class KeptLeader(StageLeader):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                assert self._spans is not None
                switch.leader, switch.spans = self, self._spans
                switch.loop = asyncio.get_running_loop()

        def start_exporter(config: Any) -> SpanExporter | None:
            exporter = telemetry.start_exporter(config)
            assert exporter is not None, "OTEL_EXPORTER_OTLP_ENDPOINT is not set"
            self.exporter = exporter
            return exporter

        replace_names(stage, StageLeader=KeptLeader, start_exporter=start_exporter)

    def set_ratio(self, ratio: float) -> None:
        """In the event loop."""
        self.leader._spans = self.spans if ratio else None

    def is_reported(self) -> bool:
        """The router knows."""
        return True

    def settle(self) -> None:
        """A stage has nothing to work out."""


def serve(switch: RouterSwitch | StageSwitch, path: Path) -> None:
    """Answer commands for as long as the process lives."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        connection, _ = listener.accept()
    with connection, connection.makefile("rw") as lines:
        for line in lines:
            command, _, argument = line.strip().partition(" ")
            if command == "ratio":
                in_loop(switch, lambda ratio=float(argument): switch.set_ratio(ratio))  # type: ignore[misc]
            elif command == "reported":
                deadline = time.monotonic() + REPORTED_S
                while not in_loop(switch, switch.is_reported) and time.monotonic() < deadline:
                    time.sleep(POLL_S)
            elif command == "settle":
                in_loop(switch, switch.settle)
            else:
                switch.exporter.flush()
            lines.write("done\n")
            lines.flush()


def replace_names(module: object, **values: object) -> None:
    """What a module finds under these names from now on."""
    for name, value in values.items():
        setattr(module, name, value)


def in_loop(switch: RouterSwitch | StageSwitch, call: Callable[[], Any]) -> Any:
    """Its answer, from the event loop of the process."""

    async def run() -> Any:
        return call()

    return asyncio.run_coroutine_threadsafe(run(), switch.loop).result()


def main() -> None:
    """The command below `stagemesh`, with the socket."""
    folder, command = sys.argv[1:3]
    switch = RouterSwitch() if command == "router" else StageSwitch()
    thread = threading.Thread(target=serve, args=(switch, Path(folder) / str(os.getpid())), daemon=True)
    thread.start()
    sys.argv[0:2] = ["stagemesh"]
    stagemesh()


if __name__ == "__main__":
    main()
