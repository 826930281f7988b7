"""What can be said of compose/ without an engine; make compose-test starts it for real."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from stagemesh.wire.telemetry.names import RouterMetric, StageMetric, metrics_of

COMPOSE = Path(__file__).parents[2] / "compose"
FILES = sorted(COMPOSE.glob("*.yaml"))
DOCKERFILES = [COMPOSE / f"Dockerfile.{name}" for name in ("router", "stage", "client")]


def read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(file.read_text())
    return content


def requirements(*extras: str) -> list[str]:
    command = [sys.executable, str(COMPOSE / "requirements.py"), *extras]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [re.split(r"[<>=\[]", line)[0] for line in lines]


def test_router_and_client_install_no_torch() -> None:
    assert "torch" in requirements("stage")
    assert {"torch", "cupy-cuda13x"} <= set(requirements("cuda"))
    assert "grpcio" in requirements()
    assert "torch" not in requirements()
    assert "torch" not in requirements("router")


def test_an_unknown_extra_is_named() -> None:
    command = [sys.executable, str(COMPOSE / "requirements.py"), "nothing"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no extra 'nothing'" in done.stderr


def test_every_variable_is_in_the_example_and_no_other() -> None:
    """With its default: what the example says in a comment is what happens without it."""
    used: dict[str, set[str]] = {}
    for file in FILES:
        for name, operator, default in re.findall(r"\$\{(\w+)(:[-?])?([^}]*)\}", file.read_text()):
            used.setdefault(name, set()).update({default} if operator == ":-" and default else set())
    documented = dict(re.findall(r"^#?([A-Z][A-Z0-9_]+)=(.*)$", (COMPOSE / ".env.example").read_text(), re.M))
    assert set(used) == set(documented)
    assert {name: values for name, values in used.items() if values and values != {documented[name]}} == {}


def test_only_the_router_is_on_both_networks() -> None:
    services = read(COMPOSE / "compose.yaml")["services"]
    networks = {name: set(service["networks"]) for name, service in services.items()}
    for name in ("router", "client", "stage-0", "stage-1", "stage-2"):
        edge, mesh = name in ("router", "client"), name != "client"
        assert networks[name] == ({"edge"} if edge else set()) | ({"mesh"} if mesh else set())
    assert read(COMPOSE / "compose.yaml")["networks"]["mesh"] == {"internal": True}


def test_every_service_of_the_profile_is_shut_in() -> None:
    services = read(COMPOSE / "compose.yaml")["services"].values()
    screens = [service for service in services if service.get("profiles") == ["observability"]]
    assert len(screens) == 4
    for service in screens:
        assert int(service["user"].partition(":")[0]) > 0
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["restart"] == "unless-stopped"
        assert {"cpus", "mem_limit", "pids_limit"} <= service.keys()


def test_the_dockerfiles_share_their_first_stage() -> None:
    """Word for word, so that the engine builds it once."""
    heads = {
        file.read_text().partition("ARG BASE_IMAGE")[2].partition(" AS requirements")[0]
        for file in DOCKERFILES
    }
    assert len(heads) == 1


def test_the_dashboard_is_the_one_its_tool_makes() -> None:
    """`python tools/make_dashboard.py` writes it anew when a metric gets another name."""
    spec = importlib.util.spec_from_file_location(
        "make_dashboard", COMPOSE.parent / "tools/make_dashboard.py"
    )
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    sys.modules["make_dashboard"] = tool  # its dataclass looks itself up
    spec.loader.exec_module(tool)
    assert json.loads((COMPOSE / "observability/grafana/stagemesh.json").read_text()) == tool.dashboard()


def test_every_metric_is_on_the_dashboard_and_every_alert_names_one() -> None:
    names = {metric.prometheus for metric in (*metrics_of(RouterMetric), *metrics_of(StageMetric))}
    dashboard = (COMPOSE / "observability/grafana/stagemesh.json").read_text()
    assert {name for name in names if name not in dashboard} == set()
    rules = [
        rule for group in read(COMPOSE / "observability/alerts.yml")["groups"] for rule in group["rules"]
    ]
    histograms = {f"{name}_bucket" for name in names}
    for rule in rules:
        used = set(
            re.findall(r"\b(?:stagemesh|gen_ai)_\w+(?![\w\"=~])", re.sub(r"\{[^}]*\}", "", rule["expr"]))
        )
        assert used <= names | histograms, rule["alert"]
        assert used or "up{" in rule["expr"]


def test_every_file_that_a_service_mounts_is_there() -> None:
    """But the model, which `make model` brings."""
    for file in FILES:
        for name, service in read(file)["services"].items():
            for volume in service.get("volumes", []):
                source = volume.partition(":")[0]
                if source.startswith("."):
                    assert (COMPOSE / source).exists(), (file.name, name)
            if "extends" in service:
                base = service["extends"]
                assert base["service"] in read(COMPOSE / base.get("file", file.name))["services"], (
                    file.name,
                    name,
                )


def endpoint(address: str, seen_from: str) -> tuple[str, int]:
    """The service behind HOST:PORT, which must share a network with that one."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    services = read(COMPOSE / "compose.yaml")["services"]
    networks = {name: set(service["networks"]) for name, service in services.items()}
    aliases = {
        alias: name
        for name, service in services.items()
        if isinstance(service["networks"], dict)
        for network in service["networks"].values()
        for alias in network.get("aliases", [])
    }
    service = aliases.get(host, host)
    assert networks[service] & networks[seen_from], f"{seen_from} does not reach {service}"
    return service, int(port)


