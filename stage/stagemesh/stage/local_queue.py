"""The local queue between a leader and its workers: multipart messages over a Unix socket (local_socket).

The first part is the kind. Every rank of a stage gets the same messages in the same order, and a worker
decides what to do by that order alone: so all ranks of a tensor-parallel group take the same decisions,
whatever the timing. It is a process-private protocol; nothing outside the stage may speak it.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np
import numpy.typing as npt


class ToWorker(bytes, enum.Enum):
    """Leader to worker."""

    OPEN = b"O"
    """OpenLaneRequest: raise the epoch, drop everything older."""
    STEPS = b"S"
    """arrival_ns (u64), then the ExecuteRequest as it came in."""
    FRAME = b"F"
    """arrival_ns (u64), then a TransferRequest as it came in."""
    PREPARE = b"L"
    """epoch, kind (u64 each): mint the id of this rank's end of a link of the engine's own."""
    CONNECT = b"C"
    """ConnectLinkRequest: open such a link."""
    LINK = b"K"
    """epoch, kind, sender (u64 each), the peer's address as text: an end of a unix link, whose socket comes along."""
    TENSOR = b"T"
    """first_ns, last_ns (u64 each) at which it began to come and was whole, a TensorHeader, the bytes: from a unix link."""
    ENDED = b"E"
    """epoch, kind (u64 each): the unix link it receives on has ended."""
    CLOSE = b"c"
    """epoch (u64): close the lane's unix links."""
    PING = b"P"
    """Sequence number (u64)."""
    STOP = b"X"
    """Leave in good order."""


class ToLeader(bytes, enum.Enum):
    """Worker to leader."""

    PROGRESS = b"p"
    """rank, done, total (u64 each)."""
    READY = b"r"
    """RankFacts as JSON."""
    RESULT = b"R"
    """ExecuteResponse of a step, serialized."""
    TENSOR = b"T"
    """Tensor: a header and the bytes to send to the neighbour."""
    DONE = b"D"
    """StepTimings, end to end; of several steps, since nobody waits for them."""
    RANK_DONE = b"d"
    """rank (u64), then StepTimings: of ranks other than 0, where --trace-ranks asks for them."""
    WAITING = b"w"
    """What rank 0 has been waiting for, as text; empty when it goes on."""
    PONG = b"P"
    """rank, sequence number (u64 each)."""
    PREPARED = b"l"
    """rank, epoch, kind (u64 each), then the id."""
    CONNECTED = b"c"
    """rank, epoch, kind, sender (u64 each), then what went wrong as text; empty when the link is open."""
    BROKEN = b"B"
    """epoch (u64), what broke and the address of the stage to blame as text, empty if it is unknown: the lane is
    over, the worker is not."""
    REFUSED = b"E"
    """epoch (u64), reason and message as text: a step the worker could not take."""
    FAILED = b"!"
    """The worker cannot start: reason and message as text, a NUL between."""


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Where a tensor goes."""

    epoch: int
    kind: int
    step: int
    sent_ns: int = 0
    """The host's monotonic clock when a unix link took it."""

    _LAYOUT = struct.Struct("<4Q")

    def pack(self) -> bytes:
        return self._LAYOUT.pack(self.epoch, self.kind, self.step, self.sent_ns)

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> TensorHeader:
        return cls(*cls._LAYOUT.unpack(data))


@dataclass(frozen=True, slots=True)
class StepTiming:
    """Where the time of a step went on this stage. Nanoseconds; times are the host's monotonic clock.

    The parts follow each other without a gap, from arrival to the moment the output is handed on.
    """

    epoch: int
    number: int
    arrival_ns: int
    queue_ns: int
    wait_ns: int
    receive_ns: int
    compute_ns: int
    send_ns: int
    sent_bytes: int

    _LAYOUT = struct.Struct("<9Q")
    SIZE = _LAYOUT.size
    """Bytes of a packed one."""

    def pack(self) -> bytes:
        return self._LAYOUT.pack(
            self.epoch,
            self.number,
            self.arrival_ns,
            self.queue_ns,
            self.wait_ns,
            self.receive_ns,
            self.compute_ns,
            self.send_ns,
            self.sent_bytes,
        )


Timings: TypeAlias = npt.NDArray[np.void]
_TIMING = np.dtype([(field.name, "<u8") for field in fields(StepTiming)])


def unpack_timings(data: bytes) -> Timings:
    """StepTimings end to end, as an array with a field for each of theirs."""
    return np.frombuffer(data, _TIMING)
