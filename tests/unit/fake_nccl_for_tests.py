"""NCCL's point-to-point calls between threads of this process: a receive waits for its send, an abort ends both."""

from __future__ import annotations

import ctypes
import itertools
import queue
import sys
import threading
import types
from typing import Any

import pytest

_rooms: dict[bytes, dict[int, queue.Queue[bytes]]] = {}
_lock = threading.Lock()
_numbers = itertools.count(1)

ITEMSIZE = {1: 4, 2: 2, 3: 2, 4: 4}


class NcclError(RuntimeError):
    pass


class NcclCommunicator:
    def __init__(self, size: int, unique_id: bytes, rank: int) -> None:
        assert size == 2
        if not isinstance(unique_id, bytes):
            raise TypeError("expected bytes")
        with _lock:
            self._room = _rooms.setdefault(unique_id, {0: queue.Queue(), 1: queue.Queue()})
        self._rank = rank
        self.aborted = False

    def send(self, pointer: int, count: int, kind: int, peer: int, stream: int) -> None:
        assert peer == 1 - self._rank
        self._room[peer].put(ctypes.string_at(pointer, count * ITEMSIZE[kind]))

    def recv(self, pointer: int, count: int, kind: int, peer: int, stream: int) -> None:
        assert peer == 1 - self._rank
        while not self.aborted:
            try:
                data = self._room[self._rank].get(timeout=0.05)
            except queue.Empty:
                continue
            assert len(data) == count * ITEMSIZE[kind], "the ends do not agree on a step's size"
            ctypes.memmove(pointer, data, len(data))
            return

    def check_async_error(self) -> None: ...

    def abort(self) -> None:
        self.aborted = True


def get_unique_id() -> bytes:
    return next(_numbers).to_bytes(128, "little")


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """`from cupy.cuda import nccl` finds it."""
    module: Any = types.ModuleType("cupy.cuda.nccl")
    for name, value in {
        "NCCL_FLOAT32": 1,
        "NCCL_BFLOAT16": 2,
        "NCCL_FLOAT16": 3,
        "NCCL_INT32": 4,
        "NcclError": NcclError,
        "NcclCommunicator": NcclCommunicator,
        "get_unique_id": get_unique_id,
    }.items():
        setattr(module, name, value)
    package, cuda = types.ModuleType("cupy"), types.ModuleType("cupy.cuda")
    cuda.nccl = module  # type: ignore[attr-defined]
    for name, one in {"cupy": package, "cupy.cuda": cuda, "cupy.cuda.nccl": module}.items():
        monkeypatch.setitem(sys.modules, name, one)
