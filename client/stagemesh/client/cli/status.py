"""`stagemesh status`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from google.protobuf import json_format

from stagemesh.client._defaults import DEFAULT_ADMIN_ADDRESS
from stagemesh.client.cli import _options as shared
from stagemesh.client.cli._admin import Admin
from stagemesh.client.cli._tables import make_console, mesh_view
from stagemesh.v1 import admin_pb2 as pb


def command() -> Any:
    """The function to run."""
    return _status


def _status(
    admin: shared.AdminOption = DEFAULT_ADMIN_ADDRESS,
    watch: Annotated[bool, typer.Option("--watch", help="Go on, until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option("--interval", min=0.05, help="Seconds between two looks.")] = 1.0,
    as_json: shared.JsonOption = False,
) -> None:
    """Layers, ranks with heads/KV heads, device, KV blocks, link and state of each stage."""
    with Admin(admin) as router:
        if watch:
            _watch(router, int(interval * 1000), as_json)
        else:
            _show(router.status(), as_json)


def _watch(router: Admin, interval_ms: int, as_json: bool) -> None:
    console = make_console()
    if as_json or not console.is_terminal:
        for status in router.watch(interval_ms):
            _show(status, as_json, one_line=True)
        return
    from rich.live import Live

    with Live(console=console, auto_refresh=False) as live:
        for status in router.watch(interval_ms):
            live.update(mesh_view(status), refresh=True)


def _show(status: pb.MeshStatus, as_json: bool, one_line: bool = False) -> None:
    if as_json:
        values = json_format.MessageToDict(
            status, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        print(json.dumps(values, ensure_ascii=False, indent=None if one_line else 2), flush=True)
    else:
        make_console().print(mesh_view(status))
