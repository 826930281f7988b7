"""A request draws the same tokens on every layout, in every batch and after a preemption."""

from __future__ import annotations

import pytest
from conftest import MeshOf
from mesh_for_tests import Drive, Run
from models_for_tests import SHAPES
from prompts_for_tests import (
    GREEDY,
    SCARCE_BLOCK_SIZE,
    SCARCE_BLOCKS,
    crowd_out,
    make_prompt,
    make_request,
    sixteen_requests,
)
from reference import Reference

from stagemesh.router.scheduler import Request, Sampling

VOCAB_SIZE = SHAPES["untied"]["vocab_size"]
SETTINGS = {
    "warm": Sampling(temperature=0.8, seed=11),
    "hot": Sampling(temperature=2.5, seed=2**64 - 3),
    "top-k": Sampling(temperature=1.2, top_k=20, seed=12),
    "top-p": Sampling(temperature=1.5, top_p=0.9, seed=13),
    "both": Sampling(temperature=1.5, top_k=50, top_p=0.8, seed=14),
}
NUM_TOKENS = 32


def sampled_requests() -> list[Request]:
    return [
        make_request(name, make_prompt(3 + index, VOCAB_SIZE), NUM_TOKENS, sampling=sampling)
        for index, (name, sampling) in enumerate(SETTINGS.items())
    ]


def tokens_of(run: Run) -> dict[str, list[int]]:
    return {name: run.answers[name].token_ids for name in SETTINGS}


@pytest.fixture(scope="module")
def alone(mesh_of: MeshOf) -> dict[str, list[int]]:
    """Each request alone on one stage of one rank."""
    mesh = mesh_of("untied", 1)
    answers = {}
    for request in sampled_requests():
        answers[request.request_id] = mesh.run([request]).answers[request.request_id].token_ids
    return answers


def test_they_are_draws_at_all(alone: dict[str, list[int]], references: dict[str, Reference]) -> None:
    for request in sampled_requests():
        greedy = references["untied"].greedy(request.prompt.tolist(), NUM_TOKENS)
        assert alone[request.request_id] != greedy
        assert len(alone[request.request_id]) == NUM_TOKENS


@pytest.mark.parametrize("tps", [(1,), (1, 1, 1), (2,), (1, 3)], ids=lambda tps: "x".join(map(str, tps)))
def test_same_tokens_on_every_layout_and_in_company(
    tps: tuple[int, ...], mesh_of: MeshOf, alone: dict[str, list[int]]
) -> None:
    run = mesh_of("untied", *tps).run(
        [*sixteen_requests(VOCAB_SIZE)[:6], *sampled_requests()], Drive(step_tokens=32)
    )
    assert tokens_of(run) == alone


@pytest.mark.parametrize("tps", [(1,), (1, 1, 1)], ids=lambda tps: "x".join(map(str, tps)))
def test_same_tokens_after_a_preemption(
    tps: tuple[int, ...], mesh_of: MeshOf, alone: dict[str, list[int]]
) -> None:
    drive = Drive(num_blocks=SCARCE_BLOCKS, lookahead=2)
    mesh = mesh_of("untied", *tps, block_size=SCARCE_BLOCK_SIZE)
    run = mesh.run(sampled_requests(), drive, after_result=crowd_out)
    assert all(run.answers[name].num_preemptions for name in SETTINGS)
    assert tokens_of(run) == alone


def test_another_seed_gives_other_tokens(mesh_of: MeshOf, alone: dict[str, list[int]]) -> None:
    prompt = make_prompt(3, VOCAB_SIZE)
    seeds = [
        make_request(f"seed {seed}", prompt, NUM_TOKENS, sampling=Sampling(temperature=0.8, seed=seed))
        for seed in range(8)
    ]
    run = mesh_of("untied", 2).run(seeds)
    assert len({tuple(answer.token_ids) for answer in run.answers.values()} | {tuple(alone["warm"])}) == 9


@pytest.mark.parametrize(
    "narrow",
    [Sampling(temperature=1.5, top_k=1), Sampling(temperature=1.5, top_p=1e-6)],
    ids=["top-k 1", "top-p 0"],
)
def test_what_leaves_one_token_is_greedy(
    narrow: Sampling, mesh_of: MeshOf, references: dict[str, Reference]
) -> None:
    prompts = [make_prompt(length, VOCAB_SIZE) for length in (4, 13, 26)]
    requests = [
        make_request(f"r{place}", prompt, NUM_TOKENS, sampling=narrow) for place, prompt in enumerate(prompts)
    ]
    run = mesh_of("untied", 2).run(
        [*requests, make_request("greedy", prompts[0], NUM_TOKENS, sampling=GREEDY)]
    )
    for place, prompt in enumerate(prompts):
        references["untied"].check(prompt, run.answers[f"r{place}"].token_ids)
    references["untied"].check(prompts[0], run.answers["greedy"].token_ids)
