"""`stagemesh doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from stagemesh.client.cli import _options as shared
from stagemesh.client.cli._doctor_table import findings_view
from stagemesh.client.cli._tables import make_console
from stagemesh.client.doctor.echo_server import DEFAULT_PORT, EchoServer
from stagemesh.client.doctor.examine import examine
from stagemesh.client.doctor.finding import Level, worst
from stagemesh.client.doctor.versions import ROLES, guess_role
from stagemesh.wire.errors import ConfigError

_DEVICES = ("auto", "cpu", "cuda")


def command() -> Any:
    """The function to run."""
    return _doctor


def _doctor(
    peers: Annotated[
        str | None,
        typer.Option("--peers", metavar="HOST[:PORT],...", help="Nodes to reach that run doctor --serve."),
    ] = None,
    role: Annotated[
        str | None,
        typer.Option("--role", metavar=f"[{'|'.join(ROLES)}]", help="Unset: the most that is installed."),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            "--device", metavar=f"[{'|'.join(_DEVICES)}]", help="Of a stage; cuda: a GPU must be there."
        ),
    ] = "auto",
    listen: Annotated[
        str | None,
        typer.Option(
            "--listen", metavar="HOST:PORT,...", help="Addresses it will listen on; of --serve: its own."
        ),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option("--seconds", min=0, help="For the bandwidth to a peer, each way; 0: not measured."),
    ] = 1.0,
    serve: Annotated[bool, typer.Option("--serve", help="Be the peer of another node's doctor.")] = False,
    serve_seconds: Annotated[float, typer.Option("--for", min=0, help="Seconds to serve.")] = 600.0,
    insecure: Annotated[bool, typer.Option("--insecure", help="Serve beyond loopback.")] = False,
    as_json: shared.JsonOption = False,
) -> None:
    """Versions, GPUs, limits and ports of this node, and the way to its peers. Exits with 1 if something will fail."""
    if serve:
        _serve(listen or f"127.0.0.1:{DEFAULT_PORT}", serve_seconds, insecure)
        return
    findings = examine(
        _choice("--role", role or guess_role(), ROLES),
        listen=_items(listen),
        peers=_items(peers),
        device=_choice("--device", device, _DEVICES),
        seconds=seconds,
    )
    level = worst(findings)
    if as_json:
        print(
            json.dumps(
                {"level": level, "findings": [asdict(f) for f in findings]}, ensure_ascii=False, indent=2
            )
        )
    else:
        make_console().print(findings_view(findings))
    if level is Level.FAIL:
        raise typer.Exit(1)


def _serve(address: str, seconds: float, insecure: bool) -> None:
    with EchoServer(address, insecure=insecure) as server:
        print(f"answering on {server.address} for {seconds:g} s; Ctrl-C ends it", flush=True)
        try:
            server.wait(seconds)
        except KeyboardInterrupt:
            return


def _choice(flag: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ConfigError(f"{flag}: '{value}' is not one of {', '.join(choices)}")
    return value


def _items(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]
