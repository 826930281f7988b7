"""Continuous batching over paged KV, with lookahead.

The scheduler is a state machine: `submit`, `abort`, `expire`, `take_result` and `take_timings` are its
events, `next_step` its output. It has no clock and does no I/O: events say what time it is (`now`, seconds on
any clock that does not go back), so the same class runs live, in tests and in virtual time.

A step is formed from what is ready: decoding sequences first (those that waited longest), then prefill
chunks of running sequences, then new sequences, up to a budget of tokens. A decoding sequence is ready
while at most `lookahead` of its sampled tokens are unseen here; the stages take the token of the step
that a row names. Everything a stage needs to know is in the order of the steps, so blocks and slots are
free for others the moment their sequence ends, even with steps of it in flight (rules 4 and 7 of
docs/architecture.md): whoever gets them computes later.
"""

from __future__ import annotations

import math
from bisect import insort
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt

from stagemesh.router.scheduler.blocks import BlockPool
from stagemesh.router.scheduler.deltas import StepDeltas
from stagemesh.router.scheduler.prefix_index import block_key
from stagemesh.router.scheduler.request import Finish, Request
from stagemesh.router.scheduler.sequence import Sequence
from stagemesh.router.scheduler.step import Changes, Step
from stagemesh.wire.errors import InvalidArgumentError, ResourceExhaustedError

ROWS_KEPT = 256
"""Steps back that a step may repeat the rows of; the stages keep more."""

