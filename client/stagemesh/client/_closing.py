"""How every stream ends: closed, its block left, or forgotten."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Closing(ABC):
    """A blocking stream."""

    @abstractmethod
    def close(self) -> None:
        """Cancel what still runs. Idempotent, and safe from another thread."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class AsyncClosing(ABC):
    """A stream of asyncio."""

    @abstractmethod
    def close_soon(self) -> None:
        """`close` for where nothing can be awaited."""

    async def close(self) -> None:
        """Cancel what still runs. Idempotent."""
        self.close_soon()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        # The event loop may be closed by now, and the call with it.
        with contextlib.suppress(RuntimeError):
            self.close_soon()
