"""The slot table of a stage: what steps do to it, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from stagemesh.stage.engine import slots as slots_module
from stagemesh.stage.engine.batch import Batch
from stagemesh.stage.engine.slots import SlotTable
from stagemesh.v1 import stage_pb2
from stagemesh.wire.columns import F32, U8, U32, U64, pack
from stagemesh.wire.errors import InvalidArgumentError


def table() -> SlotTable:
    return SlotTable(max_slots=4, max_blocks=6, block_size=4, num_blocks=20)


def admissions(slots: Sequence[int], positions: Sequence[int] | None = None) -> stage_pb2.Admissions:
    count = len(slots)
    return stage_pb2.Admissions(
        slots=pack(slots, U32),
        positions=pack(positions or [0] * count, U32),
        seeds=pack([2**64 - 1 - slot for slot in slots], U64),
        temperatures=pack([slot / 4 for slot in slots], F32),
        top_ks=pack(slots, U32),
        top_ps=pack([0.5] * count, F32),
    )


def rows(
    slots: Sequence[int],
    counts: Sequence[int] | None = None,
    *,
    inputs: Sequence[int] | None = None,
    tokens: Sequence[int] = (),
    sample: Sequence[int] | None = None,
) -> stage_pb2.Rows:
    return stage_pb2.Rows(
        slots=pack(slots, U32),
        counts=pack(counts, U32) if counts else b"",
        input_steps=pack(inputs, U64) if inputs else b"",
        tokens=pack(tokens, U32),
        sample=pack(sample, U8) if sample else b"",
    )


def step(
    number: int,
    work: stage_pb2.Rows | int,
    *,
    admit: stage_pb2.Admissions | None = None,
    release: Sequence[int] = (),
    append: Sequence[tuple[int, int]] = (),
) -> stage_pb2.Step:
    return stage_pb2.Step(
        number=number,
        release_slots=pack(release, U32),
        admissions=admit,
        append_slots=pack([slot for slot, _ in append], U32),
        append_blocks=pack([block for _, block in append], U32),
        rows=work if isinstance(work, stage_pb2.Rows) else None,
        same_rows_as=work if isinstance(work, int) else None,
    )


def run(slots: SlotTable, message: stage_pb2.Step, sampled: Sequence[int] | None = None) -> Batch:
    """Apply and begin a step, and deliver its tokens if they are given."""
    batch = slots.apply(message)
    slots.begin(batch)
    if sampled is not None:
        slots.deliver(batch.number, np.array(sampled))
    return batch


def two_decoding() -> SlotTable:
    """Slots 2 and 0, prompts of 3 and 5 tokens, that step 1 sampled."""
    slots = table()
    first = rows([2, 0], [3, 5], tokens=range(8))
    run(slots, step(1, first, admit=admissions([2, 0]), append=[(2, 7), (0, 9), (0, 3)]), [50, 60])
    return slots


def test_a_prefill_batch() -> None:
    slots = table()
    work = rows([2, 0], [3, 5], tokens=range(10, 18), sample=[0, 1])
    batch = run(slots, step(1, work, admit=admissions([2, 0]), append=[(0, 9), (2, 7), (0, 3)]))
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert batch.cells.tolist() == [28, 29, 30, 36, 37, 38, 39, 12]
    assert batch.tables.tolist() == [[7, 0], [9, 3]]
    assert (batch.offsets.tolist(), batch.starts.tolist(), batch.newest_input) == ([0, 3], [0, 0], 0)
    assert slots.input_tokens(batch).tolist() == list(range(10, 18))
    assert (batch.sampled_slots.tolist(), batch.sampled_rows.tolist()) == ([0], [7])
    sampling = batch.sampling
    assert (sampling.positions.tolist(), sampling.seeds.tolist()) == ([5], [2**64 - 1])
    assert (sampling.temperatures.tolist(), sampling.top_ks.tolist(), sampling.top_ps.tolist()) == (
        [0],
        [0],
        [0.5],
    )


def test_decode_rows_take_the_token_of_the_step_they_name() -> None:
    slots = two_decoding()
    batch = run(slots, step(2, rows([0, 2], inputs=[1, 1])))
    assert (batch.positions.tolist(), batch.cells.tolist(), batch.newest_input) == ([5, 3], [13, 31], 1)
    assert slots.input_tokens(batch).tolist() == [60, 50]


def test_decodes_and_a_chunk_in_one_step() -> None:
    slots = two_decoding()
    work = rows([2, 1], [1, 2], inputs=[1, 0], tokens=[70, 71])
    batch = run(slots, step(2, work, admit=admissions([1]), append=[(1, 5)]))
    assert slots.input_tokens(batch).tolist() == [50, 70, 71]
    assert batch.sampled_rows.tolist() == [0, 2]


def test_same_rows_as_an_earlier_step() -> None:
    slots = two_decoding()
    run(slots, step(2, 1, append=[(2, 4)]), [51, 61])
    batch = run(slots, step(3, 2))
    assert (batch.slots.tolist(), batch.counts.tolist(), batch.positions.tolist()) == ([2, 0], [1, 1], [4, 6])
    assert batch.cells.tolist() == [16, 14]
    assert slots.input_tokens(batch).tolist() == [51, 61]
    # It repeats those the step sampled, not its other rows.
    slots = table()
    first = rows([2, 0], [3, 5], tokens=range(8), sample=[1, 0])
    run(slots, step(1, first, admit=admissions([2, 0]), append=[(2, 7), (0, 9), (0, 3)]), [50])
    assert slots.apply(step(2, 1)).slots.tolist() == [2]


def test_several_blocks_for_a_slot_in_one_step() -> None:
    slots = table()
    append = [(1, 8), (3, 2), (1, 4), (1, 6), (3, 0)]
    run(slots, step(1, rows([1, 3], [9, 5], tokens=range(14)), admit=admissions([1, 3]), append=append))
    assert slots.tables[1, :3].tolist() == [8, 4, 6]
    assert slots.tables[3, :2].tolist() == [2, 0]
    run(slots, step(2, rows([1], [8], tokens=range(8)), append=[(1, 11), (1, 10)]))
    assert slots.tables[1, :5].tolist() == [8, 4, 6, 11, 10]


def test_late_tokens_of_a_slot_given_away_are_dropped() -> None:
    slots = two_decoding()
    run(slots, step(2, 1, append=[(2, 4)]))
    # Slot 2 changes hands while step 2 is in flight.
    work = rows([2], [2], tokens=[80, 81])
    run(slots, step(3, work, release=[2], admit=admissions([2]), append=[(2, 12)]))
    slots.deliver(2, np.array([51, 61]))
    assert (slots.tokens[2], slots.tokens[0]) == (50, 61)
    slots.deliver(3, np.array([90]))
    batch = run(slots, step(4, rows([2, 0], inputs=[3, 2])))
    assert slots.input_tokens(batch).tolist() == [90, 61]
    assert batch.positions.tolist() == [2, 6]
    assert batch.tables[0].tolist()[:1] == [12]


def test_an_admission_may_begin_past_the_start() -> None:
    slots = table()
    work = rows([1], [2], tokens=[1, 2])
    batch = run(slots, step(1, work, admit=admissions([1], [4]), append=[(1, 8), (1, 4)]))
    assert (batch.starts.tolist(), batch.cells.tolist()) == ([4], [16, 17])


def test_a_step_may_come_before_the_tokens_it_needs() -> None:
    slots = two_decoding()
    second = run(slots, step(2, 1, append=[(2, 4)]))
    third = slots.apply(step(3, 2))
    assert (second.newest_input, third.newest_input) == (1, 2)
    slots.begin(third)
    slots.deliver(2, np.array([51, 61]))  # step 3 has sampled since: not what a later step may take
    with pytest.raises(InvalidArgumentError, match="did not sample its slot last"):
        slots.apply(step(4, 2))


def test_only_so_many_steps_may_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_module, "ROWS_KEPT", 2)
    slots = two_decoding()
    run(slots, step(2, 1, append=[(2, 4)]), [51, 61])
    run(slots, step(3, rows([2], inputs=[2])), [52])
    with pytest.raises(InvalidArgumentError, match="step 4 repeats the rows of step 1"):
        slots.apply(step(4, 1))


REFUSED: dict[str, tuple[Callable[[], stage_pb2.Step], str]] = {
    "unknown slot": (lambda: step(2, rows([4], tokens=[1])), "rows.slots names slot 4 of 4"),
    "unknown released slot": (lambda: step(2, 1, release=[9]), "release_slots names slot 9"),
    "unknown admitted slot": (lambda: step(2, 1, admit=admissions([5])), "admissions.slots names slot 5"),
    "unknown appended slot": (lambda: step(2, 1, append=[(4, 1)]), "append_slots names slot 4"),
    "unknown block": (lambda: step(2, 1, append=[(2, 20)]), "append_blocks names block 20 of 20"),
    "block past the context": (
        lambda: step(2, 1, append=[(0, b) for b in range(10, 15)]),
        "slot 0 gets block 7 of 6",
    ),
    "no block for a position": (
        lambda: step(2, rows([2], [2], tokens=[1, 2])),
        "slot 2, which has 1 blocks of 4",
    ),
    "released slot": (lambda: step(2, 1, release=[0]), "slot 0, which has 0 blocks"),
    "too few tokens": (lambda: step(2, rows([0], [2], tokens=[1])), "rows.tokens has 1 entries; expected 2"),
    "too many tokens": (lambda: step(2, rows([0], tokens=[1, 2])), "rows.tokens has 2 entries; expected 1"),
    "columns apart": (
        lambda: step(2, rows([0], [1, 1], tokens=[1])),
        "rows.counts has 2 entries; expected 1",
    ),
    "bytes cut off": (
        lambda: stage_pb2.Step(number=2, rows=stage_pb2.Rows(slots=b"\0\0\0")),
        "rows.slots has 3 bytes; expected a multiple of 4",
    ),
    "input of another step": (
        lambda: step(2, rows([0], inputs=[7])),
        "from a step that did not sample its slot last",
    ),
    "input of a new slot": (
        lambda: step(2, rows([1], inputs=[1]), admit=admissions([1]), append=[(1, 1)]),
        "from a step that did not sample its slot last",
    ),
    "unknown step to repeat": (lambda: step(2, 5), "step 2 repeats the rows of step 5"),
    "row of nothing": (lambda: step(2, rows([0], [0])), "slot 0 computes 0 positions"),
    "several positions from the ring": (
        lambda: step(2, rows([0], [2], inputs=[1])),
        "slot 0 computes 2 positions with the token of step 1",
    ),
    "a slot twice": (lambda: step(2, rows([0, 0], tokens=[1, 2])), "names a slot twice"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    make, words = REFUSED[name]
    with pytest.raises(InvalidArgumentError, match=words.replace("+", r"\+")):
        two_decoding().apply(make())


@pytest.mark.parametrize(("number", "tokens"), [(1, [1]), (1, [1, 2, 3]), (8, [1])])
def test_tokens_that_no_step_sampled_are_refused(number: int, tokens: list[int]) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{len(tokens)} tokens came for step {number}") as caught:
        two_decoding().deliver(number, np.array(tokens))
    assert caught.value.reason == "BAD_RING"
