"""However a lane is driven, the tokens are transformers': lookahead, chunks, KV memory, order of arrival."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from conftest import MeshOf
from mesh_for_tests import UNLIMITED, Drive, Run
from models_for_tests import SHAPES
from prompts_for_tests import (
    SCARCE_BLOCK_SIZE,
    SCARCE_BLOCKS,
    check_answer,
    check_run,
    crowd_out,
    make_prompt,
    make_request,
    sixteen_requests,
)
from reference import Reference

from stagemesh.router.scheduler import Request
from stagemesh.wire import frame

VOCAB_SIZE = SHAPES["untied"]["vocab_size"]
LOOKAHEADS, CHUNKS, SMALL_KV, PREFIX_CACHE, STAGES = (
    (0, 1, 2),
    (1, 7, 64, UNLIMITED),
    (True, False),
    (True, False),
    (1, 2, 3, 4),
)
# (lookahead, chunk, small KV, prefix cache, stages): every two values of any two columns meet.
PAIRWISE = [
    (
        LOOKAHEADS[(chunk + 2 * stages) % 3],
        CHUNKS[chunk],
        SMALL_KV[(chunk + stages) % 2 ^ (chunk // 2)],
        PREFIX_CACHE[(stages // 2 + chunk) % 2],
        STAGES[stages],
    )
    for chunk, stages in product(range(4), range(4))
]


def test_the_table_covers_every_pair() -> None:
    columns = (LOOKAHEADS, CHUNKS, SMALL_KV, PREFIX_CACHE, STAGES)
    for (one, left), (other, right) in combinations(enumerate(columns), 2):
        assert {(row[one], row[other]) for row in PAIRWISE} == set(product(left, right))


def few_requests() -> list[Request]:
    """Six whose prompts span several chunks of 7 and blocks of 4."""
    return [
        make_request(f"r{length}", make_prompt(length, VOCAB_SIZE), 12 + length % 5)
        for length in (1, 4, 11, 16, 22, 37)
    ]


def ask_again(run: Run) -> None:
    """Once the longest has its answer, somebody asks the same and goes on from the answer."""
    name = "r37"
    if "again" not in run.answers and run.scheduler.sequence(name) is None:
        request = run.answers[name].request
        run.submit(replace(request, request_id="again"))
        whole = np.concatenate((request.prompt, np.array(run.answers[name].token_ids, np.uint32)))
        run.submit(replace(request, request_id="goes on", prompt=whole, max_tokens=8))


@pytest.mark.parametrize(("lookahead", "chunk", "small_kv", "prefix_cache", "stages"), PAIRWISE)
def test_pairwise(
    lookahead: int,
    chunk: int,
    small_kv: bool,
    prefix_cache: bool,
    stages: int,
    mesh_of: MeshOf,
    references: dict[str, Reference],
) -> None:
    drive = Drive(
        lookahead=lookahead,
        step_tokens=chunk,
        num_blocks=SCARCE_BLOCKS if small_kv else 0,
        prefix_cache=prefix_cache,
        # Steps of one position: the pipeline must be deep enough for all to begin.
        depth=12 if chunk == 1 else 0,
        seed=stages,
    )
    mesh = mesh_of("untied", *[1] * stages, block_size=SCARCE_BLOCK_SIZE)
    if small_kv:
        requests = [
            make_request(f"r{length}", make_prompt(length, VOCAB_SIZE), 36) for length in (3, 5, 6, 8)
        ]
        run = mesh.run(requests, drive, after_result=crowd_out)
        preempted = {name for name, answer in run.answers.items() if answer.num_preemptions}
        assert preempted == run.answers.keys() - {"hog"}
    else:
        run = mesh.run(few_requests(), drive, after_result=ask_again)
        assert not run.scheduler.num_preemptions
        assert (run.scheduler.num_cached_tokens > 0) == prefix_cache
    assert max(step.num_tokens for step in run.steps) <= chunk
    check_run(references["untied"], run)


@pytest.mark.parametrize("held_results", [0, 2])
def test_late_results_and_any_order_of_arrival(
    held_results: int, mesh_of: MeshOf, references: dict[str, Reference]
) -> None:
    drive = Drive(lookahead=2, depth=5, held_results=held_results, step_tokens=48, seed=held_results)
    check_run(references["untied"], mesh_of("untied", 1, 2, 1).run(sixteen_requests(VOCAB_SIZE)[::2], drive))


def test_permuted_block_tables_give_equal_tokens(mesh_of: MeshOf, references: dict[str, Reference]) -> None:
    mesh, requests = mesh_of("untied", 1, 1), sixteen_requests(VOCAB_SIZE)
    plain = mesh.run(requests, Drive(seed=3))
    permuted = mesh.run(requests, Drive(seed=3, permute_blocks=True))
    assert [step.slots.tolist() for step in plain.steps] == [step.slots.tolist() for step in permuted.steps]
    assert all(permuted.answers[name].token_ids == answer.token_ids for name, answer in plain.answers.items())
    check_run(references["untied"], permuted)


def test_unchanged_steps_repeat_the_rows_of_an_earlier_one(
    mesh_of: MeshOf, references: dict[str, Reference]
) -> None:
    run = mesh_of("untied", 1, 1, 1).run(sixteen_requests(VOCAB_SIZE))
    assert sum(step.same_rows_as > 0 for step in run.steps) > len(run.steps) / 4
    check_run(references["untied"], run)


def test_tensors_of_many_frames(
    mesh_of: MeshOf, references: dict[str, Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame, "MAX_FRAME_BYTES", 1000)
    check_run(references["untied"], mesh_of("untied", 1, 1, 1).run(sixteen_requests(VOCAB_SIZE)))


def test_one_that_joins_is_in_the_next_step(mesh_of: MeshOf, references: dict[str, Reference]) -> None:
    joined_at = []

    def join(run: Run) -> None:
        if not joined_at and len(run.answers["a"].token_ids) == 5:
            run.submit(make_request("b", make_prompt(30, VOCAB_SIZE), 24))
            joined_at.append(len(run.steps))

    run = mesh_of("untied", 1, 1).run([make_request("a", make_prompt(8, VOCAB_SIZE), 40)], after_result=join)
    joined = run.steps[joined_at[0]]
    assert "b" in [sequence.request.request_id for sequence in joined.sequences]
    check_run(references["untied"], run)


def test_those_that_leave_do_not_disturb_the_others(
    mesh_of: MeshOf, references: dict[str, Reference]
) -> None:
    """Their steps in flight run all the same, and write to slots and blocks that others get at once."""
    requests = sixteen_requests(VOCAB_SIZE)
    gone = {"r2", "r9", "r15"}

    def leave(run: Run) -> None:
        for name in gone:
            if len(run.answers[name].token_ids) == 6 and len(run.scheduler.abort(name)):
                run.submit(make_request(f"after {name}", make_prompt(21, VOCAB_SIZE), 24))

    drive = Drive(lookahead=2, depth=4, held_results=3, num_blocks=150)
    run = mesh_of("untied", 1, 1, 1).run(requests, drive, after_result=leave)
    assert len(run.answers) == len(requests) + len(gone)
    for name, answer in run.answers.items():
        if name not in gone:
            check_answer(references["untied"], answer)
        else:
            assert len(answer.token_ids) < answer.request.max_tokens


def test_end_tokens_found_late_cost_nobody_a_token(mesh_of: MeshOf, references: dict[str, Reference]) -> None:
    prompt = make_prompt(12, VOCAB_SIZE)
    tokens = references["untied"].greedy(prompt, 24)
    end = next(place for place in range(8, 24) if tokens[place] not in tokens[:place])
    ending = replace(make_request("ends", prompt, 40), end_token_ids=frozenset({tokens[end]}))
    run = mesh_of("untied", 1, 1).run([ending, *few_requests()], Drive(lookahead=2, depth=4, held_results=3))
    assert run.answers.pop("ends").token_ids == tokens[: end + 1]
    check_run(references["untied"], run)
