"""Packages that only some subcommands need."""

from __future__ import annotations

import importlib.util

from stagemesh.wire.errors import StartupError

_EXTRA_OF_COMMAND = {
    "stage": "stage",
    "router": "router",
    "up": "router,stage",
    "simulate": "router",
    "plan": "router,stage",
}


def require_engine(engine: str, command: str) -> None:
    """Raise at once what a stage's workers would end with: they import their engine themselves."""
    for module in ("torch", "safetensors") if engine == "torch" else ():
        if importlib.util.find_spec(module) is None:
            raise missing_extra(ModuleNotFoundError(name=module), command)


def missing_extra(error: ModuleNotFoundError, command: str) -> Exception:
    """What to raise for a module that is not there: which extra to install, or the error itself."""
    module = (error.name or "").partition(".")[0]
    if module in ("", "stagemesh") or command not in _EXTRA_OF_COMMAND:
        return error
    extra = _EXTRA_OF_COMMAND[command]
    return StartupError(
        f"stagemesh {command} needs packages that are not installed (found no '{module}'): "
        f"pip install 'stagemesh[{extra}]'"
    )
