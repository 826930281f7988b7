"""`stagemesh trace`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from google.protobuf import json_format

from stagemesh.client._defaults import DEFAULT_ADMIN_ADDRESS
from stagemesh.client.cli import _options as shared
from stagemesh.client.cli._admin import Admin
from stagemesh.client.cli._tables import make_console
from stagemesh.client.cli._trace_view import trace_view


def command() -> Any:
    """The function to run."""
    return _trace


def _trace(
    request_id: Annotated[str, typer.Argument(help="Of one of the last 1,000 requests.")],
    admin: shared.AdminOption = DEFAULT_ADMIN_ADDRESS,
    as_json: shared.JsonOption = False,
) -> None:
    """Milliseconds are sums over the steps the request took part in; prefill and decode apart. Where two of them are on
    a stage at once, one in its queue, they are more than the request took. A step of p50 and p99 is receive, compute and
    send; transfer is receive and send; bubble, the part of the time with a step in flight in which the stage had
    nothing to do."""
    show_trace(admin, request_id, as_json)


def show_trace(admin: str, request_id: str, as_json: bool) -> None:
    """Print where a request's time went."""
    with Admin(admin) as router:
        trace = router.trace(request_id)
    if as_json:
        values = json_format.MessageToDict(
            trace, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        print(json.dumps(values, ensure_ascii=False, indent=2))
    else:
        make_console().print(trace_view(trace))