def test_the_screens_ask_where_something_answers() -> None:
    services, screens = read(COMPOSE / "compose.yaml")["services"], COMPOSE / "observability"
    told = {
        name: services[name]["environment"]["STAGEMESH_METRICS"]
        for name in ("router", "stage-0", "stage-1", "stage-2")
    }
    jobs = read(screens / "prometheus.yml")["scrape_configs"]
    asked = [target for job in jobs for one in job["static_configs"] for target in one["targets"]]
    assert {endpoint(target, "prometheus") for target in asked} == {
        (name, int(address.rpartition(":")[2])) for name, address in told.items()
    }
    ports = {"prometheus": 9090, "jaeger": 16686}
    sources = {one["uid"]: one for one in read(screens / "grafana/datasources.yaml")["datasources"]}
    for source in sources.values():
        assert endpoint(source["url"], "grafana") == (source["type"], ports[source["type"]])
    dashboard = json.loads((screens / "grafana/stagemesh.json").read_text())
    used = {panel["datasource"]["uid"] for panel in dashboard["panels"] if panel.get("datasource")}
    assert used <= sources.keys()
    folder = read(screens / "grafana/dashboards.yaml")["providers"][0]["options"]["path"]
    assert any(volume.split(":")[1].startswith(folder) for volume in services["grafana"]["volumes"])
    collector = read(screens / "collector.yaml")
    jaeger = collector["exporters"]["otlp/jaeger"]["endpoint"]
    assert endpoint(jaeger, "collector") == ("jaeger", 4317)
    for pipeline in collector["service"]["pipelines"].values():
        for part in ("receivers", "processors", "exporters"):
            assert set(pipeline[part]) <= collector[part].keys()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_reads_the_units(tmp_path: Path) -> None:
    for unit in (COMPOSE / "systemd").iterdir():
        copy = tmp_path / unit.name
        copy.write_text(unit.read_text().replace("/opt/stagemesh/bin/stagemesh", sys.executable))
        command = ["systemd-analyze", "verify", "--man=no", str(copy).replace("@.", "@1.")]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        complaints = [line for line in done.stderr.splitlines() if unit.name.partition("@")[0] in line]
        assert (done.returncode, complaints) == (0, [])
