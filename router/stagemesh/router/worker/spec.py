"""What an API worker is told when it starts."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from stagemesh.router.config import RouterConfig


class WorkerSpec(BaseModel):
    """The worker's one argument, as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int
    config: RouterConfig
    """The router's own."""
    listen: str
    """With the port the router holds."""
    socket_fd: int
    """The worker's end of the socket pair."""
    router_pid: int
