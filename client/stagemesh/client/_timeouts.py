"""A call's timeout: its own, or its client's."""

from __future__ import annotations

from enum import Enum


class ClientDefault(Enum):
    """Stands for "as the client was told", since None means "for ever"."""

    CLIENT_DEFAULT = "the client's timeout"

    def __repr__(self) -> str:
        return "CLIENT_DEFAULT"


CLIENT_DEFAULT = ClientDefault.CLIENT_DEFAULT


def call_timeout_s(timeout: float | ClientDefault | None, client_timeout_s: float | None) -> float | None:
    """Seconds the call may take; None is for ever."""
    return client_timeout_s if isinstance(timeout, ClientDefault) else timeout
