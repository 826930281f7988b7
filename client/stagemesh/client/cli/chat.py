"""`stagemesh chat`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from stagemesh.client import Client, Message, StagemeshError
from stagemesh.client._defaults import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S
from stagemesh.client.cli import _options as shared
from stagemesh.client.cli._interrupt import ctrl_c_calls

_EXIT = "/exit"


def command() -> Any:
    """The function to run."""
    return _chat


def _chat(
    system: Annotated[str | None, typer.Option("--system", help="Instructions that come first.")] = None,
    max_tokens: shared.MaxTokensOption = None,
    temperature: shared.TemperatureOption = None,
    top_k: shared.TopKOption = None,
    top_p: shared.TopPOption = None,
    seed: shared.SeedOption = None,
    address: shared.AddressOption = DEFAULT_ADDRESS,
    timeout: shared.TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """A line is a message. Ctrl-C stops an answer; /exit or the end of input leaves."""
    options = shared.given_only(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    with Client(address, timeout=timeout) as client:
        if sys.stdin.isatty():
            print(f"model {client.model().name} at {address}; Ctrl-C stops an answer, {_EXIT} leaves")
        while (line := _read_line()) is not None:
            if line.strip():
                _turn(client, messages, line, options)


def _turn(client: Client, messages: list[Message], line: str, options: Any) -> None:
    """Ask and print. A stopped answer stays in the conversation as far as it came; a refused message goes."""
    messages.append({"role": "user", "content": line})
    parts: list[str] = []
    with client.chat(messages, **options) as stream, ctrl_c_calls(stream.close) as stopped:
        try:
            for chunk in stream:
                parts.append(chunk.text)
                print(chunk.text, end="", flush=True)
            print(" [stopped]" if stopped.is_set() else "", flush=True)
        except StagemeshError as error:
            messages.pop()
            if parts:  # so that the error has a line of its own
                print(flush=True)
            if not sys.stdin.isatty():
                raise
            print(f"error: {error}", file=sys.stderr)
            return
    messages.append({"role": "assistant", "content": "".join(parts)})


def _read_line() -> str | None:
    """The next message; None to leave."""
    try:
        if sys.stdin.isatty():
            line = input("> ")
        else:
            line = sys.stdin.readline()
            if not line:
                return None
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print()
        return ""
    line = line.rstrip("\n")
    return None if line.strip() == _EXIT else line
