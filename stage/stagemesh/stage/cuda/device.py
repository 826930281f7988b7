"""The few things the engine asks of a CUDA device, behind an interface that a test can stand in for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch


class Event(Protocol):
    """A point in a stream."""

    def record(self, stream: Stream | None = None) -> None: ...

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end_event: Event) -> float: ...


class Stream(Protocol):
    """An ordered queue of work."""

    @property
    def cuda_stream(self) -> int: ...

    def wait_event(self, event: Event) -> None: ...

    def synchronize(self) -> None: ...


class Graph(Protocol):
    """Captured work."""

    def replay(self) -> None: ...


class Device(Protocol):
    """Where a rank computes."""

    @property
    def torch_device(self) -> torch.device: ...

    def bind(self, stream: Stream) -> None:
        """Make the device and the stream current in the calling thread."""

    def stream(self, *, high_priority: bool = False) -> Stream: ...

    def event(self) -> Event:
        """With timing, and blocking: a thread that waits for it sleeps."""

    def pinned(self, size: int, dtype: torch.dtype) -> torch.Tensor: ...

    def capture(self, work: Callable[[], None]) -> Graph: ...

    def synchronize(self) -> None: ...


class CudaDevice:
    """A GPU of this host; made before anything else touches CUDA in the process."""

    def __init__(self, index: int) -> None:
        torch.cuda.set_device(index)
        self._device = torch.device("cuda", index)
        self._pool: Any = None

    @property
    def torch_device(self) -> torch.device:
        return self._device

    def bind(self, stream: Stream) -> None:
        torch.cuda.set_device(self._device)
        torch.cuda.set_stream(cast(Any, stream))

    def stream(self, *, high_priority: bool = False) -> Stream:
        return cast(Stream, torch.cuda.Stream(self._device, priority=-1 if high_priority else 0))

    def event(self) -> Event:
        return cast(Event, torch.cuda.Event(enable_timing=True, blocking=True))

    def pinned(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, pin_memory=True)

    def capture(self, work: Callable[[], None]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # thread_local: other threads of the process may touch the device meanwhile.
        with torch.cuda.graph(
            graph,
            pool=self._pool,
            stream=torch.cuda.current_stream(),
            capture_error_mode="thread_local",
        ):
            work()
        return graph

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)
