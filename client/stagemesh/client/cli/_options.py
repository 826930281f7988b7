"""Options that several subcommands share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

AddressOption = Annotated[
    str,
    typer.Option("--address", envvar="STAGEMESH_ADDRESS", metavar="HOST:PORT", help="Address of the router."),
]
AdminOption = Annotated[
    str,
    typer.Option(
        "--admin", envvar="STAGEMESH_ADMIN", metavar="HOST:PORT", help="Admin address of the router."
    ),
]
TimeoutOption = Annotated[float, typer.Option("--timeout", min=0, help="Seconds an answer may take.")]
MaxTokensOption = Annotated[
    int | None,
    typer.Option("--max-tokens", help="Tokens to generate at most; unset: to the end of the context."),
]
TemperatureOption = Annotated[
    float | None,
    typer.Option("--temperature", help="0 is greedy; unset: as the model's generation config says, else 1."),
]
TopKOption = Annotated[
    int | None, typer.Option("--top-k", help="Sample among the k most probable tokens; 0 is off.")
]
TopPOption = Annotated[
    float | None, typer.Option("--top-p", help="Sample among the fewest tokens whose probability reaches it.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="The same seed gives the same tokens.")]
IgnoreEosOption = Annotated[
    bool, typer.Option("--ignore-eos", help="Go on past end tokens, up to --max-tokens.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def given_only(**options: Any) -> Any:
    """The options that were given, for a client call."""
    return {name: value for name, value in options.items() if value is not None and value is not False}
