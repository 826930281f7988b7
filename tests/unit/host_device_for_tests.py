"""A device that is the CPU: everything is done the moment it is asked for, and a graph is its work done again."""

from __future__ import annotations

from collections.abc import Callable

import torch


class HostEvent:
    def record(self, stream: object = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def elapsed_time(self, end_event: object) -> float:
        return 0.0


class HostStream:
    cuda_stream = 0

    def wait_event(self, event: object) -> None: ...

    def synchronize(self) -> None: ...


class HostGraph:
    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self._work()


class HostDevice:
    torch_device = torch.device("cpu")

    def __init__(self) -> None:
        self.graphs: list[HostGraph] = []

    def bind(self, stream: object) -> None: ...

    def stream(self, *, high_priority: bool = False) -> HostStream:
        return HostStream()

    def event(self) -> HostEvent:
        return HostEvent()

    def pinned(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype)

    def capture(self, work: Callable[[], None]) -> HostGraph:
        work()
        self.graphs.append(HostGraph(work))
        return self.graphs[-1]

    def synchronize(self) -> None: ...
