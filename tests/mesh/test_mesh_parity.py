"""Greedy tokens of real processes are transformers', whatever the layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from mesh_calls import Answer, generate, make_prompt, make_request, read_answer
from mesh_models import check_greedy
from running_mesh import CALL_TIMEOUT_S, RunningMesh
from transformers import LlamaForCausalLM

from stagemesh.v1 import inference_pb2

LENGTHS = (1, 2, 3, 7, 15, 16, 17, 23, 31, 32, 33, 40, 47, 60, 75, 90)
MAX_TOKENS = (32, 20, 27, 24)
NUM_LAYERS = 6
LAYER_BLOCK_BYTES = 2 * 16 * 3 * 16 * 4
"""K and V of 16 tokens, 3 heads of 16 floats."""
SCARCE_BLOCKS = 20


def ask_sixteen(mesh: RunningMesh) -> dict[int, Answer]:
    """Sixteen requests at once, by the length of their prompts."""
    calls = {
        length: mesh.stub.Generate(
            make_request(make_prompt(length), MAX_TOKENS[index % len(MAX_TOKENS)]), timeout=CALL_TIMEOUT_S
        )
        for index, length in enumerate(LENGTHS)
    }
    return {length: read_answer(call) for length, call in calls.items()}


def check_sixteen(mesh: RunningMesh, reference: LlamaForCausalLM, *, batched: bool = True) -> None:
    answers = ask_sixteen(mesh)
    for index, (length, answer) in enumerate(answers.items()):
        assert len(answer.token_ids) == MAX_TOKENS[index % len(MAX_TOKENS)]
        assert answer.finish_reason == inference_pb2.FINISH_REASON_LENGTH
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (length, len(answer.token_ids))
        check_greedy(reference, make_prompt(length), answer.token_ids)
    most = max(len(step["rows"]) for step in mesh.steps())
    assert (most > 1) == batched, f"{most} rows a step at most"


@pytest.mark.parametrize(
    ("tps", "transport"), [((3, 3), "unix"), ((1, 1, 1, 1, 1), "grpc")], ids=["2 TP 3", "5"]
)
def test_layouts(
    tps: tuple[int, ...], transport: str, small: Path, reference: LlamaForCausalLM, tmp_path: Path
) -> None:
    mesh = RunningMesh(tmp_path, small, tps, router_flags=("--link-transport", transport))
    try:
        stages = mesh.wait_ready().stages
        assert {stage.link_transport for stage in stages} == {transport}
        check_sixteen(mesh, reference)
    finally:
        mesh.close()


# (lookahead, positions a step, prefix cache, scarce KV, stages): six of the pairwise cover of parity/test_drives.py.
DRIVES = [
    (0, 7, False, True, 2),
    (2, 64, True, True, 2),
    (1, 1, True, False, 1),
    (2, 2048, False, False, 4),
    (0, 64, True, False, 3),
    (1, 7, False, True, 4),
]


@pytest.mark.parametrize(("lookahead", "chunk", "prefix_cache", "scarce", "stages"), DRIVES)
def test_drives(
    lookahead: int,
    chunk: int,
    prefix_cache: bool,
    scarce: bool,
    stages: int,
    small: Path,
    reference: LlamaForCausalLM,
    tmp_path: Path,
) -> None:
    """Where KV is scarce there are 20 blocks of 16 tokens, and what is asked at once needs three times as many."""
    memory = -(-NUM_LAYERS // stages) * SCARCE_BLOCKS * LAYER_BLOCK_BYTES if scarce else 1 << 24
    flags = ("--lookahead", str(lookahead), "--step-tokens", str(chunk))
    flags += ("--prefix-cache" if prefix_cache else "--no-prefix-cache",)
    mesh = RunningMesh(
        tmp_path, small, [1] * stages, stage_flags=("--kv-memory", str(memory)), router_flags=flags
    )
    try:
        blocks = mesh.wait_ready().num_blocks
        check_sixteen(mesh, reference, batched=chunk > 1)
        assert (mesh.lane.num_preemptions > 0) == scarce
        assert max(sum(count for _, count, _ in step["rows"]) for step in mesh.steps()) <= chunk
    finally:
        mesh.close()
    if scarce:
        assert blocks == SCARCE_BLOCKS


def test_one_stage(single_mesh: RunningMesh, reference: LlamaForCausalLM) -> None:
    check_sixteen(single_mesh, reference)


def test_three_stages_the_middle_one_with_two_ranks(mesh: RunningMesh, reference: LlamaForCausalLM) -> None:
    check_sixteen(mesh, reference)


def test_an_answer_is_the_same_alone_and_in_company(mesh: RunningMesh, reference: LlamaForCausalLM) -> None:
    prompt = make_prompt(75)
    alone = generate(mesh, prompt, 24).token_ids
    assert len(set(alone)) > 10, "a random model that repeats itself shows nothing"
    check_greedy(reference, prompt, alone)
    check_greedy(reference, prompt, ask_sixteen(mesh)[75].token_ids[:24])


def test_an_end_token_ends_the_answer_and_ignore_eos_goes_past_it(
    mesh: RunningMesh, reference: LlamaForCausalLM
) -> None:
    """The model's end token is 2: a prompt is looked for whose answer has it."""
    ends = mesh.stub.GetModel(inference_pb2.GetModelRequest(), timeout=CALL_TIMEOUT_S).end_token_ids
    assert list(ends) == [2]
    calls = {
        seed: mesh.stub.Generate(make_request(make_prompt(5, seed), 120), timeout=CALL_TIMEOUT_S)
        for seed in range(12)
    }
    whole = {seed: read_answer(call).token_ids for seed, call in calls.items()}
    seed, tokens = next((seed, tokens) for seed, tokens in whole.items() if 2 in tokens[:-1])
    stopped = generate(mesh, make_prompt(5, seed), 120, ignore_eos=False)
    assert stopped.finish_reason == inference_pb2.FINISH_REASON_STOP
    assert stopped.token_ids == tokens[: tokens.index(2) + 1]


def test_a_seed_gives_the_same_tokens_alone_and_in_company(mesh: RunningMesh) -> None:
    fields = {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "seed": 7}
    alone = generate(mesh, max_tokens=24, **fields).token_ids
    other = generate(mesh, max_tokens=24, **fields | {"seed": 8}).token_ids
    calls = [
        mesh.stub.Generate(make_request(max_tokens=24, **fields | {"seed": seed}), timeout=CALL_TIMEOUT_S)
        for seed in (8, 7, 9)
    ]
    together = [read_answer(call).token_ids for call in calls]
    assert alone != other
    assert together[:2] == [other, alone]
