"""The requests that the parity tests ask, and the comparison of a whole run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mesh_for_tests import Answer, Run
from reference import Reference

from stagemesh.router.scheduler import Request, Sampling

GREEDY = Sampling(temperature=0.0)
PROMPT_LENGTHS = (1, 2, 3, 7, 8, 9, 13, 16, 17, 23, 24, 31, 33, 40, 47, 60)
ANSWER_LENGTHS = (48, 24, 33, 27)
SCARCE_BLOCKS, SCARCE_BLOCK_SIZE = 12, 4
"""KV memory that a few short prompts fit and their answers do not."""


def make_prompt(length: int, vocab_size: int, seed: int = 0) -> list[int]:
    """Random tokens."""
    generator = np.random.default_rng((seed, length))
    return generator.integers(0, vocab_size, length).tolist()


def make_request(
    name: str, prompt: Sequence[int], max_tokens: int, *, sampling: Sampling = GREEDY, priority: int = 0
) -> Request:
    """A request that ignores end tokens."""
    return Request(
        request_id=name,
        prompt=np.array(prompt, np.uint32),
        max_tokens=max_tokens,
        sampling=sampling,
        priority=priority,
    )


def sixteen_requests(vocab_size: int) -> list[Request]:
    """Greedy ones of sixteen lengths."""
    return [
        make_request(
            f"r{index}", make_prompt(length, vocab_size), ANSWER_LENGTHS[index % len(ANSWER_LENGTHS)]
        )
        for index, length in enumerate(PROMPT_LENGTHS)
    ]


def check_answer(reference: Reference, answer: Answer) -> None:
    """A finished greedy answer is the reference's, tokens and logits."""
    assert len(answer.token_ids) == answer.request.max_tokens
    reference.check(answer.request.prompt.tolist(), answer.token_ids, np.stack(answer.logits))


def check_run(reference: Reference, run: Run) -> None:
    """Every answer of a run is."""
    assert run.answers
    for answer in run.answers.values():
        check_answer(reference, answer)


def crowd_out(run: Run) -> None:
    """After each result: once all have begun, one with priority comes who needs every block."""
    if "hog" not in run.answers and all(answer.token_ids for answer in run.answers.values()):
        run.submit(make_request("hog", [5, 6], SCARCE_BLOCKS * SCARCE_BLOCK_SIZE - 1, priority=1))