PREFILL_PART = 8
"""One in so many positions of a step is kept for prefill that waits."""

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a lane has room for, and how it is driven."""

    num_blocks: int
    block_size: int
    max_slots: int
    """Sequences running at once."""
    max_blocks: int
    """Of a sequence: the context in blocks."""
    max_waiting: int
    step_tokens: int
    """Positions of a step at most."""
    num_microbatches: int
    """Parts the running decodes are dealt into."""
    depth: int
    """Unanswered steps at most (D)."""
    prefix_cache: bool = True
    """Share KV blocks of equal prefixes."""
    lookahead: int
    """Sampled tokens of a sequence that may be unseen when its next step is made."""


class Scheduler:
    """The scheduler of one lane."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pool = BlockPool(limits.num_blocks, limits.block_size)
        self._waiting: list[Sequence] = []
        self._live: dict[str, Sequence] = {}
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._arrivals = 0
        self._number = 0
        self._in_flight: dict[int, Step] = {}
        self._sampled: dict[int, Int64] = {}
        self._changes = Changes()
        self._prefilling: list[Sequence] = []
        self._yielding: list[Sequence] = []
        # A column each, indexed by slot.
        count = limits.max_slots
        self._free_slots = list(range(count - 1, -1, -1))
        self._by_slot: list[Sequence | None] = [None] * count
        self._decoding = np.zeros(count, np.bool_)
        self._position = np.zeros(count, np.int64)
        self._end_position = np.zeros(count, np.int64)
        self._num_blocks = np.zeros(count, np.int64)
        self._tables = np.zeros((count, limits.max_blocks), np.int64)
        self._unseen = np.zeros(count, np.int64)
        self._steps_in_flight = np.zeros(count, np.int64)
        self._last_step = np.zeros(count, np.int64)
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0

    # Events

    def submit(self, request: Request, now: float) -> None:
        """Queue a request. Refusals are raised: nothing else of the scheduler changes."""
        needed = -(-request.num_positions // self.limits.block_size)
        if needed > self.limits.num_blocks:
            raise InvalidArgumentError(
                f"prompt of {len(request.prompt)} tokens and max_tokens {request.max_tokens} need {needed} KV blocks; "
                f"the lane has {self.limits.num_blocks} of {self.limits.block_size} tokens in all: ask for less",
                field="max_tokens",
                reason="ABOVE_KV_CAPACITY",
                request_id=request.request_id,
            )
        if len(self._waiting) >= self.limits.max_waiting:
            raise ResourceExhaustedError(
                f"{len(self._waiting)} requests already wait, the limit of the queue; try again later",
                reason="QUEUE_FULL",
                request_id=request.request_id,
                retry_after_s=1.0,
            )
        if request.request_id in self._live:
            raise InvalidArgumentError(
                f"request_id '{request.request_id}' is live already; choose another",
                field="request_id",
                reason="DUPLICATE_REQUEST_ID",
                request_id=request.request_id,
            )
        self._arrivals += 1
        sequence = Sequence(request, order=self._arrivals, to_prefill=request.prompt)
        self._live[request.request_id] = sequence
        if request.deadline < math.inf:
            heappush(self._deadlines, (request.deadline, sequence.order, sequence))
        insort(self._waiting, sequence, key=lambda waiting: waiting.waits_before)

    def abort(self, request_id: str) -> StepDeltas:
        """End a request wherever it is; empty if it is not live. Its blocks are free at once."""
        sequence = self._live.get(request_id)
        if sequence is None:
            return StepDeltas()
        self._finish(sequence, Finish.ABORT)
        return StepDeltas(ends=((sequence, Finish.ABORT),))

    def expire(self, now: float) -> StepDeltas:
        """End every request whose deadline has passed; to be called before `next_step`, so that none of them
        costs another step. Their blocks are free at once."""
        ends = []
        while self._deadlines and self._deadlines[0][0] <= now:
            sequence = heappop(self._deadlines)[2]
            if sequence.finish is None:
                self._finish(sequence, Finish.DEADLINE)
                ends.append((sequence, Finish.DEADLINE))
        return StepDeltas(ends=tuple(ends))

    def take_result(self, number: int, token_ids: npt.NDArray[np.uint32], now: float) -> StepDeltas:
        """The tokens of the oldest unanswered step; returns what they mean for the requests."""
        step = self._in_flight.pop(number, None)
        sequences = step.sampled_sequences if step else []
        if step is None or len(sequences) != len(token_ids):
            raise InvalidArgumentError(
                f"{len(token_ids)} tokens came for step {number}; expected {len(sequences)}",
                reason="BAD_RESULT",
            )
        # A sequence leaves its slot for good, or with no step in flight: one that still has a slot has the
        # one it had in the step. The others' slots are not theirs any more.
        here = np.array([sequence.slot for sequence in step.sequences], np.int64) == step.slots
        self._steps_in_flight[step.slots[here]] -= 1
        self._unseen[step.slots[here & step.sample]] -= 1
        rows, ends = [], []
        for row, (sequence, token) in enumerate(zip(sequences, token_ids.tolist(), strict=True)):
            if sequence.finish is None:
                sequence.token_ids.append(token)
                if self.limits.prefix_cache:
                    self._publish_generated(sequence)
                rows.append(row)
                if finish := self._finish_of(sequence, token):
                    ends.append((sequence, finish))
        taken = np.empty(len(rows), np.object_)
        taken[:] = [sequences[row] for row in rows]
        slots = np.array([sequences[row].slot for row in rows], np.int64)
        for sequence, finish in ends:
            self._finish(sequence, finish)
        if self._yielding:
            self._yield_idle()
        return StepDeltas(sequences=taken, slots=slots, token_ids=token_ids[rows], ends=tuple(ends))

    def take_timings(self, stage: int, numbers: Int64, times_ns: Int64) -> None:
        """Where the time of some steps went on a stage, as it reported.

        Args:
            stage: Its place in the lane, from 0.
            numbers: [n] steps.
            times_ns: [n, 6] when each reached the stage, on the stage's clock, and what it took there: the
                TIMES of `cost_model`.
        """

    # Output

    def next_step(self, now: float) -> Step | None:
        """The next step, if there is work that may be sent now."""
        if len(self._in_flight) >= self.limits.depth:
            return None
        yielded = self.num_preemptions
        decodes = self._pick_decodes()
        prefills = self._pick_prefills(self.limits.step_tokens - len(decodes))
        # To find blocks for one, another that was already picked may have been asked to yield.
        decodes = decodes[self._decoding[decodes]]
        prefills = [(one, count) for one, count in prefills if one.slot >= 0 and one not in self._yielding]
        if not len(decodes) and not prefills:
            # Whoever was picked has just yielded: what it gave up makes work for others.
            return self.next_step(now) if self.num_preemptions > yielded else None
        step = self._make_step(self._number + 1, decodes, prefills)
        self._commit(step)
        return step

    @property
    def num_in_flight(self) -> int:
        """Unanswered steps."""
        return len(self._in_flight)

    @property
    def oldest_in_flight(self) -> int:
        """Number of the oldest unanswered step; 0 if there is none."""
        return next(iter(self._in_flight), 0)

    @property
    def num_waiting(self) -> int:
        """Requests not running."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests with a slot."""
        return len(self._live) - len(self._waiting)

    @property
    def live(self) -> list[Sequence]:
        """Every request that has not ended, oldest first."""
        return sorted(self._live.values(), key=lambda sequence: sequence.order)

    def sequence(self, request_id: str) -> Sequence | None:
        """A live request's sequence."""
        return self._live.get(request_id)

    # Decodes

    def _pick_decodes(self) -> Int64:
        ready = np.flatnonzero(
            self._decoding & (self._unseen <= self.limits.lookahead) & (self._position < self._end_position)
        )
        share = -(-int(np.count_nonzero(self._decoding)) // self.limits.num_microbatches)
        # Prefill keeps a part of the budget while it has work, or many decodes would starve it.
        prefill_waits = self._prefilling or (self._waiting and self._free_slots)
        share = min(
            share, self.limits.step_tokens - (self.limits.step_tokens // PREFILL_PART if prefill_waits else 0)
        )
        if len(ready) > share:
            longest_waiting = np.argsort(self._last_step[ready], kind="stable")[:share]
            ready = np.sort(ready[longest_waiting])
        full = ready[self._position[ready] == self._num_blocks[ready] * self.limits.block_size]
        if not len(full):
            return ready
        if len(full) <= self.pool.num_free:
            self._grow_all(full)
            return ready
        # To find a block for one, another may yield, also one looked at before: ask who is left at the end.
        grown = [slot for slot in full.tolist() if (one := self._by_slot[slot]) and self._grow(one)]
        left_out = np.setdiff1d(full, grown)
        return ready[self._decoding[ready] & ~np.isin(ready, left_out)]

    def _grow_all(self, slots: Int64) -> None:
        """One more block for each of these decoding sequences."""
        have = self._num_blocks[slots]
        blocks = self.pool.take_next(self._tables[slots, have - 1])
        self._tables[slots, have] = blocks
        self._num_blocks[slots] += 1
        self._changes.appended.append((slots, blocks))

    def _grow(self, sequence: Sequence) -> bool:
        """One more block for a decoding sequence; if there is none, somebody yields, it itself perhaps."""
        if not self.pool.num_free and not self._yielding:
            self._ask_to_yield(self._victim())
        if sequence.slot < 0 or not self._decoding[sequence.slot] or not self.pool.num_free:
            return False
        self._append(sequence, 1)
        return True

    # Prefill

    def _pick_prefills(self, budget: int) -> list[tuple[Sequence, int]]:
        """(sequence, positions) of the chunks that fit."""
        chunks: list[tuple[Sequence, int]] = []
        for sequence in list(self._prefilling):
            if budget <= 0:
                return chunks
            # A chunk for one may have made a younger one yield.
            count = self._chunk(sequence, budget) if sequence.slot >= 0 else 0
            if count:
                chunks.append((sequence, count))
                budget -= count
        while budget > 0 and self._waiting and self._free_slots and not self._yielding:
            sequence = self._waiting[0]
            # Room for the whole of its prompt, lest it start only to yield.
            if (
                -(-(len(sequence.to_prefill) + 1) // self.limits.block_size) > self.pool.num_free
                and self.num_running
            ):
                break
            self._admit(self._waiting.pop(0))
            count = self._chunk(sequence, budget)
            if not count:
                break
            chunks.append((sequence, count))
            budget -= count
        return chunks

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        """Positions of its next chunk, with blocks for them; 0 if there are no blocks now."""
        position = int(self._position[sequence.slot])
        count = min(len(sequence.to_prefill) - position, budget)
        size = self.limits.block_size
        have = int(self._num_blocks[sequence.slot])
        room = have * size - position
        if (
            not room
            and not self.pool.num_free
            and not self._yielding
            and (victim := self._victim()) is not sequence
        ):
            self._ask_to_yield(victim)
        count = min(count, room + self.pool.num_free * size)
        needed = -(-(position + count) // size) - have
        if needed > 0:
            self._append(sequence, needed)
        return count

    def _admit(self, sequence: Sequence) -> None:
        slot = self._free_slots.pop()
        sequence.slot = slot
        self._by_slot[slot] = sequence
        self._decoding[slot] = False
        self._end_position[slot] = sequence.request.num_positions
        self._num_blocks[slot] = 0
        self._unseen[slot] = 0
        self._steps_in_flight[slot] = 0
        self._last_step[slot] = 0
        self._share_prefix(sequence)
        self._position[slot] = sequence.first_position
        sequence.claim = self.pool.claim(self._claim_room(sequence))
        self._prefilling.append(sequence)
        self._changes.admitted.append(sequence)

    def _share_prefix(self, sequence: Sequence) -> None:
        """Give it the blocks that already hold the beginning of what it would compute."""
        blocks, sequence.keys = self.pool.match(sequence.to_prefill) if self.limits.prefix_cache else ([], [])
        sequence.first_position = len(blocks) * self.limits.block_size
        if blocks:
            shared = np.array(blocks, np.int64)
            self.pool.share(shared)
            self._tables[sequence.slot, : len(blocks)] = shared
            self._num_blocks[sequence.slot] = len(blocks)
            self._changes.appended.append((np.full(len(blocks), sequence.slot), shared))
        if not sequence.num_preemptions:
            sequence.num_cached = sequence.first_position
            self.num_prompt_tokens += len(sequence.to_prefill)
            self.num_cached_tokens += sequence.first_position

    def _publish(self, sequence: Sequence, known: npt.NDArray[np.uint32], num_computed: int) -> None:
        """Make its full blocks known: those whose tokens are `known` and computed by steps already made."""
        size = self.limits.block_size
        table = self._tables[sequence.slot]
        for index in range(len(sequence.keys), min(num_computed, len(known)) // size):
            parent = sequence.keys[-1] if index else b""
            sequence.keys.append(block_key(parent, known[index * size : (index + 1) * size]))
            self.pool.publish(sequence.keys[-1], int(table[index]))

    def _append(self, sequence: Sequence, count: int) -> None:
        slot = sequence.slot
        have = int(self._num_blocks[slot])
        owned = have - sequence.first_position // self.limits.block_size
        first = int(self._tables[slot, have - 1]) + 1 if owned else sequence.claim
        blocks = self.pool.take(count, first)
        self._tables[slot, have : have + count] = blocks
        self._num_blocks[slot] = have + count
        self._changes.appended.append((np.full(count, slot), blocks))

    def _claim_room(self, sequence: Sequence) -> int:
        return -(-sequence.request.num_positions // self.limits.block_size)

    # Steps

    def _make_step(self, number: int, decodes: Int64, prefills: list[tuple[Sequence, int]]) -> Step:
        inputs = self._last_step[decodes]
        tokens, ends = [], []
        for sequence, count in prefills:
            position = int(self._position[sequence.slot])
            tokens.append(sequence.to_prefill[position : position + count])
            ends.append(position + count == len(sequence.to_prefill))
        same_rows_as = 0
        if len(decodes) and not prefills:
            candidate = int(inputs[0])
            earlier = self._sampled.get(candidate)
            if earlier is not None and (inputs == candidate).all() and np.array_equal(earlier, decodes):
                same_rows_as = candidate
        changes, self._changes = self._changes, Changes()
        return Step(
            number=number,
            changes=changes,
            slots=np.r_[decodes, np.array([sequence.slot for sequence, _ in prefills], np.int64)],
            counts=np.r_[
                np.ones(len(decodes), np.int64), np.array([count for _, count in prefills], np.int64)
            ],
            input_steps=np.r_[inputs, np.zeros(len(prefills), np.int64)].astype(np.uint64),
            tokens=tokens,
            sample=np.r_[np.ones(len(decodes), np.bool_), np.array(ends, np.bool_)],
            sequences=[
                *(self._running(slot) for slot in decodes.tolist()),
                *(sequence for sequence, _ in prefills),
            ],
            same_rows_as=same_rows_as,
        )

    def _commit(self, step: Step) -> None:
        """The step will be sent: every column moves on as if it had run."""
        slots, sampled = step.slots, step.slots[step.sample]
        self._number = step.number
        self._in_flight[step.number] = step
        self._sampled[step.number] = sampled
        self._sampled.pop(step.number - ROWS_KEPT, None)
        self._position[slots] += step.counts
        self._steps_in_flight[slots] += 1
        self._unseen[sampled] += 1
        self._last_step[sampled] = step.number
        self._decoding[sampled] = True
        for sequence in step.sequences[: step.num_decodes]:
            sequence.decode_steps.append(step.number)
        for sequence in step.sequences[step.num_decodes :]:
            sequence.prefill_steps.append(step.number)
        if step.tokens:
            if self.limits.prefix_cache:
                for sequence in step.sequences[step.num_decodes :]:
                    self._publish(sequence, sequence.to_prefill, int(self._position[sequence.slot]))
            self._prefilling = [
                sequence for sequence in self._prefilling if not self._decoding[sequence.slot]
            ]

    def _publish_generated(self, sequence: Sequence) -> None:
        """Once a block of generated tokens has come back whole."""
        length = len(sequence.request.prompt) + len(sequence.token_ids)
        if length % self.limits.block_size == 0 and sequence.slot >= 0:
            generated = np.array(sequence.token_ids, np.uint32)
            known = np.concatenate((sequence.request.prompt, generated))
            self._publish(sequence, known, int(self._position[sequence.slot]))

    def _finish_of(self, sequence: Sequence, token: int) -> Finish | None:
        """Whether that token, its newest, ends it."""
        if token in sequence.request.end_token_ids:
            return Finish.STOP
        return Finish.LENGTH if len(sequence.token_ids) >= sequence.request.max_tokens else None

    # Leaving

    def _finish(self, sequence: Sequence, finish: Finish) -> None:
        sequence.finish = finish
        del self._live[sequence.request.request_id]
        if sequence.slot >= 0:
            self._vacate(sequence)
        else:
            self._waiting.remove(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        """Its slot and blocks are free; the stages hear of it in the next step."""
        slot = sequence.slot
        self.pool.give_back(self._tables[slot, : self._num_blocks[slot]])
        self.pool.drop_claim(sequence.claim, self._claim_room(sequence))
        self._decoding[slot] = False
        self._by_slot[slot] = None
        self._free_slots.append(slot)
        sequence.slot = -1
        if sequence in self._changes.admitted:  # the stages have not heard of it yet
            self._changes.admitted.remove(sequence)
        self._changes.appended = [
            (slots[slots != slot], blocks[slots != slot]) for slots, blocks in self._changes.appended
        ]
        self._changes.released.append(slot)
        for group in (self._prefilling, self._yielding):
            if sequence in group:
                group.remove(sequence)

    # Preemption

    def _victim(self) -> Sequence:
        """Who yields: the lowest priority, and of those the youngest."""
        running = [sequence for sequence in self._by_slot if sequence is not None]
        return max(running, key=lambda sequence: sequence.waits_before)

    def _ask_to_yield(self, sequence: Sequence) -> None:
        """It takes no further step, and leaves when none of its steps is in flight (rule 3)."""
        self._decoding[sequence.slot] = False
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)
        self._yielding.append(sequence)
        self._yield_idle()

    def _yield_idle(self) -> None:
        for sequence in [one for one in self._yielding if self._steps_in_flight[one.slot] == 0]:
            self._vacate(sequence)
            generated = np.array(sequence.token_ids, np.uint32)
            sequence.to_prefill = np.concatenate((sequence.request.prompt, generated))
            sequence.num_preemptions += 1
            self.num_preemptions += 1
            insort(self._waiting, sequence, key=lambda waiting: waiting.waits_before)

    def _running(self, slot: int) -> Sequence:
        sequence = self._by_slot[slot]
        assert sequence is not None
        return sequence
