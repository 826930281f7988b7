"""What a lane counts of its requests and tokens, for `stagemesh top` and for metrics.

Kept whether anybody looks or not, so it is cheap: columns by slot, arithmetic for a whole step at once.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt

from stagemesh.router.scheduler import Finish, Scheduler, StepDeltas
from stagemesh.router.scheduler.sequence import Sequence
from stagemesh.wire.telemetry.histogram import BulkHistogram, Recent
from stagemesh.wire.telemetry.names import RouterMetric

RECENT_TOKENS = 8192
RECENT_REQUESTS = 512


class LaneStats:
    """Of every request of this router, through all epochs. Times are seconds of the monotonic clock."""

    def __init__(self) -> None:
        self.ttft = BulkHistogram(RouterMetric.TTFT)
        self.time_per_token = BulkHistogram(RouterMetric.TIME_PER_TOKEN)
        self.duration = BulkHistogram(RouterMetric.DURATION)
        self.inter_token = BulkHistogram(RouterMetric.INTER_TOKEN)
        self.queue = BulkHistogram(RouterMetric.QUEUE)
        for histogram in self.histograms:
            histogram.of()
        self.recent_ttft = Recent(RECENT_REQUESTS)
        self.recent_inter_token = Recent(RECENT_TOKENS)
        self.finished: Counter[str] = Counter()
        """Requests that ended well, by finish reason."""
        self.failed: Counter[str] = Counter()
        """Requests refused or failed, by gRPC status code."""
        self.totals = Totals()
        self._owners: dict[int, Sequence] = {}
        self._slots: dict[str, int] = {}
        """By request: the slot it has or had last."""
        self._first_at: npt.NDArray[np.float64] = np.zeros(0)
        self._last_at: npt.NDArray[np.float64] = np.zeros(0)
        """By slot: when its sequence got its first and its last token; 0 before that."""
        self._kept: dict[str, tuple[float, float]] = {}
        """By request: the same of sequences that lost their slot and wait."""

    @property
    def histograms(self) -> list[BulkHistogram]:
        """All of them."""
        return [self.ttft, self.time_per_token, self.duration, self.inter_token, self.queue]

    def open_lane(self, max_slots: int) -> None:
        """A new epoch: nobody has a slot."""
        self._owners.clear()
        self._slots.clear()
        self._kept.clear()
        self._first_at, self._last_at = np.zeros(max_slots), np.zeros(max_slots)

    def admitted(self, sequence: Sequence, now: float) -> None:
        """A sequence got its slot; after a preemption it may be another one than it had."""
        slot, request = sequence.slot, sequence.request
        if not sequence.num_preemptions:
            self.queue.of().add(now - request.arrived)
        before = self._owners.get(slot)
        if before is not None and before is not sequence and before.finish is None:
            self._kept[before.request.request_id] = (float(self._first_at[slot]), float(self._last_at[slot]))
        self._owners[slot] = sequence
        old = self._slots.get(request.request_id)
        if old is not None and old != slot and self._owners.get(old) is sequence:
            del self._owners[old]
            self._kept[request.request_id] = (float(self._first_at[old]), float(self._last_at[old]))
        self._slots[request.request_id] = slot
        times = self._kept.pop(request.request_id, (0.0, 0.0))
        if before is not sequence:
            self._first_at[slot], self._last_at[slot] = times

    def take(self, deltas: StepDeltas, now: float) -> None:
        """A step's tokens came, or requests ended."""
        slots = deltas.slots
        if len(slots):
            last = self._last_at[slots]
            self._last_at[slots] = now
            if last[last.argmin()] == 0:
                running = last > 0
                self._take_first(deltas, ~running, now)
                last = last[running]
            gaps = now - last
            self.inter_token.of().add_all(gaps)
            self.recent_inter_token.add_all(gaps)
        for sequence, finish in deltas.ends:
            self._end(sequence, finish, now)

    def _take_first(self, deltas: StepDeltas, first: npt.NDArray[np.bool_], now: float) -> None:
        self._first_at[deltas.slots[first]] = now
        arrived = [sequence.request.arrived for sequence in deltas.sequences[first].tolist()]
        seconds = now - np.array(arrived)
        self.ttft.of().add_all(seconds)
        self.recent_ttft.add_all(seconds)

    def _end(self, sequence: Sequence, finish: Finish, now: float) -> None:
        self.duration.of().add(now - sequence.request.arrived)
        self._kept.pop(sequence.request.request_id, None)
        if finish is not Finish.DEADLINE:
            self.finished[finish.value] += 1
        # Its slot is free already, and nobody else's before the next admission.
        slot = self._slots.pop(sequence.request.request_id, None)
        if slot is None or self._owners.get(slot) is not sequence:
            return
        del self._owners[slot]
        count = sequence.num_generated
        if count > 1:
            seconds = float(self._last_at[slot] - self._first_at[slot])
            self.time_per_token.of().add(seconds / (count - 1))


class Totals:
    """Counts that a scheduler starts anew in each epoch, summed up over them."""

    def __init__(self) -> None:
        self._before: Counter[str] = Counter()
        self._scheduler: Scheduler | None = None

    def open_lane(self, scheduler: Scheduler) -> None:
        """What the last epoch's scheduler counted stays counted."""
        for name in ("num_prompt_tokens", "num_cached_tokens", "num_preemptions"):
            self._before[name] = self._value(name)
        self._scheduler = scheduler

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of admitted requests."""
        return self._value("num_prompt_tokens")

    @property
    def cached_tokens(self) -> int:
        """Those of them found in the prefix cache."""
        return self._value("num_cached_tokens")

    @property
    def preemptions(self) -> int:
        """Running requests that gave up their memory."""
        return self._value("num_preemptions")

    def _value(self, name: str) -> int:
        return self._before[name] + (getattr(self._scheduler, name) if self._scheduler else 0)
