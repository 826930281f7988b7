"""The metrics of the mesh, scraped by a real Prometheus: the shipped service with its shipped configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_commands import CommandError, run
from compose_mesh import SERVICES
from compose_packages import find
from compose_parts import part
from compose_project import FOLDER, Project
from compose_prometheus import Prometheus, prometheus
from compose_questions import ask

from stagemesh.wire.telemetry.names import RouterMetric, StageMetric, metrics_of

pytestmark = pytest.mark.compose

STAGES = range(3)
QUESTION = (
    "A long beginning, so that its keys and values fill more than a block and the next one that begins "
    "alike finds them in the prefix cache. The three largest cities of France are"
)
R, S = RouterMetric, StageMetric
GROWS_WITH_REQUESTS = (
    *(
        f"{metric.prometheus}_count"
        for metric in (R.TTFT, R.TIME_PER_TOKEN, R.DURATION, R.INTER_TOKEN, R.QUEUE)
    ),
    *(
        f"{metric.prometheus}_sum"
        for metric in (R.TTFT, R.TIME_PER_TOKEN, R.DURATION, R.INTER_TOKEN, R.QUEUE)
    ),
    f'{R.TOKENS.prometheus}{{gen_ai_token_type="input"}}',
    f'{R.TOKENS.prometheus}{{gen_ai_token_type="output"}}',
    f"sum({R.FINISHED.prometheus})",
    R.STEPS.prometheus,
    R.CACHE_QUERIED.prometheus,
    *(
        expression.replace("STAGE", str(stage))
        for stage in STAGES
        for expression in (
            f'sum({S.STEP.prometheus}_count{{stagemesh_stage="STAGE",stagemesh_part="compute"}})',
            f'sum({S.STEP.prometheus}_sum{{stagemesh_stage="STAGE",stagemesh_part="compute"}})',
            f'sum({S.STEP.prometheus}_sum{{stagemesh_stage="STAGE",stagemesh_part="wait_for_upstream"}})',
            f'sum({S.TOKENS.prometheus}{{stagemesh_stage="STAGE"}})',
            f'sum({S.LINK_BYTES.prometheus}{{stagemesh_stage="STAGE"}})',
            f'sum({S.LINK_TIME.prometheus}_count{{stagemesh_stage="STAGE"}})',
        )
    ),
)
ABOVE_ZERO = (
    R.LANE_READY.prometheus,
    R.LANE_FORMED.prometheus,
    f'{R.BLOCKS.prometheus}{{stagemesh_state="free"}}',
    *(
        f'{metric.prometheus}{{stagemesh_stage="{stage}"}}'
        for stage in STAGES
        for metric in (R.STAGE_BUSY, S.READY, S.STARTS, S.LANES, S.BLOCKS)
    ),
)


@pytest.fixture(scope="module")
def scraper(mesh: Project) -> Iterator[Prometheus]:
    with prometheus(mesh) as running:
        yield running


def test_promtool_passes_configuration_and_rules(docker_engine: str) -> None:
    for kind, file in (("config", "prometheus.yml"), ("rules", "alerts.yml")):
        output = run(
            [find("promtool") or "promtool", "check", kind, FOLDER / "observability" / file], timeout_s=30
        )
        assert "SUCCESS" in output.stdout


def test_every_alert_fires_on_what_it_is_for_and_on_nothing_else(docker_engine: str) -> None:
    output = run(
        [find("promtool") or "promtool", "test", "rules", Path(__file__).with_name("alerts_test.yml")],
        timeout_s=60,
    )
    assert "SUCCESS" in output.stdout


def test_every_target_is_up(scraper: Prometheus) -> None:
    scraper.wait("sum(up)", lambda value: value == len(SERVICES))
    assert scraper.value('count(up{job="stagemesh-stage"})') == len(STAGES)


def test_every_number_moves_with_every_request(mesh: Project, scraper: Prometheus) -> None:
    """None is missing, zero, or the same after two requests."""
    ask(mesh, "metrics-1", QUESTION)
    first = {name: scraper.wait(name, lambda value: value > 0) for name in GROWS_WITH_REQUESTS}
    hits = scraper.value(R.CACHE_HIT.prometheus)
    ask(mesh, "metrics-2", QUESTION)
    for name, before in first.items():
        scraper.wait(name, lambda value, before=before: value > before)
    assert hits is not None
    scraper.wait(R.CACHE_HIT.prometheus, lambda value: value > hits)
    for name in ABOVE_ZERO:
        # A stage's busy share is that of ten seconds, which may be over by now.
        scraper.wait(f"max_over_time({name}[2m])", lambda value: value > 0)


def test_every_metric_of_dashboard_and_alerts_is_scraped(mesh: Project, scraper: Prometheus) -> None:
    """Those too that only trouble brings: a refused request, a killed worker and the lane it takes down."""
    with pytest.raises(CommandError, match="max_tokens"):
        ask(mesh, "refused", num_tokens=1 << 20)
    scraper.wait(f'{R.ERRORS.prometheus}{{error_type="INVALID_ARGUMENT"}}', lambda value: value > 0)
    with part("stage-2: a worker killed"):
        starts = f'{S.STARTS.prometheus}{{stagemesh_stage="2"}}'
        before = scraper.wait(starts, lambda value: value > 0)
        status = json.loads(mesh.compose("exec", "-T", "router", "stagemesh", "status", "--json"))
        [rank] = status["lanes"][0]["stages"][2]["description"]["ranks"]
        mesh.python("stage-2", "import os, sys; os.kill(int(sys.argv[1]), 9)", str(rank["process_id"]))
        scraper.wait(starts, lambda value: value > before, timeout_s=60)
        scraper.wait(f"sum({S.LANE_ERRORS.prometheus})", lambda value: value > 0)
        scraper.wait(R.LANE_READY.prometheus, lambda value: value == 1, timeout_s=60)
    ask(mesh, "after-kill")
    wanted = names_in((FOLDER / "observability/grafana/stagemesh.json").read_text())
    wanted |= names_in((FOLDER / "observability/alerts.yml").read_text())
    every = {metric.prometheus for metric in (*metrics_of(RouterMetric), *metrics_of(StageMetric))}
    assert len(wanted) >= len(every)
    assert wanted - scraper.names() == set()


def test_every_query_of_the_dashboard_has_a_result(scraper: Prometheus) -> None:
    """After load, and after the trouble of the test before: an empty panel would be a mistake of ours."""
    panels: list[dict[str, Any]] = json.loads((FOLDER / "observability/grafana/stagemesh.json").read_text())[
        "panels"
    ]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    assert len(queries) > 30
    assert [query for query in queries if not scraper.values(query.replace("$__rate_interval", "5m"))] == []


def test_every_alert_compares_something_that_is_there(scraper: Prometheus) -> None:
    """One side of its comparison at least: the other may count what has not gone wrong here."""
    groups = yaml.safe_load((FOLDER / "observability/alerts.yml").read_text())["groups"]
    sides = {
        rule["alert"]: re.split(r"\s+(?:==|>)\s+", rule["expr"])
        for group in groups
        for rule in group["rules"]
    }
    numbers = re.compile(r"[\d.]+")
    for alert, expressions in sides.items():
        assert len(expressions) == 2, alert
        assert any(scraper.values(side) for side in expressions if not numbers.fullmatch(side)), alert


def names_in(text: str) -> set[str]:
    """Metrics named in a dashboard or in rules: what is asked of a name, not the labels."""
    labels = {"stagemesh_stage", "stagemesh_phase", "stagemesh_part", "stagemesh_link", "stagemesh_transport"}
    labels |= {"stagemesh_state", "stagemesh_finish_reason", "gen_ai_token_type"}
    return set(re.findall(r"\b(?:stagemesh|gen_ai)_\w+|\bup(?=\{)", text)) - labels
