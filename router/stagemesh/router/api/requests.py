"""Every live request of the router, between the public sides above and the lane below."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from stagemesh.router.api.backend import End, Outlet
from stagemesh.router.api.history import RequestHistory
from stagemesh.router.api.live_request import LiveRequest, SlotTable
from stagemesh.router.api.served_model import ServedModel
from stagemesh.router.config import RouterConfig
from stagemesh.router.lane.lane import Lane, LaneEvents
from stagemesh.router.scheduler import Finish, Request, StepDeltas
from stagemesh.router.scheduler.sequence import Sequence
from stagemesh.router.tracing.tracing import RouterTracing
from stagemesh.wire.errors import DeadlineExceededError, StagemeshError, UnavailableError

log = logging.getLogger(__name__)


NO_ENDS: list[End] = []


class Requests:
    """Starts and ends requests on the lane, counts them, and hands each public side what is for it.

    Args:
        config: Of the router.
        model: It serves.
        on_ready: Called when the mesh can, or can no longer, take requests.
        tracing: None where it is off.
    """

    def __init__(
        self,
        config: RouterConfig,
        model: ServedModel,
        on_ready: Callable[[bool], None],
        tracing: RouterTracing | None = None,
    ) -> None:
        self.model = model
        self.lane = Lane(
            config,
            model.fingerprint,
            model.max_context,
            LaneEvents(
                on_deltas=self._take_deltas,
                on_admitted=self._take_admitted,
                on_lost=self._take_lost,
                on_ready=on_ready,
                on_forget=lambda: self.history.settle_all(),
            ),
            tracing.steps if tracing else None,
        )
        self.history = RequestHistory(self.lane.stages, self.lane.records, tracing)
        self.draining = False
        self.num_finished = 0
        self.num_failed = 0
        self.prompt_tokens = 0
        self.output_tokens = 0
        self._closed: StagemeshError | None = None
        """Set for good when the router stops."""
        self._live: dict[str, LiveRequest] = {}
        self._ports: list[Port | None] = []
        self._by_slot = SlotTable()

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    def connect(self, outlet: Outlet) -> Port:
        """A public side; it may submit through the port from now on, until it closes it."""
        index = next((i for i, port in enumerate(self._ports) if port is None), len(self._ports))
        port = Port(self, index, outlet)
        self._ports[index : index + 1] = [port]
        return port

    def disconnect(self, port: Port) -> None:
        """That side is gone: its requests are aborted."""
        if self._ports[port.index] is port:
            self._ports[port.index] = None
        for live in list(port.live.values()):
            error = UnavailableError("the API worker of the request ended", reason="WORKER_LOST")
            self.count_failure(error.code.name)
            self._end(live, error=error)
            self.lane.abort(live.request.request_id)

    def submit(self, live: LiveRequest) -> None:
        """Hand a request to the lane.

        Raises:
            StagemeshError: It is refused.
        """
        if self.draining:
            raise UnavailableError("the router is draining and takes no new requests", reason="DRAINING")
        request = live.request
        if self._closed:
            raise self._closed.of_request(request.request_id)
        self.lane.submit(request)
        self._live[request.request_id] = live
        live.port.live[live.handle] = live
        self.prompt_tokens += len(request.prompt)
        scheduler = self.lane.scheduler
        live.sequence = scheduler.sequence(request.request_id) if scheduler else None
        self.history.add(live)

    def count_failure(self, code: str) -> None:
        """A request was refused or failed, with that gRPC status code."""
        self.num_failed += 1
        self.lane.stats.failed[code] += 1

    def abort(self, request_id: str) -> bool:
        """End a request with finish reason ABORT; False if it is not live."""
        return self.lane.abort(request_id)

    async def drain(self, timeout_s: float | None) -> int:
        """Take no more requests and wait for those that run; returns how many are left at the timeout."""
        self.draining = True
        deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        while self._live and (deadline is None or asyncio.get_running_loop().time() < deadline):
            await asyncio.sleep(0.05)
        return len(self._live)

    def close(self, error: StagemeshError) -> None:
        """End every live request with an error, and refuse with it those that are still on their way here."""
        self._closed = error
        for live in list(self._live.values()):
            self._take_lost(live.request, error)

    def _take_admitted(self, sequence: Sequence) -> None:
        live = self._live.get(sequence.request.request_id)
        if live is None:
            return
        table, slot = self._by_slot, sequence.slot
        table.make_room(slot)
        table.handles[slot], table.ports[slot] = live.handle, live.port.index
        table.awaits_first[slot] = not live.first_token
        if not live.admitted:
            live.admitted = time.monotonic()
            live.num_cached = sequence.num_cached

    def _take_deltas(self, deltas: StepDeltas) -> None:
        """The per-token path: nothing here is done for each token but by numpy."""
        table, slots = self._by_slot, deltas.slots
        if np.count_nonzero(table.awaits_first[slots]):
            self._take_first_tokens(deltas)
        self.output_tokens += len(slots)
        ends = self._take_ends(deltas.ends)
        handles = table.handles[slots]
        if len(self._ports) == 1 and (only := self._ports[0]):
            only.outlet.take(handles, deltas.token_ids, ends.get(0, NO_ENDS))
            return
        ports = table.ports[slots]
        for port in self._ports:
            if port is None:
                continue
            mine = ports == port.index
            count, ended = np.count_nonzero(mine), ends.get(port.index, NO_ENDS)
            if count == len(slots) and count:
                port.outlet.take(handles, deltas.token_ids, ended)
            elif count or ended:
                port.outlet.take(handles[mine], deltas.token_ids[mine], ended)

    def _take_first_tokens(self, deltas: StepDeltas) -> None:
        now, table = time.monotonic(), self._by_slot
        first = table.awaits_first[deltas.slots]
        table.awaits_first[deltas.slots] = False
        for sequence in deltas.sequences[first]:
            if live := self._live.get(sequence.request.request_id):
                live.first_token = now

    def _take_ends(self, ends: Iterable[tuple[Sequence, Finish]]) -> dict[int, list[End]]:
        """Count those that ended; returns the ends that are told with the tokens, by port."""
        by_port: dict[int, list[End]] = {}
        for sequence, finish in ends:
            live = self._live.get(sequence.request.request_id)
            if live is None or live.sequence is not sequence:
                continue
            if finish is Finish.DEADLINE:
                error = DeadlineExceededError("the deadline passed before the answer was whole")
                self._take_lost(sequence.request, error)
                continue
            self.num_finished += 1
            by_port.setdefault(live.port.index, []).append(End(live.handle, finish, live.num_cached))
            self._end(live, finish=finish)
        return by_port

    def _take_lost(self, request: Request, error: StagemeshError) -> None:
        live = self._live.get(request.request_id)
        if live is None:
            return
        self.count_failure(error.code.name)
        self._end(live, error=error.of_request(request.request_id))
        if self._ports[live.port.index] is live.port and live.error:
            live.port.outlet.fail(live.handle, live.error)

    def _end(
        self, live: LiveRequest, *, finish: Finish | None = None, error: StagemeshError | None = None
    ) -> None:
        live.finish, live.error = finish, error
        live.ended = time.monotonic()
        request_id = live.request.request_id
        del self._live[request_id]
        live.port.live.pop(live.handle, None)
        self.history.end(live)


class Port:
    """The Backend of one public side."""

    def __init__(self, requests: Requests, index: int, outlet: Outlet) -> None:
        self.index = index
        self.outlet = outlet
        self.live: dict[int, LiveRequest] = {}
        """By handle."""
        self._requests = requests

    def submit(self, handle: int, request: Request, arrived: float) -> None:
        """Start a request; a refusal goes to the outlet."""
        request = replace(request, arrived=arrived)
        live = LiveRequest(request=request, arrived=arrived, port=self, handle=handle)
        try:
            self._requests.submit(live)
        except StagemeshError as error:
            error.request_id = error.request_id or request.request_id
            self._requests.count_failure(error.code.name)
            self.outlet.fail(handle, error)

    def abandon(self, handle: int) -> None:
        """Nobody reads it any more. Once it has ended, its id may belong to another request."""
        if live := self.live.get(handle):
            self._requests.abort(live.request.request_id)

    def refused(self, code: str) -> None:
        """Counts as failed."""
        self._requests.count_failure(code)

    async def abort(self, request_id: str) -> bool:
        """End a request, whoever made it."""
        return self._requests.abort(request_id)
