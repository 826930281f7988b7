"""Continuous batching over paged KV, with lookahead.

The scheduler is a state machine: `submit`, `abort`, `expire`, `take_result` and `take_timings` are its
events, `next_step` its output. It has no clock and does no I/O: events say what time it is (`now`, seconds on
any clock that does not go back), so the same class runs live, in tests and in virtual time.

A step is formed from what is ready: decoding sequences first (those that waited longest), then prefill
chunks of running sequences, then new sequences, up to a budget of tokens and of time. A decoding sequence is
ready while at most `lookahead` of its sampled tokens are unseen here; the stages take the token of the step
that a row names. Everything a stage needs to know is in the order of the steps, so blocks and slots are
free for others the moment their sequence ends, even with steps of it in flight (rules 4 and 7 of
docs/architecture.md): whoever gets them computes later.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from dataclasses import replace
from heapq import heapify, heappop, heappush

import numpy as np
import numpy.typing as npt

from stagemesh.router.scheduler.blocks import BlockPool
from stagemesh.router.scheduler.deltas import StepDeltas
from stagemesh.router.scheduler.ends import EndTokens
from stagemesh.router.scheduler.limits import Limits
from stagemesh.router.scheduler.pace import Pace
from stagemesh.router.scheduler.request import Finish, Request
from stagemesh.router.scheduler.running import Running
from stagemesh.router.scheduler.sequence import Sequence
from stagemesh.router.scheduler.step import Step
from stagemesh.wire.errors import InvalidArgumentError, ResourceExhaustedError

ROWS_KEPT = 256
"""Steps back that a step may repeat the rows of; the stages keep more."""

PREFILL_PART = 8
"""One in so many positions of a step is kept for prefill that waits."""

SLACK = 0.02
"""Of its share that a microbatch may be off before its rows are dealt anew."""

CONTEXT_STEPS = 16
"""Steps between two looks at how much context there is in all."""

ENDS_KEPT = 256
"""Ends that the pace of the queue is taken from."""
DEADLINES_KEPT = 64
"""Of requests that have ended; beside twice as many as are live."""
RETRY_S = (0.1, 60.0)
"""Shortest and longest hint when to try again."""

NOTHING_NEW = StepDeltas()

Int64 = npt.NDArray[np.int64]


class Scheduler:
    """The scheduler of one lane."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.running = Running(limits, self._enqueue, lambda: self.oldest_in_flight)
        self.pace = Pace(limits)
        self._waiting: list[Sequence] = []
        self._waiting_positions = 0
        """Of their prompts."""
        self._live: dict[str, Sequence] = {}
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._end_tokens = EndTokens()
        self._ended_at: deque[float] = deque(maxlen=ENDS_KEPT)
        """When requests ended lately, from when there was work on."""
        self._arrivals = 0
        self._number = 0
        self._in_flight: dict[int, Step] = {}
        self._sampled: dict[int, Int64] = {}
        self._ones = np.ones(limits.max_slots, np.int64)
        self._all = np.ones(limits.max_slots, np.bool_)

    # Events

    def submit(self, request: Request, now: float) -> None:
        """Queue a request. Refusals are raised: nothing else of the scheduler changes."""
        room = self.limits.num_blocks * self.limits.block_size - len(request.prompt) + 1
        if request.open_ended and 0 < room < request.max_tokens:
            request = replace(request, max_tokens=room)
        needed = -(-request.num_positions // self.limits.block_size)
        if needed > self.limits.num_blocks:
            raise InvalidArgumentError(
                f"prompt of {len(request.prompt)} tokens and max_tokens {request.max_tokens} need {needed} KV blocks; "
                f"the lane has {self.limits.num_blocks} of {self.limits.block_size} tokens in all: ask for less",
                field="max_tokens",
                reason="ABOVE_KV_CAPACITY",
                request_id=request.request_id,
            )
        if self._queue_full():
            raise ResourceExhaustedError(
                f"{len(self._waiting)} requests already wait, the limit of the queue; try again later",
                reason="QUEUE_FULL",
                request_id=request.request_id,
                retry_after_s=self._retry_after_s(now),
            )
        if request.request_id in self._live:
            raise InvalidArgumentError(
                f"request_id '{request.request_id}' is live already; choose another",
                field="request_id",
                reason="DUPLICATE_REQUEST_ID",
                request_id=request.request_id,
            )
        if not self._live:  # what it did before it was idle says nothing of its pace
            self._ended_at.clear()
            self._ended_at.append(now)
        self._arrivals += 1
        sequence = Sequence(request, order=self._arrivals, to_prefill=request.prompt)
        self._live[request.request_id] = sequence
        if request.end_token_ids:
            self._end_tokens.add(request.end_token_ids)
        if request.deadline < math.inf:
            self._watch_deadline(sequence)
        self._enqueue(sequence)

    def abort(self, request_id: str) -> StepDeltas:
        """End a request wherever it is; empty if it is not live. Its blocks are free at once."""
        sequence = self._live.get(request_id)
        if sequence is None:
            return StepDeltas()
        return self._finish([(sequence, Finish.ABORT)])

    def expire(self, now: float) -> StepDeltas:
        """End every request whose deadline has passed; to be called before `next_step`, so that none of them
        costs another step. Their blocks are free at once."""
        passed = []
        while self._deadlines and self._deadlines[0][0] <= now:
            passed.append(heappop(self._deadlines)[2])
        if not passed:
            return NOTHING_NEW
        return self._finish([(one, Finish.DEADLINE) for one in passed if one.finish is None])

    def _watch_deadline(self, sequence: Sequence) -> None:
        """Most end long before it: they are dropped when they are the greater part, lest they pile up."""
        if len(self._deadlines) > 2 * len(self._live) + DEADLINES_KEPT:
            self._deadlines = [entry for entry in self._deadlines if entry[2].finish is None]
            heapify(self._deadlines)
        heappush(self._deadlines, (sequence.request.deadline, sequence.order, sequence))

    def take_result(self, number: int, token_ids: npt.NDArray[np.uint32], now: float) -> StepDeltas:
        """The tokens of the oldest unanswered step; returns what they mean for the requests."""
        step = self._in_flight.get(number)
        sampled = len(step.sampled_slots) if step else 0
        if step is None or sampled != len(token_ids):
            raise InvalidArgumentError(
                f"{len(token_ids)} tokens came for step {number}; expected {sampled}", reason="BAD_RESULT"
            )
        del self._in_flight[number]
        self.pace.answered(number, now)
        columns = self.running.slots
        # Rows of a tenancy that is over are of a sequence that has ended: one that yields waits for its steps.
        slots, sequences = step.slots, step.sequences
        here = columns.tenancy[slots] == step.tenancies
        if np.count_nonzero(here) < len(here):
            token_ids = token_ids[here[step.sample]]
            slots, sequences, sample = slots[here], sequences[here], step.sample[here]
        else:
            sample = step.sample
        if len(token_ids) < len(slots):
            slots, sequences = slots[sample], sequences[sample]
        columns.append(slots, token_ids, number)
        left = columns.tokens_left[slots] - 1
        columns.tokens_left[slots] = left
        if self.pace.budget.has_target:
            self.pace.budget.observe(self._intervals(slots, now), now)
        ends = []
        for row in ((left == 0) | self._end_tokens.candidates(token_ids)).nonzero()[0].tolist():
            if int(token_ids[row]) in sequences[row].request.end_token_ids:
                ends.append((sequences[row], Finish.STOP))
            elif not left[row]:
                ends.append((sequences[row], Finish.LENGTH))
        if ends:
            self._end(ends)
            self._ended_at.extend([now] * len(ends))
        if self.running.yielding:
            self.running.yield_idle()
        return StepDeltas(sequences=sequences, slots=slots, token_ids=token_ids, ends=tuple(ends))

    def take_timings(self, stage: int, numbers: Int64, times_ns: Int64) -> None:
        """Where the time of some steps went on a stage, as it reported.

        Args:
            stage: Its place in the lane, from 0.
            numbers: [n] steps.
            times_ns: [n, 6] when each reached the stage, on the stage's clock, and what it took there: the
                columns that `pipeline` names.
        """
        self.pace.reported(stage, numbers, times_ns)

    # Output

    def next_step(self, now: float) -> Step | None:
        """The next step, if there is work that may be sent now."""
        if self.full:
            return None
        yielded = self.running.num_preemptions
        prefill_waits = self._prefill_waits()
        decodes = self._pick_decodes(prefill_waits)
        prefills = self._pick_prefills(decodes) if prefill_waits else []
        # To find blocks for one, another that was already picked may have been asked to yield.
        if self.running.yielding or self.running.num_preemptions > yielded:
            decodes = decodes[self.running.slots.decoding[decodes]]
            yielding = self.running.yielding
            prefills = [
                (one, count) for one, count in prefills if one.slot >= 0 and one.order not in yielding
            ]
        if not len(decodes) and not prefills:
            # Whoever was picked has just yielded: what it gave up makes work for others.
            return self.next_step(now) if self.running.num_preemptions > yielded else None
        step = self._make_step(self._number + 1, decodes, prefills)
        self._commit(step, now)
        return step

    @property
    def pool(self) -> BlockPool:
        """KV blocks of the lane."""
        return self.running.pool

    @property
    def num_preemptions(self) -> int:
        """Sequences that gave up their blocks and were computed again."""
        return self.running.num_preemptions

    @property
    def num_prompt_tokens(self) -> int:
        """Of all requests admitted so far."""
        return self.running.num_prompt_tokens

    @property
    def num_cached_tokens(self) -> int:
        """Of those, found in the prefix cache."""
        return self.running.num_cached_tokens

    @property
    def full(self) -> bool:
        """Whether as many steps are unanswered as may be."""
        return len(self._in_flight) >= self.pace.max_in_flight

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
    def backlog(self) -> int:
        """Positions of prompts still to compute, of waiting and running requests."""
        return self.running.backlog

    @property
    def live(self) -> list[Sequence]:
        """Every request that has not ended, oldest first."""
        return sorted(self._live.values(), key=lambda sequence: sequence.order)

    def sequence(self, request_id: str) -> Sequence | None:
        """A live request's sequence."""
        return self._live.get(request_id)

    # Decodes

    def _prefill_waits(self) -> bool:
        return bool(self.running.prefilling or (self._waiting and self._may_start(self._waiting[0])))

    def _may_start(self, sequence: Sequence) -> bool:
        """Whether a slot is free and the whole of its prompt has room, lest it start only to yield."""
        return bool(self.running.slots.free) and (not self.num_running or self.running.has_room(sequence))

    def _at_hand(self) -> tuple[int, int]:
        """(prompts, their positions) that could be computed now. Those that wait for a slot or for blocks are not among
        them: large steps would not bring them on."""
        num_starting = self._num_starting()
        prompts, positions = len(self.running.prefilling) + num_starting, self.running.backlog
        if num_starting < len(self._waiting):
            starting = sum(len(sequence.to_prefill) for sequence in self._waiting[:num_starting])
            positions += starting - self._waiting_positions
        return prompts, positions

    def _queue_full(self) -> bool:
        """Those whose turn is the next step's are not counted."""
        count, most = len(self._waiting), self.limits.max_waiting
        return count >= most and count - self._num_starting() >= most

    def _num_starting(self) -> int:
        """How many of the queue have a slot and blocks for their prompts, and wait for no more than the next steps."""
        slots, blocks, size = len(self.running.slots.free), self.pool.num_free, self.limits.block_size
        count = len(self._waiting)
        if count <= slots and self._waiting_positions // size + count <= blocks:
            return count
        for index, sequence in enumerate(self._waiting[:slots]):
            blocks -= self.running.prompt_blocks(sequence)
            if blocks < 0:
                return index
        return min(count, slots)

    def _pick_decodes(self, prefill_waits: bool) -> Int64:
        columns = self.running.slots
        total = (columns.decoding & (columns.position < columns.end_position)).nonzero()[0]
        context = int(columns.position[total].sum()) if self._number % CONTEXT_STEPS == 0 else None
        self.pace.running(len(total), context, *self._at_hand())
        unseen = columns.unseen(total)
        seen = unseen <= self.limits.lookahead
        ready = total[seen]
        # Prefill keeps a part of the budget while it has work, or many decodes would starve it.
        kept = self.limits.step_tokens // PREFILL_PART if prefill_waits else 0
        most = max(self.limits.step_tokens - kept, 1)
        if prefill_waits and self.pace.num_microbatches > 1:
            # A token that is still on its way would hold up a step that has prefill to go on with.
            recent = columns.last_step[ready] > self._number + 1 - self.pace.num_microbatches
            ready = ready[~(recent & (unseen[seen] > 0))]
        if len(ready):
            ready = self._share(ready, total, most, prefill_waits)
        full = ready[columns.position[ready] == columns.num_blocks[ready] * self.limits.block_size]
        if not len(full):
            return ready
        if len(full) <= self.pool.num_free:
            self.running.grow_all(full)
            return ready
        # To find a block for one, another may yield, also one looked at before: ask who is left at the end.
        grown = [
            slot
            for slot in full.tolist()
            if (one := columns.sequences[slot]) is not None and self.running.grow(one)
        ]
        left_out = np.setdiff1d(full, grown)
        return ready[columns.decoding[ready] & ~np.isin(ready, left_out)]

    def _share(self, ready: Int64, total: Int64, most: int, prefill_waits: bool) -> Int64:
        """Of the ready ones, one microbatch's share, by cost: those that waited longest.

        Rows that ran together go on together if they are about a share. A row whose token is still on its way
        and that ran later would make the others wait for it, so it is taken only to fill a small step.
        """
        columns, pace = self.running.slots, self.pace
        if pace.num_microbatches == 1 and len(ready) <= most:
            return ready
        last, positions = columns.last_step[ready], columns.position[ready]
        share = pace.weight(columns.position, total) / pace.num_microbatches
        lightest = float(pace.row_weights(positions[positions.argmin()]))
        slack = max(SLACK * share, lightest)
        longest = last == last[last.argmin()]
        together: Int64 = ready[longest]
        weighs = pace.weight(columns.position, together)
        if abs(weighs - share) <= slack:
            return together[:most]
        order = np.argsort(last, kind="stable")
        ready, last = ready[order], last[order]
        sums = np.cumsum(pace.row_weights(positions[order]))
        count = max(int(np.searchsorted(sums, share + lightest / 2, side="right")), 1)
        if weighs < share / 8 and not prefill_waits:
            # A few that are left over go with a whole group, or the same few would be left over again and again.
            groups = np.flatnonzero(np.r_[last[1:] != last[:-1], True]) + 1
            about = groups[np.abs(sums[groups - 1] - share) <= slack]
            count = int(about[0]) if len(about) else count
        if count > len(together):
            free = (last == last[0]) | (columns.unseen(ready) == 0)
            num_free = len(free) if free.all() else int(free.argmin())
            # More groups than there should be in flight have to become fewer, at the price of a wait.
            crowded = np.count_nonzero(last[1:] != last[:-1]) >= pace.num_microbatches
            if count > num_free and sums[num_free - 1] >= share / 2 and not crowded:
                count = num_free
        return np.sort(ready[: min(count, most)])

    # Prefill

    def _pick_prefills(self, decodes: Int64) -> list[tuple[Sequence, int]]:
        """(sequence, positions) of the chunks that fit beside the decodes."""
        running = self.running
        tokens = self.limits.step_tokens - len(decodes)
        context = int(running.slots.position[decodes].sum()) + len(decodes)
        allowance = self.pace.allowance(len(decodes), context)
        chunks: list[tuple[Sequence, int]] = []

        def take(sequence: Sequence) -> int:
            nonlocal tokens
            position = int(running.slots.position[sequence.slot])
            most = min(tokens, allowance.most(position, len(sequence.to_prefill) - position))
            count = running.chunk(sequence, position, most) if most > 0 else 0
            if count:
                chunks.append((sequence, count))
                allowance.spend(position, count)
                tokens -= count
            return count

        for sequence in list(running.prefilling.values()):
            if tokens <= 0:
                return chunks
            # A chunk for one may have made a younger one yield.
            if sequence.slot >= 0 and sequence.order in running.prefilling:
                take(sequence)
        while tokens > 0 and self._waiting and not running.yielding:
            # Blocks of cached prefixes cost no time, and stages have room for so many in a step and those of one prompt.
            if len(running.changes.append_slots) >= self.limits.step_tokens:
                break
            sequence = self._waiting[0]
            if not self._may_start(sequence) or not allowance.most(0, len(sequence.to_prefill)):
                break
            del self._waiting[0]
            self._waiting_positions -= len(sequence.to_prefill)
            running.admit(sequence)
            if not take(sequence):
                break
        return chunks

    # Steps

    def _make_step(self, number: int, decodes: Int64, prefills: list[tuple[Sequence, int]]) -> Step:
        columns = self.running.slots
        inputs = columns.last_step[decodes]
        newest_input = int(inputs[inputs.argmax()]) if len(decodes) else 0
        if not prefills:
            # What that step sampled has its token from it, unless a later one has sampled it since.
            earlier = self._sampled.get(newest_input, decodes[:0])
            same_rows = len(earlier) == len(decodes) and np.count_nonzero(earlier == decodes) == len(decodes)
            return Step(
                number=number,
                changes=self.running.take_changes(),
                slots=decodes,
                counts=self._ones[: len(decodes)],
                input_steps=inputs.astype(np.uint64),
                tokens=[],
                sample=self._all[: len(decodes)],
                sequences=columns.sequences[decodes],
                tenancies=columns.tenancy[decodes],
                num_decodes=len(decodes),
                newest_input=newest_input,
                same_rows_as=newest_input if same_rows else 0,
            )
        tokens, ends = [], []
        for sequence, count in prefills:
            position = int(columns.position[sequence.slot])
            tokens.append(sequence.to_prefill[position : position + count])
            ends.append(position + count == len(sequence.to_prefill))
        num_decodes, num_rows = len(decodes), len(decodes) + len(prefills)
        slots, counts = np.empty(num_rows, np.int64), np.ones(num_rows, np.int64)
        input_steps, sample = np.zeros(num_rows, np.uint64), np.ones(num_rows, np.bool_)
        slots[:num_decodes], input_steps[:num_decodes] = decodes, inputs
        slots[num_decodes:] = [sequence.slot for sequence, _ in prefills]
        counts[num_decodes:] = [count for _, count in prefills]
        sample[num_decodes:] = ends
        return Step(
            number=number,
            changes=self.running.take_changes(),
            slots=slots,
            counts=counts,
            input_steps=input_steps,
            tokens=tokens,
            sample=sample,
            sequences=columns.sequences[slots],
            tenancies=columns.tenancy[slots],
            num_decodes=len(decodes),
            newest_input=newest_input,
        )

    def _commit(self, step: Step, now: float) -> None:
        """The step will be sent: every column moves on as if it had run."""
        columns, slots, decodes = self.running.slots, step.slots, step.num_decodes
        sampled = step.sampled_slots
        self._number = step.number
        self._in_flight[step.number] = step
        self._sampled[step.number] = sampled
        self._sampled.pop(step.number - ROWS_KEPT, None)
        starts = columns.position[slots]
        positions = starts + step.counts
        columns.position[slots] = positions
        columns.last_step[slots] = step.number
        self.pace.sent(
            step.number,
            decodes,
            int(starts[:decodes].sum()) + decodes,
            starts[decodes:],
            step.counts[decodes:],
            step.newest_input,
            now,
        )
        if not step.tokens:
            return
        prefills = step.sequences[decodes:].tolist()
        for sequence, position in zip(prefills, positions[decodes:].tolist(), strict=True):
            sequence.prefill_steps.append(step.number)
            if self.limits.prefix_cache:
                self.running.publish(sequence, position, sequence.to_prefill)
            if position == len(sequence.to_prefill):
                self.running.prefilling.pop(sequence.order, None)
        columns.decoding[sampled] = True
        self.running.backlog -= int(step.counts[decodes:].sum())

    def _intervals(self, slots: Int64, now: float) -> npt.NDArray[np.float64]:
        """Seconds since the last token of each, of those that had one."""
        before = self.running.slots.last_token_at[slots]
        self.running.slots.last_token_at[slots] = now
        return now - before[before > 0]

    # Coming and leaving

    def _enqueue(self, sequence: Sequence) -> None:
        self.running.backlog += len(sequence.to_prefill)
        self._waiting_positions += len(sequence.to_prefill)
        insort(self._waiting, sequence, key=lambda waiting: waiting.waits_before)

    def _finish(self, ends: list[tuple[Sequence, Finish]]) -> StepDeltas:
        self._end(ends)
        return StepDeltas(ends=tuple(ends))

    def _end(self, ends: list[tuple[Sequence, Finish]]) -> None:
        for sequence, finish in ends:
            sequence.finish = finish
            del self._live[sequence.request.request_id]
            if sequence.slot < 0:
                self.running.backlog -= len(sequence.to_prefill)
                self._waiting_positions -= len(sequence.to_prefill)
                self._waiting.remove(sequence)
        if running := [sequence for sequence, _ in ends if sequence.slot >= 0]:
            self.running.vacate(running)

    def _retry_after_s(self, now: float) -> float:
        """Until about a tenth of the queue has got on, at the pace at which requests ended lately."""
        if len(self._ended_at) < 2 or now <= self._ended_at[0]:
            return 1.0
        pace = (len(self._ended_at) - 1) / (now - self._ended_at[0])
        return min(max(len(self._waiting) / 10 / pace, RETRY_S[0]), RETRY_S[1])
