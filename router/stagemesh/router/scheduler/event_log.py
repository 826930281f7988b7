"""What happened to a scheduler, in order, so that it can happen again: lines of JSON.

The scheduler reads no clock and does no I/O, so its steps follow from its limits and its events alone. A log of
them replayed through a new scheduler makes the same steps, byte for byte.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from stagemesh.router.scheduler.limits import Limits
from stagemesh.router.scheduler.request import Request, Sampling
from stagemesh.router.scheduler.scheduler import Scheduler
from stagemesh.router.scheduler.step import Step, encode
from stagemesh.wire.columns import U32, pack
from stagemesh.wire.errors import ConfigError

Int64 = npt.NDArray[np.int64]
I64 = np.dtype("<i8")


class EventLog:
    """Writes the events of one scheduler after another; each is written when it has been taken.

    Args:
        file: Open for writing; closed by `close`.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._epoch = 0

    def open(self, limits: Limits, epoch: int) -> None:
        """A new scheduler."""
        self._epoch = epoch
        self._write("open", limits=asdict(limits), epoch=epoch)

    def submit(self, request: Request, now: float) -> None:
        """A request was queued."""
        self._write(
            "submit",
            id=request.request_id,
            prompt=_text(pack(request.prompt, U32)),
            max_tokens=request.max_tokens,
            open_ended=request.open_ended,
            sampling=asdict(request.sampling),
            end_token_ids=sorted(request.end_token_ids),
            priority=request.priority,
            deadline=None if math.isinf(request.deadline) else request.deadline,
            now=now,
        )

    def abort(self, request_id: str) -> None:
        """Somebody ended a request."""
        self._write("abort", id=request_id)

    def expire(self, now: float) -> None:
        """Deadlines passed."""
        self._write("expire", now=now)

    def result(self, number: int, token_ids: npt.NDArray[np.uint32], now: float) -> None:
        """The result of a step came."""
        self._write("result", number=number, tokens=_text(pack(token_ids, U32)), now=now)

    def timings(self, stage: int, numbers: Int64, times_ns: Int64) -> None:
        """A stage reported."""
        self._write(
            "timings", stage=stage, numbers=_text(pack(numbers, I64)), times_ns=_text(pack(times_ns, I64))
        )

    def step(self, step: Step | None, now: float) -> None:
        """The scheduler was asked for a step; it may have made none, and may have changed all the same."""
        self._write("step", step=_text(encoded(step, self._epoch)), now=now)

    def flush(self) -> None:
        """What was written is in the file."""
        self._file.flush()

    def close(self) -> None:
        """The end."""
        self._file.close()

    def _write(self, event: str, **fields: Any) -> None:
        self._file.write(json.dumps({"event": event} | fields, separators=(",", ":")) + "\n")


@dataclass(frozen=True, slots=True)
class Replayed:
    """A step as it was logged, and as it was made again; serialized, empty where none was made."""

    line: int
    logged: bytes
    made: bytes


def replay(lines: Iterable[str]) -> Iterator[Replayed]:
    """Let it all happen again.

    Raises:
        ConfigError: The log is not one.
    """
    scheduler: Scheduler | None = None
    epoch = 0
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            event = entry.pop("event")
            if event == "open":
                scheduler, epoch = Scheduler(Limits(**entry["limits"])), entry["epoch"]
                continue
            if scheduler is None:
                raise ConfigError(f"line {number} of the event log is '{event}'; expected 'open' first")
            if event == "step":
                step = scheduler.next_step(entry["now"])
                yield Replayed(number, _data(entry["step"]), encoded(step, epoch))
            else:
                _apply(scheduler, event, entry)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"line {number} of the event log cannot be read: {error!r}") from error


def encoded(step: Step | None, epoch: int) -> bytes:
    """A step's bytes on the wire, without what traces add; the same on every run."""
    return encode(step, epoch).SerializeToString(deterministic=True) if step else b""


def _apply(scheduler: Scheduler, event: str, entry: dict[str, Any]) -> None:
    if event == "submit":
        scheduler.submit(_request(entry), entry["now"])
    elif event == "abort":
        scheduler.abort(entry["id"])
    elif event == "expire":
        scheduler.expire(entry["now"])
    elif event == "result":
        scheduler.take_result(entry["number"], np.frombuffer(_data(entry["tokens"]), U32), entry["now"])
    elif event == "timings":
        numbers = np.frombuffer(_data(entry["numbers"]), I64)
        times_ns = np.frombuffer(_data(entry["times_ns"]), I64).reshape(len(numbers), -1)
        scheduler.take_timings(entry["stage"], numbers, times_ns)
    else:
        raise ValueError(f"unknown event '{event}'")


def _request(entry: dict[str, Any]) -> Request:
    return Request(
        request_id=entry["id"],
        prompt=np.frombuffer(_data(entry["prompt"]), U32),
        max_tokens=entry["max_tokens"],
        open_ended=entry["open_ended"],
        sampling=Sampling(**entry["sampling"]),
        end_token_ids=frozenset(entry["end_token_ids"]),
        priority=entry["priority"],
        deadline=math.inf if entry["deadline"] is None else entry["deadline"],
    )


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _data(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
