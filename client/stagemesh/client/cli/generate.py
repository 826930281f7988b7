"""`stagemesh generate`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from stagemesh.client import Client, InvalidArgumentError, TokenStream
from stagemesh.client._defaults import DEFAULT_ADDRESS, DEFAULT_ADMIN_ADDRESS, DEFAULT_TIMEOUT_S
from stagemesh.client.cli import _options as shared
from stagemesh.client.cli._interrupt import ctrl_c_calls
from stagemesh.client.cli._telemetry import client_tracing
from stagemesh.client.cli.trace import show_trace


def command() -> Any:
    """The function to run."""
    return _generate


def _generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The text to go on from; - reads standard input.")
    ] = None,
    token_ids: Annotated[
        str | None, typer.Option("--token-ids", metavar="ID,ID,...", help="Token ids instead of a text.")
    ] = None,
    max_tokens: shared.MaxTokensOption = None,
    temperature: shared.TemperatureOption = None,
    top_k: shared.TopKOption = None,
    top_p: shared.TopPOption = None,
    seed: shared.SeedOption = None,
    ignore_eos: shared.IgnoreEosOption = False,
    priority: Annotated[int | None, typer.Option("--priority", help="Higher goes first.")] = None,
    request_id: Annotated[
        str | None, typer.Option("--request-id", help="To abort or trace it by; unset: made up.")
    ] = None,
    address: shared.AddressOption = DEFAULT_ADDRESS,
    timeout: shared.TimeoutOption = DEFAULT_TIMEOUT_S,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON line for each chunk.")] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="Then show where the time went, stage by stage (see `trace`).")
    ] = False,
    admin: shared.AdminOption = DEFAULT_ADMIN_ADDRESS,
) -> None:
    """Ctrl-C cancels it."""
    options = shared.given_only(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        ignore_eos=ignore_eos,
        priority=priority,
        request_id=request_id,
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    ids = None if token_ids is None else _parse_ids(token_ids)
    with (
        client_tracing(always=trace),
        Client(address, timeout=timeout) as client,
        client.generate(text, token_ids=ids, **options) as stream,
        ctrl_c_calls(stream.close) as stopped,
    ):
        _print_json(stream) if as_json else _print_text(stream)
        if stopped.is_set():
            raise typer.Exit(130)
        if trace:
            show_trace(admin, stream.request_id, as_json)


def _print_text(stream: TokenStream) -> None:
    shown = False
    try:
        for chunk in stream:
            shown = shown or bool(chunk.text)
            print(chunk.text, end="", flush=True)
    finally:
        if shown:  # so that the prompt, or an error, has a line of its own
            print(flush=True)


def _print_json(stream: TokenStream) -> None:
    for chunk in stream:
        print(json.dumps(asdict(chunk), ensure_ascii=False), flush=True)


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise InvalidArgumentError(f"--token-ids: {error}", field="token_ids") from error
