"""How clients and streams end: closed, their block left; a stream also when it is forgotten."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Closing(ABC):
    """Something blocking."""

    @abstractmethod
    def close(self) -> None:
        """Cancel what still runs. Idempotent, and safe from another thread."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class ClosingStream(Closing):
    """Nobody reads any more what is forgotten."""

    def __del__(self) -> None:
        self.close()


class AsyncClosing(ABC):
    """The same of asyncio."""

    @abstractmethod
    async def close(self) -> None:
        """Cancel what still runs. Idempotent."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class AsyncClosingStream(AsyncClosing):
    """A stream of asyncio."""

    @abstractmethod
    def close_soon(self) -> None:
        """`close` for where nothing can be awaited."""

    async def close(self) -> None:
        """Cancel what still runs. Idempotent."""
        self.close_soon()

    def __del__(self) -> None:
        # The event loop may be closed by now, and the call with it.
        with contextlib.suppress(RuntimeError):
            self.close_soon()
