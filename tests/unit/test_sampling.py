"""Sampling: greedy, Gumbel noise, top-k and top-p, whole and sharded over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from batches_for_tests import columns

from stagemesh.model.deal import deal_evenly
from stagemesh.stage.engine.batch import SamplingColumns
from stagemesh.stage.group import RankGroup
from stagemesh.stage.sampling.noise import gumbel, mix
from stagemesh.stage.sampling.sampler import Sampler

# 99.9 % of chi-square with so many degrees of freedom stays below.
CHI_SQUARE = {3: 16.3, 4: 18.5, 5: 20.5, 7: 24.3}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small products on two threads wait for each other wherever the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class ListGroup(RankGroup):
    """Ranks that meet in a list; each is a thread."""

    def __init__(self, rank: int, parts: list[torch.Tensor], barrier: Barrier) -> None:
        super().__init__(rank, len(parts))
        self._parts, self._barrier = parts, barrier

    def all_gather_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._meet(tensor))

    def all_gather_columns(self, tensor: torch.Tensor, widths: list[int]) -> torch.Tensor:
        assert tensor.shape[1] == widths[self.rank]
        return torch.cat(self._meet(tensor), dim=1)

    def _meet(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._parts[self.rank] = tensor
        self._barrier.wait(10)
        parts = list(self._parts)
        self._barrier.wait(10)
        return parts


def sample(logits: torch.Tensor, parameters: SamplingColumns, *, tp: int = 1) -> list[int]:
    """Token ids by a group of ranks, which must agree."""
    vocab_size = logits.shape[1]
    shards = list(deal_evenly(vocab_size, tp))
    if tp == 1:
        return Sampler(RankGroup(), shards[0], vocab_size, shards).sample(logits, parameters).tolist()
    parts, barrier = [torch.empty(0)] * tp, Barrier(tp)

    def one(rank: int) -> list[int]:
        part = logits[:, shards[rank].start : shards[rank].stop].contiguous()
        sampler = Sampler(ListGroup(rank, parts, barrier), shards[rank], vocab_size, shards)
        return sampler.sample(part, parameters).tolist()

    with ThreadPoolExecutor(tp) as threads:
        answers = list(threads.map(one, range(tp)))
    assert all(answer == answers[0] for answer in answers)
    return answers[0]


def chi_square(tokens: list[int], probabilities: list[float]) -> float:
    observed = np.bincount(tokens, minlength=len(probabilities))
    expected = np.array(probabilities) * len(tokens)
    assert not observed[expected == 0].any()
    kept = expected > 0
    return float((((observed - expected) ** 2)[kept] / expected[kept]).sum())


def draws(probabilities: list[float], count: int, *, by: str, **parameters: float) -> list[int]:
    """Independent draws: over seeds, or over positions of one seed."""
    logits = torch.tensor(probabilities).log().expand(count, -1).contiguous()
    keys = {"seeds": range(count)} if by == "seeds" else {"seeds": [42] * count, "positions": range(count)}
    return sample(logits, columns(count, **keys, **parameters))


def test_the_mixing_function_is_splitmix64() -> None:
    # First outputs for seed 1234567, from the reference implementation.
    gamma, state = 0x9E3779B97F4A7C15, 1234567
    states = [(state + gamma * n) % 2**64 for n in (1, 2, 3)]
    mixed = mix(torch.from_numpy(np.array(states, np.uint64).view(np.int64))).numpy().view(np.uint64)
    assert mixed.tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_noise_depends_on_seed_position_and_token_alone() -> None:
    seeds, positions = torch.tensor([5, -1, 5]), torch.tensor([9, 9, 10])
    whole = gumbel(seeds, positions, torch.arange(40))
    assert torch.equal(whole[:, 13:29], gumbel(seeds, positions, torch.arange(13, 29)))
    assert torch.equal(whole[1:2], gumbel(seeds[1:2], positions[1:2], torch.arange(40)))
    assert len(set(whole.flatten().tolist())) == whole.numel()


def test_noise_is_gumbel_distributed() -> None:
    noise = gumbel(torch.arange(100), torch.zeros(100, dtype=torch.int64), torch.arange(1000)).double()
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772) < 0.02
    assert abs(noise.var() - np.pi**2 / 6) < 0.04
    uniform = (-(-noise).exp()).exp()
    assert chi_square((uniform * 8).long().clamp(0, 7).flatten().tolist(), [1 / 8] * 8) < CHI_SQUARE[7]


@pytest.mark.parametrize("by", ["seeds", "positions"])
def test_draws_follow_the_softmax(by: str) -> None:
    probabilities = [0.4, 0.3, 0.15, 0.1, 0.04, 0.01]
    tokens = draws(probabilities, 20000, by=by, temperature=1.0)
    assert chi_square(tokens, probabilities) < CHI_SQUARE[5]
    warmed = np.sqrt(probabilities) / np.sqrt(probabilities).sum()
    assert chi_square(draws(probabilities, 20000, by=by, temperature=2.0), warmed.tolist()) < CHI_SQUARE[5]


def test_top_k_and_top_p_leave_the_softmax_of_the_rest() -> None:
    probabilities = [0.1, 0.4, 0.05, 0.3, 0.15]
    tokens = draws(probabilities, 20000, by="seeds", temperature=1.0, top_k=3)
    assert chi_square(tokens, [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85]) < CHI_SQUARE[4]
    # 0.4 + 0.3 do not reach 0.75; the token that crosses it stays.
    tokens = draws(probabilities, 20000, by="seeds", temperature=1.0, top_p=0.75)
    assert chi_square(tokens, [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85]) < CHI_SQUARE[4]
    # Top-k first: of the two best, 0.4 is four sevenths, so that 0.55 is reached with it alone.
    assert set(draws(probabilities, 500, by="seeds", temperature=1.0, top_k=2, top_p=0.55)) == {1}
    assert set(draws(probabilities, 500, by="seeds", temperature=1.0, top_p=0.55)) == {1, 3}


def test_successive_seeds_and_positions_are_not_alike() -> None:
    """Pairs of neighbouring draws are independent: counters mixed badly would show here."""
    for by in ("seeds", "positions"):
        tokens = draws([0.5, 0.5], 20000, by=by, temperature=1.0)
        pairs = [2 * one + other for one, other in zip(tokens[::2], tokens[1::2], strict=True)]
        assert chi_square(pairs, [0.25] * 4) < CHI_SQUARE[3]


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_greedy_takes_the_lowest_of_equal_ids(tp: int) -> None:
    logits = torch.zeros(5, 11)
    logits[1, [4, 9]] = 1.0
    logits[2, [10, 6, 5]] = 2.0
    logits[3] = -5.0
    logits[4, 10] = 0.1
    assert sample(logits, columns(5), tp=tp) == [0, 4, 5, 0, 10]


@pytest.mark.parametrize("tp", [2, 3])
def test_ranks_draw_what_one_rank_draws(tp: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(60, 23) * 3
    parameters = columns(
        60,
        positions=range(60),
        temperature=np.resize([0.0, 0.7, 1.5, 0.7], 60),
        top_k=np.resize([0, 0, 5, 0, 0], 60),
        top_p=np.resize([1, 1, 1, 0.8, 1, 1, 0.5], 60),
    )
    whole = sample(logits, parameters)
    assert sample(logits, parameters, tp=tp) == whole
    greedy = logits.argmax(dim=1).tolist()
    assert whole[::4] == greedy[::4]
    assert whole != greedy


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}], ids=["top-k 1", "top-p 0"])
@pytest.mark.parametrize("tp", [1, 2])
def test_what_leaves_one_token_is_greedy(narrow: dict[str, float], tp: int) -> None:
    torch.manual_seed(1)
    logits = torch.randn(30, 23)
    logits[3, [7, 20]] = 9.0
    assert sample(logits, columns(30, temperature=2.0, **narrow), tp=tp) == logits.argmax(dim=1).tolist()


def test_top_k_above_the_vocabulary_is_off() -> None:
    torch.manual_seed(2)
    logits = torch.randn(30, 7)
    assert sample(logits, columns(30, temperature=1.0, top_k=50)) == sample(
        logits, columns(30, temperature=1.0)
    )


def test_a_row_draws_the_same_in_any_company() -> None:
    torch.manual_seed(3)
    logits = torch.randn(8, 50)
    alone = [
        sample(logits[row : row + 1], columns(1, seeds=[row], positions=[3 * row], temperature=1.1))[0]
        for row in range(8)
    ]
    mixed = columns(8, positions=[3 * row for row in range(8)], temperature=1.1, top_k=[0, 50] * 4)
    assert sample(logits, mixed) == alone


@pytest.mark.parametrize("tp", [1, 3])
def test_gather_gives_whole_logits(tp: int) -> None:
    logits = torch.arange(22.0).view(2, 11)
    shards = list(deal_evenly(11, tp))
    parts, barrier = [torch.empty(0)] * tp, Barrier(tp)

    def one(rank: int) -> torch.Tensor:
        group = ListGroup(rank, parts, barrier) if tp > 1 else RankGroup()
        return Sampler(group, shards[rank], 11, shards).gather(
            logits[:, shards[rank].start : shards[rank].stop]
        )

    with ThreadPoolExecutor(tp) as threads:
        assert all(torch.equal(whole, logits) for whole in threads.map(one, range(tp)))
