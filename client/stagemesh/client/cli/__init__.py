"""The `stagemesh` command. One file a subcommand, imported when it is called."""

from __future__ import annotations

from stagemesh.client.cli._main import main

__all__ = ["main"]
