"""Write the Grafana dashboard of compose/, with the metrics' names as the code has them.

    python tools/make_dashboard.py      # writes compose/observability/grafana/stagemesh.json

A test holds the file equal to what this makes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagemesh.wire.telemetry.names import Attribute, Metric, RouterMetric, StageMetric

TARGET = Path(__file__).parents[1] / "compose/observability/grafana/stagemesh.json"
SOURCE = {"type": "prometheus", "uid": "prometheus"}
COLUMNS = 24
RANGE = "[$__rate_interval]"
BY_STAGE = Attribute.STAGE.replace(".", "_")
BY_PHASE = Attribute.PHASE.replace(".", "_")
BY_PART = Attribute.PART.replace(".", "_")
BY_LINK = Attribute.LINK.replace(".", "_")
BY_TRANSPORT = Attribute.TRANSPORT.replace(".", "_")
BY_STATE = Attribute.STATE.replace(".", "_")
BY_ERROR = Attribute.ERROR_TYPE.replace(".", "_")
BY_FINISH = Attribute.FINISH.replace(".", "_")
BY_TOKENS = Attribute.TOKEN_TYPE.replace(".", "_")


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One picture: a title, what it asks Prometheus, and the unit of the answers."""

    title: str
    queries: Sequence[tuple[str, str]]
    """(expression, legend)."""
    unit: str = "short"
    width: int = 8
    kind: str = "timeseries"
    description: str = ""
    stacked: bool = False


def _by(labels: Sequence[str]) -> str:
    return f" by ({', '.join(labels)})" if labels else ""


def _where(matcher: str) -> str:
    return f"{{{matcher}}}" if matcher else ""


def rate(metric: Metric, *by: str, where: str = "") -> str:
    """Per second, summed over everything but `by`."""
    return f"sum{_by(by)} (rate({metric.prometheus}{_where(where)}{RANGE}))"


def now(metric: Metric, *by: str) -> str:
    """The value, summed over everything but `by`."""
    return f"sum{_by(by)} ({metric.prometheus})"


def quantile(share: float, metric: Metric, *by: str, where: str = "") -> str:
    """Of a histogram."""
    buckets = f"rate({metric.prometheus}_bucket{_where(where)}{RANGE})"
    return f"histogram_quantile({share}, sum{_by(('le', *by))} ({buckets}))"


def quantiles(metric: Metric) -> list[tuple[str, str]]:
    """p50, p90 and p99."""
    return [(quantile(share, metric), f"p{share * 100:g}") for share in (0.5, 0.9, 0.99)]


def sum_rate(metric: Metric, *by: str, where: str = "") -> str:
    """Seconds a second that a histogram of times adds up."""
    return f"sum{_by(by)} (rate({metric.prometheus}_sum{_where(where)}{RANGE}))"


