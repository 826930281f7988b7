"""The judge is worth its name: the random models say many things, and a wrong answer is found out."""

from __future__ import annotations

import statistics

import pytest
from models_for_tests import INITIALIZER_RANGE, SHAPES
from prompts_for_tests import PROMPT_LENGTHS, make_prompt
from reference import Ledger, Reference


@pytest.mark.parametrize("shape", SHAPES)
def test_random_models_are_worth_comparing(shape: str, references: dict[str, Reference]) -> None:
    assert INITIALIZER_RANGE >= 0.2
    vocab_size = SHAPES[shape]["vocab_size"]
    answers = [references[shape].greedy(make_prompt(length, vocab_size), 48) for length in PROMPT_LENGTHS]
    distinct = [len(set(answer)) for answer in answers]
    print(shape, sorted(distinct))
    assert statistics.median(distinct) >= 30
    assert len({tuple(answer[-8:]) for answer in answers}) == len(answers)


def test_a_wrong_token_is_found_and_the_rest_still_compared(references: dict[str, Reference]) -> None:
    prompt = make_prompt(9, SHAPES["untied"]["vocab_size"])
    reference, ledger = references["untied"], Ledger()
    tokens = reference.greedy(prompt, 24)
    reference.check(prompt, tokens, reference.forced(prompt, tokens).numpy(), ledger=ledger)
    assert (ledger.num_sequences, ledger.num_tokens, ledger.num_excused) == (1, 24, 0)
    wrong = [*tokens[:10], (tokens[10] + 1) % 100, *tokens[11:]]
    with pytest.raises(AssertionError, match="token 10 after a prompt of 9"):
        reference.check(prompt, wrong, ledger=ledger)
    with pytest.raises(AssertionError, match="logits after a prompt of 9"):
        reference.check(prompt, tokens, reference.forced(prompt, tokens).numpy() + 0.002, ledger=ledger)


def test_more_than_one_divergence_in_a_hundred_is_too_many() -> None:
    assert not Ledger(num_sequences=100, num_excused=1).too_many_excused
    assert Ledger(num_sequences=199, num_excused=2).too_many_excused
