"""Whatever happens in whatever order, every stage of a lane is told the same steps, every request is answered, and the
log of it all replayed makes the same steps again."""

from __future__ import annotations

import asyncio
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from hypothesis import given, settings
from hypothesis import strategies as st
from scheduled_lane import make_limits, make_request

from stagemesh.router.config import RouterConfig
from stagemesh.router.lane.lane import Lane, LaneEvents
from stagemesh.router.lane.stage_link import StageLink
from stagemesh.router.scheduler import Request, Scheduler, StepDeltas
from stagemesh.router.scheduler.event_log import replay
from stagemesh.v1 import stage_pb2
from stagemesh.wire.errors import ResourceExhaustedError, StagemeshError

STAGES = ("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3")
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 20), st.integers(1, 12), st.integers(-1, 1)),
        st.tuples(st.just("abort"), st.integers(0, 40)),
        st.tuples(st.just("answer"), st.integers(1, 4)),
        st.tuples(st.just("lose")),
    ),
    max_size=60,
)


class Told:
    """What comes of each request, and that nothing comes after."""

    def __init__(self) -> None:
        self.ended: dict[str, str] = {}

    def deltas(self, deltas: StepDeltas) -> None:
        assert not {one.request.request_id for one in deltas.sequences} & set(self.ended)
        for sequence, finish in deltas.ends:
            self._end(sequence.request.request_id, finish.value)

    def lost(self, request: Request, error: StagemeshError) -> None:
        self._end(request.request_id, error.reason)

    def _end(self, name: str, how: str) -> None:
        assert name not in self.ended
        self.ended[name] = how


class Run:
    """A lane whose stages are lists of what they were told."""

    def __init__(self, told: Told, log: Path) -> None:
        config = RouterConfig(model="m", stages=STAGES, event_log=str(log))
        events = LaneEvents(
            on_deltas=told.deltas,
            on_admitted=lambda sequence: None,
            on_lost=told.lost,
            on_ready=lambda ready: None,
            on_forget=lambda: None,
        )
        self.told = told
        self.lane = Lane(config, "f" * 64, 128, events)
        self.lane._lost = asyncio.get_running_loop().create_future()
        self.sent: list[list[bytes]] = [[] for _ in STAGES]
        self.all_steps: list[bytes] = []
        """Of the epochs before."""
        self.num_answered = 0
        self.names: list[str] = []
        for stage, messages in zip(self.lane.stages, self.sent, strict=True):
            stage.send = messages.append  # type: ignore[method-assign]
        self.open()

    def open(self) -> None:
        """Of a new epoch."""
        self.lane.scheduler = Scheduler(
            make_limits(num_microbatches=3, depth=4, num_blocks=12, max_blocks=12, max_waiting=6)
        )
        self.lane.stats.open_lane(8)
        self.lane.records.clear()
        self.lane.epoch += 1
        assert self.lane._event_log
        self.lane._event_log.open(self.lane.scheduler.limits, self.lane.epoch)
        self.all_steps += self.sent[0]
        for messages in self.sent:
            messages.clear()
        self.num_answered = 0

    def happen(self, kind: str, *values: int) -> None:
        if kind == "submit":
            length, tokens, priority = values
            request = make_request(f"r{len(self.names)}", length, tokens, priority=priority)
            try:
                self.lane.submit(request)
            except ResourceExhaustedError:
                return
            self.names.append(request.request_id)
        elif kind == "abort":
            assert self.lane.scheduler
            if live := self.lane.scheduler.live:
                self.lane.abort(live[values[0] % len(live)].request.request_id)
        elif kind == "answer":
            for _ in range(values[0]):
                self.answer()
        else:
            self.lane._drop(self.lane.stages[1].lost("a test says so"))
            self.open()

    def steps(self) -> list[stage_pb2.Step]:
        return [step for data in self.sent[0] for step in stage_pb2.ExecuteRequest.FromString(data).steps]

    def answer(self) -> None:
        """The oldest step is answered, and an answer of an epoch before it comes late."""
        assert self.lane.scheduler
        if self.num_answered == len(self.steps()):
            return
        self.num_answered += 1
        step = self.lane.scheduler._in_flight[self.num_answered]
        tokens = bytes(4 * int(step.sample.sum()))
        for epoch in (self.lane.epoch - 1, self.lane.epoch):
            result = stage_pb2.StepResult(epoch=epoch, number=step.number, token_ids=tokens)
            self.lane._take_response(
                cast(StageLink, self.lane.stages[-1]), stage_pb2.ExecuteResponse(results=[result])
            )

    def check(self) -> None:
        assert self.sent[1] == self.sent[2] == self.sent[0]
        steps = self.steps()
        assert [step.number for step in steps] == list(range(1, len(steps) + 1))
        assert {step.epoch for step in steps} <= {self.lane.epoch}
        assert self.lane._lost
        assert not self.lane._lost.done(), "an answer did not fit its step"


async def run(events: list[Any], log: Path) -> None:
    one = Run(Told(), log)
    try:
        for event in events:
            one.happen(*event)
            await asyncio.sleep(0)
            one.check()
        for _ in range(2_000):
            if set(one.names) == set(one.told.ended):
                break
            one.answer()
            await asyncio.sleep(0)
        one.check()
        assert set(one.names) == set(one.told.ended), "somebody got no answer"
        assert one.lane.scheduler
        assert one.lane.scheduler.pool.num_free == 12
        assert one.lane._event_log
        one.lane._event_log.close()
        replayed = [step for step in replay(log.read_text().splitlines()) if step.logged]
        assert all(step.made == step.logged for step in replayed)
        sent = [
            step.SerializeToString()
            for data in (*one.all_steps, *one.sent[0])
            for step in stage_pb2.ExecuteRequest.FromString(data).steps
        ]
        assert [step.made for step in replayed] == sent
    finally:
        for stage in one.lane.stages:
            await stage.aclose()


@given(EVENTS)
@settings(max_examples=60, deadline=None)
def test_every_stage_is_told_the_same_steps_in_one_order(events: list[Any]) -> None:
    with TemporaryDirectory() as folder:
        asyncio.run(run(events, Path(folder) / "events.jsonl"))


async def send_two_steps(log: Path) -> None:
    one = Run(Told(), log)
    loop, told = asyncio.get_running_loop(), list[str]()

    def send(request: bytes) -> None:
        """As a stage's link does: it is written in the turn that follows."""
        told.append("made")
        loop.call_soon(told.append, "written")

    one.lane.stages[0].send = send  # type: ignore[method-assign]
    try:
        one.happen("submit", 5, 8, 0)
        for _ in range(10):
            await asyncio.sleep(0)
        assert told == ["made", "written"] * 2
    finally:
        for stage in one.lane.stages:
            await stage.aclose()


def test_a_step_is_on_its_way_before_the_next_is_made(tmp_path: Path) -> None:
    """A prompt and the token ahead of it: the first is not held up by how long it takes to form the second."""
    asyncio.run(send_two_steps(tmp_path / "events.jsonl"))