R, S = RouterMetric, StageMetric
COMPUTE = f'{BY_PART}="compute"'
ROWS: Sequence[tuple[str, Sequence[Panel]]] = (
    (
        "Now",
        (
            Panel(title="Lane ready", queries=[(now(R.LANE_READY), "")], width=3, kind="stat"),
            Panel(title="Running", queries=[(now(R.RUNNING), "")], width=3, kind="stat"),
            Panel(title="Waiting", queries=[(now(R.WAITING), "")], width=3, kind="stat"),
            Panel(
                title="Tokens out a second",
                queries=[(rate(R.TOKENS, where=f'{BY_TOKENS}="output"'), "")],
                width=3,
                kind="stat",
            ),
            Panel(
                title="First token, p99",
                queries=[(quantile(0.99, R.TTFT), "")],
                unit="s",
                width=4,
                kind="stat",
            ),
            Panel(
                title="Inter-token, p99",
                queries=[(quantile(0.99, R.INTER_TOKEN), "")],
                unit="s",
                width=4,
                kind="stat",
            ),
            Panel(title="Failed a second", queries=[(rate(R.ERRORS), "")], width=4, kind="stat"),
        ),
    ),
    (
        "What clients see",
        (
            Panel(title="Time to first token", queries=quantiles(R.TTFT), unit="s"),
            Panel(title="Inter-token time", queries=quantiles(R.INTER_TOKEN), unit="s"),
            Panel(
                title="Time per output token, mean of a request",
                queries=quantiles(R.TIME_PER_TOKEN),
                unit="s",
            ),
            Panel(title="Queue time", queries=quantiles(R.QUEUE), unit="s"),
            Panel(title="Request duration", queries=quantiles(R.DURATION), unit="s"),
            Panel(
                title="Requests a second",
                queries=[
                    (rate(R.FINISHED, BY_FINISH), f"{{{{{BY_FINISH}}}}}"),
                    (rate(R.ERRORS, BY_ERROR), f"failed: {{{{{BY_ERROR}}}}}"),
                ],
                unit="reqps",
            ),
        ),
    ),
    (
        "Load and memory",
        (
            Panel(title="Tokens a second", queries=[(rate(R.TOKENS, BY_TOKENS), f"{{{{{BY_TOKENS}}}}}")]),
            Panel(title="Requests", queries=[(now(R.RUNNING), "running"), (now(R.WAITING), "waiting")]),
            Panel(
                title="KV blocks of the lane",
                queries=[(now(R.BLOCKS, BY_STATE), f"{{{{{BY_STATE}}}}}")],
                stacked=True,
            ),
            Panel(
                title="Prefix cache, share of prompt tokens found",
                queries=[(f"{rate(R.CACHE_HIT)} / {rate(R.CACHE_QUERIED)}", "hit rate")],
                unit="percentunit",
            ),
            Panel(title="Preemptions a second", queries=[(rate(R.PREEMPTIONS), "preemptions")]),
            Panel(title="Steps", queries=[(rate(R.STEPS), "a second"), (now(R.IN_FLIGHT), "in flight")]),
        ),
    ),
    (
        "Stages: where the time of a step goes",
        (
            Panel(
                title="Compute time of a step, p50 and p99",
                queries=[
                    (
                        quantile(0.5, S.STEP, BY_STAGE, BY_PHASE, where=COMPUTE),
                        f"stage {{{{{BY_STAGE}}}}} {{{{{BY_PHASE}}}}} p50",
                    ),
                    (
                        quantile(0.99, S.STEP, BY_STAGE, BY_PHASE, where=COMPUTE),
                        f"stage {{{{{BY_STAGE}}}}} {{{{{BY_PHASE}}}}} p99",
                    ),
                ],
                unit="s",
                description="By phase. The stage with the longest decode is the lane's bottleneck.",
            ),
            Panel(
                title="Parts of the steps, seconds a second",
                queries=[
                    (sum_rate(S.STEP, BY_STAGE, BY_PART), f"stage {{{{{BY_STAGE}}}}} {{{{{BY_PART}}}}}")
                ],
                unit="s",
                stacked=True,
            ),
            Panel(
                title="Busy, and bubble",
                queries=[
                    (now(R.STAGE_BUSY, BY_STAGE), f"stage {{{{{BY_STAGE}}}}} busy"),
                    (now(R.STAGE_BUBBLE, BY_STAGE), f"stage {{{{{BY_STAGE}}}}} bubble"),
                ],
                unit="percentunit",
                description="Bubble: of the time with a step in flight, the part in which a stage had nothing to do.",
            ),
            Panel(
                title="Positions computed a second",
                queries=[
                    (rate(S.TOKENS, BY_STAGE, BY_PHASE), f"stage {{{{{BY_STAGE}}}}} {{{{{BY_PHASE}}}}}")
                ],
            ),
            Panel(
                title="Link bytes a second",
                queries=[
                    (
                        rate(S.LINK_BYTES, BY_STAGE, BY_LINK, BY_TRANSPORT),
                        f"stage {{{{{BY_STAGE}}}}} {{{{{BY_LINK}}}}} {{{{{BY_TRANSPORT}}}}}",
                    )
                ],
                unit="Bps",
            ),
            Panel(
                title="Link time, p99",
                queries=[
                    (
                        quantile(0.99, S.LINK_TIME, BY_STAGE, BY_LINK, BY_TRANSPORT),
                        f"stage {{{{{BY_STAGE}}}}} {{{{{BY_LINK}}}}} {{{{{BY_TRANSPORT}}}}}",
                    )
                ],
                unit="s",
            ),
        ),
    ),
    (
        "Health",
        (
            Panel(
                title="Ready",
                queries=[(now(R.LANE_READY), "lane"), (now(S.READY, BY_STAGE), f"stage {{{{{BY_STAGE}}}}}")],
            ),
            Panel(
                title="Starts and formations",
                queries=[
                    (now(R.LANE_FORMED), "lane formed"),
                    (now(S.STARTS, BY_STAGE), f"stage {{{{{BY_STAGE}}}}} workers started"),
                    (now(S.LANES, BY_STAGE), f"stage {{{{{BY_STAGE}}}}} lanes opened"),
                ],
            ),
            Panel(
                title="Lanes that failed, a second",
                queries=[
                    (rate(S.LANE_ERRORS, BY_STAGE, BY_ERROR), f"stage {{{{{BY_STAGE}}}}} {{{{{BY_ERROR}}}}}")
                ],
            ),
            Panel(
                title="KV blocks a stage has room for",
                queries=[(now(S.BLOCKS, BY_STAGE), f"stage {{{{{BY_STAGE}}}}}")],
                description="The lane has as many as its poorest stage.",
            ),
            Panel(
                title="Spans dropped a second", queries=[(rate(R.SPANS_DROPPED, "instance"), "{{instance}}")]
            ),
        ),
    ),
)


def dashboard() -> dict[str, Any]:
    """The whole, as Grafana reads it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS:
        panels.append(_row(title, len(panels) + 1, top))
        top += 1
        left = height = 0
        for panel in row:
            if left + panel.width > COLUMNS:
                left, top = 0, top + height
            height = 4 if panel.kind == "stat" else 8
            place = {"x": left, "y": top, "w": panel.width, "h": height}
            panels.append(_panel(panel, len(panels) + 1, place))
            left += panel.width
        top += height
    return {
        "uid": "stagemesh",
        "title": "stagemesh",
        "tags": ["stagemesh"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": []},
        "annotations": {"list": []},
        "panels": panels,
    }


def main() -> None:
    """Write it."""
    TARGET.write_text(json.dumps(dashboard(), indent=1) + "\n")


def _row(title: str, number: int, top: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": "row",
        "title": title,
        "collapsed": False,
        "gridPos": {"x": 0, "y": top, "w": COLUMNS, "h": 1},
        "panels": [],
    }


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    custom = {"stacking": {"mode": "normal"}, "fillOpacity": 20} if panel.stacked else {}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": custom}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}}
        if panel.kind == "timeseries"
        else {"reduceOptions": {"calcs": ["lastNotNull"]}},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
            for index, (expression, legend) in enumerate(panel.queries)
        ],
    }


if __name__ == "__main__":
    main()
