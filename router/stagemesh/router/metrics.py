"""The router's instruments: where each number of RouterMetric comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version

from stagemesh.router.api.requests import Requests
from stagemesh.router.lane.lane import READY
from stagemesh.router.scheduler import Finish
from stagemesh.router.tracing.tracing import SERVICE_NAME
from stagemesh.wire.telemetry.metric_settings import MetricSettings
from stagemesh.wire.telemetry.metrics import Metrics, Values
from stagemesh.wire.telemetry.names import Attribute, RouterMetric
from stagemesh.wire.telemetry.resource import service_attributes

FINISHES = tuple(finish.value for finish in Finish if finish is not Finish.DEADLINE)
ERRORS = (
    "CANCELLED",
    "DEADLINE_EXCEEDED",
    "FAILED_PRECONDITION",
    "INTERNAL",
    "INVALID_ARGUMENT",
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
    "UNIMPLEMENTED",
)
"""Status codes that requests end with."""


class RouterMetrics:
    """Reads them off the router when it is scraped or a push is due.

    Args:
        requests: Of the router.
        listen: Its address.
        num_dropped: Spans lost so far.
        pushed: Where to push them; None: nowhere.
    """

    def __init__(
        self,
        requests: Requests,
        listen: str,
        num_dropped: Callable[[], int],
        pushed: MetricSettings | None = None,
    ) -> None:
        self._requests = requests
        self._metrics = Metrics(
            service_attributes(SERVICE_NAME, version=version("stagemesh"), instance=listen), pushed
        )
        lane = requests.lane
        stats, totals = lane.stats, lane.stats.totals
        for histogram in stats.histograms:
            self._metrics.add(histogram)
        observe, observe_one = self._metrics.observe, self._metrics.observe_one
        observe(RouterMetric.TOKENS, self._tokens)
        observe(RouterMetric.FINISHED, lambda: _labelled(stats.finished, Attribute.FINISH, FINISHES))
        observe(RouterMetric.ERRORS, lambda: _labelled(stats.failed, Attribute.ERROR_TYPE, ERRORS))
        observe_one(RouterMetric.RUNNING, lambda: lane.scheduler.num_running if lane.scheduler else 0)
        observe_one(RouterMetric.WAITING, lambda: lane.scheduler.num_waiting if lane.scheduler else 0)
        observe(RouterMetric.BLOCKS, self._blocks)
        observe_one(RouterMetric.CACHE_QUERIED, lambda: totals.prompt_tokens)
        observe_one(RouterMetric.CACHE_HIT, lambda: totals.cached_tokens)
        observe_one(RouterMetric.PREEMPTIONS, lambda: totals.preemptions)
        observe_one(RouterMetric.STEPS, lambda: lane.num_steps_ever)
        observe_one(RouterMetric.IN_FLIGHT, lambda: lane.scheduler.num_in_flight if lane.scheduler else 0)
        observe_one(RouterMetric.LANE_READY, lambda: int(not self.not_ready()))
        observe_one(RouterMetric.LANE_FORMED, lambda: lane.num_formed)
        observe(
            RouterMetric.STAGE_BUSY, lambda: _by_stage(stage.timings.busy_share() for stage in lane.stages)
        )
        observe(
            RouterMetric.STAGE_BUBBLE,
            lambda: _by_stage(lane.records.recent_bubble_share(stage.timings) for stage in lane.stages),
        )
        observe_one(RouterMetric.SPANS_DROPPED, num_dropped)

    def scrape(self) -> bytes:
        """In Prometheus' text format; called in a thread of the endpoint."""
        return self._metrics.scrape()

    def close(self) -> None:
        """Push what there is, within a bounded time."""
        self._metrics.close()

    def not_ready(self) -> str:
        """Why the router takes no requests now; empty when it does."""
        if self._requests.draining:
            return "draining"
        lane = self._requests.lane
        return "" if lane.state == READY else lane.reason or "forming"

    def _tokens(self) -> Values:
        yield self._requests.prompt_tokens, {Attribute.TOKEN_TYPE: "input"}
        yield self._requests.output_tokens, {Attribute.TOKEN_TYPE: "output"}

    def _blocks(self) -> Values:
        if scheduler := self._requests.lane.scheduler:
            free = scheduler.pool.num_free
            yield free, {Attribute.STATE: "free"}
            yield scheduler.limits.num_blocks - free, {Attribute.STATE: "used"}


def _labelled(counts: Mapping[str, int], key: str, known: Iterable[str]) -> Values:
    """Those known ahead are there from the start, at 0: a counter that begins with its first event shows no increase."""
    return [(count, {key: label}) for label, count in {**dict.fromkeys(known, 0), **counts}.items()]


def _by_stage(shares: Iterable[float]) -> Values:
    return [(share, {Attribute.STAGE: str(index)}) for index, share in enumerate(shares)]
