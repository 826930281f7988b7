"""`stagemesh stage`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from stagemesh.client.cli._extras import missing_extra, require_engine
from stagemesh.client.cli._mesh_file import stage_values
from stagemesh.client.cli._settings import make_config, options_of, with_options
from stagemesh.router.config import MeshFile
from stagemesh.stage.config import StageConfig
from stagemesh.wire.errors import ConfigError


def command() -> Any:
    """The function to run, with an option for each field of StageConfig."""
    return with_options(_stage, options_of(StageConfig))


def _stage(
    config: Annotated[
        str | None, typer.Option(envvar="STAGEMESH_CONFIG", metavar="FILE", help="mesh.yaml of the mesh.")
    ] = None,
    index: Annotated[
        int | None,
        typer.Option(
            envvar="STAGEMESH_INDEX", min=0, help="Which stage of --config, from 0; else as --stage says."
        ),
    ] = None,
    **given: Any,
) -> None:
    """Settings come from flags, STAGEMESH_* variables, --config and the defaults, in this order."""
    settings = make_config(StageConfig, given, _file_values(config, index, given.get("stage")))
    require_engine(settings.engine, "stage")
    try:
        from stagemesh.stage.serve import run
    except ModuleNotFoundError as error:
        raise missing_extra(error, "stage") from error
    run(settings)


def _file_values(config: str | None, index: int | None, stage: str | None) -> dict[str, Any]:
    if config is None:
        if index is not None:
            raise ConfigError("--index: counts the stages of --config, which is missing")
        return {}
    if index is None:
        place = (stage or "").partition("/")[0]
        if not place.isdigit():
            raise ConfigError(f"--index: say which stage of {config} this is, from 0")
        index = int(place)
    return stage_values(MeshFile.read(config), config, index)
