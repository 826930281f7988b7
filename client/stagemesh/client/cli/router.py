"""`stagemesh router`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from stagemesh.client.cli._extras import missing_extra
from stagemesh.client.cli._mesh_file import router_values
from stagemesh.client.cli._settings import make_config, options_of, with_options
from stagemesh.router.config import MeshFile, RouterConfig


def command() -> Any:
    """The function to run, with an option for each field of RouterConfig."""
    return with_options(_router, options_of(RouterConfig))


def _router(
    config: Annotated[
        str | None, typer.Option(envvar="STAGEMESH_CONFIG", metavar="FILE", help="mesh.yaml of the mesh.")
    ] = None,
    **given: Any,
) -> None:
    """Settings come from flags, STAGEMESH_* variables, --config and the defaults, in this order."""
    settings = make_config(RouterConfig, given, router_values(MeshFile.read(config)) if config else {})
    try:
        from stagemesh.router.serve import run
    except ModuleNotFoundError as error:
        raise missing_extra(error, "router") from error
    run(settings)
