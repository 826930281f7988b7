"""The table of subcommands, the global options, and the one place where an error becomes a line."""

from __future__ import annotations

import importlib
import inspect
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from stagemesh.client.cli._extras import missing_extra
from stagemesh.wire.errors import ConfigError, InvalidArgumentError, StagemeshError
from stagemesh.wire.polling import restart_with_polling
from stagemesh.wire.process import die_with_parent

PARENT_ENV = "STAGEMESH_PDEATHSIG"
"""Internal: the pid of the `stagemesh up` that a child must not outlive."""
DEBUG_ENV = "STAGEMESH_DEBUG"

COMMANDS = {
    "up": "Start a whole mesh on this machine: stages and router.",
    "generate": "Stream the continuation of a prompt.",
    "chat": "Talk to the model; the conversation is kept.",
    "status": "Show the stages and the state of the mesh.",
    "trace": "Show where the time of a request went, stage by stage.",
    "top": "Watch the mesh: stages, latencies, tokens per second.",
    "timeline": "Record the steps of all stages as a Chrome trace.",
    "plan": "Propose which layers go on which stage, by cost.",
    "simulate": "Run the scheduler over simulated stages, in virtual time.",
    "health": "Ask a router or a stage whether it is ready.",
    "doctor": "Check a node before it joins a mesh.",
    "stage": "Run one stage.",
    "router": "Run the router.",
}
"""Subcommands and their summaries. Each has a module of its name here, with a function `command()` that makes
the function to run; stage, router and up read their options off the settings models when that is called."""

_USAGE_ERROR: Any = typer.BadParameter.__bases__[0]
"""What a wrong flag raises: of click, or of the copy that typer brings."""

SERVERS = ("stage", "router")
"""Subcommands that serve the mesh: gRPC must wait for sockets there as `wire.polling` says."""


class _LazyGroup(TyperGroup):
    """Shows the table, and imports a subcommand only to run it, to explain it or to complete it."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The real command in place of its line in the table."""
        name, stub, rest = super().resolve_command(ctx, args)
        return name, stub if name is None else load_command(name), rest


def load_command(name: str) -> Any:
    """The subcommand with all its options."""
    try:
        function: Callable[..., None] = importlib.import_module(f"stagemesh.client.cli.{name}").command()
    except ModuleNotFoundError as error:
        raise missing_extra(error, name) from error
    function.__doc__ = COMMANDS[name] + "\n\n" + (inspect.getdoc(function) or "")
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name)(function)
    return typer.main.get_command(single)


def make_app() -> typer.Typer:
    """The command line, with the subcommands as lines of a table."""
    app = typer.Typer(
        cls=_LazyGroup,
        help="A gRPC mesh of pipeline stages that serves language models too large for one GPU or one node.",
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_global_options)
    for name, summary in COMMANDS.items():
        app.command(name, help=summary)(_stub)
    return app


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, 1 on an error, 2 on a wrong flag or setting."""
    given = sys.argv[1:] if args is None else args
    if args is None and _command_of(given) in SERVERS:
        restart_with_polling()
    parent = os.environ.pop(PARENT_ENV, "")
    if parent.isdigit():
        die_with_parent(int(parent))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may answer what this terminal cannot show
    try:
        sys.exit(make_app()(args=given or ["--help"], prog_name="stagemesh", standalone_mode=False))
    except StagemeshError as error:
        if os.environ.get(DEBUG_ENV):
            raise
        _end(str(error), 2 if isinstance(error, ConfigError | InvalidArgumentError) else 1)
    except ModuleNotFoundError as error:
        missing = missing_extra(error, _command_of(given))
        if not isinstance(missing, StagemeshError) or os.environ.get(DEBUG_ENV):
            raise
        _end(str(missing), 1)
    except typer.Abort:
        _end("aborted", 1)
    except BrokenPipeError:
        # What the reader did not want is still in the buffer, and would be written at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except _USAGE_ERROR as error:
        where = error.ctx.command_path if error.ctx else "stagemesh"
        _end(f"{error.format_message().rstrip('.')}; see {where} --help", error.exit_code)


def _command_of(args: Sequence[str]) -> str:
    return next((arg for arg in args if not arg.startswith("-")), "")


def _end(message: str, code: int) -> NoReturn:
    """What is wrong, in one line."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _stub() -> None:
    """Never runs: the group puts the real command in its place."""


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"stagemesh {version('stagemesh')}")
        raise typer.Exit


def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help=f"On an error, print the traceback. Also: {DEBUG_ENV}=1.")
    ] = False,
) -> None:
    if debug:
        os.environ[DEBUG_ENV] = "1"  # for the children of `up` too
