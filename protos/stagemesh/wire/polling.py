"""How gRPC's core waits for sockets in a server process of the mesh.

By default a thread of its event engine does, and hands what comes to the thread that polls for Python: two
wake-ups a message. Without the event engine the polling thread waits for the sockets itself. A message a hop is
what a pipeline is made of: docs/performance.md, "The pipeline", has the figures.

gRPC's core reads the choice when it is imported, so it must be in the environment before.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

import grpc

VARIABLE = "GRPC_EXPERIMENTS"
KNOWN_VERSION = "1.84."
"""The choice is an experiment of gRPC's, known by this name to these versions alone."""
CHOICE = "-event_engine_client,-event_engine_listener"


def with_polling(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a server process; a choice that is already in it stays.

    Its children are started by exec: gRPC's handlers of a fork would only log, once for each, that they do nothing.
    """
    if VARIABLE in environment or not grpc.__version__.startswith(KNOWN_VERSION):
        return dict(environment)
    return {"GRPC_ENABLE_FORK_SUPPORT": "0", **environment, VARIABLE: CHOICE}


def restart_with_polling() -> None:
    """Replace this process by itself with the choice in its environment, unless it is there."""
    environment = with_polling(os.environ)
    if VARIABLE not in os.environ and VARIABLE in environment:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
