"""Collectives through shared memory, between real processes: sums and gathers, long tensors, a rank that is gone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from stagemesh.stage import host_memory
from stagemesh.stage.group import RankGroup
from stagemesh.stage.host_exchange import RankLostError

pytestmark = pytest.mark.skipif(not host_memory.is_available(), reason="Linux on x86-64 only")

CONTEXT = multiprocessing.get_context("fork")
LONG = host_memory.PLACE_BYTES // 4 * 2 + 77
"""Elements of float32: three pieces, the last of them short."""

Work = Callable[[RankGroup], Any]


def values(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-40, 40, shape, generator=generator).to(dtype)


class Ranks:
    """A process for each rank, forked with the memory."""

    def __init__(self, size: int, work: Work, *, begin: int = 0) -> None:
        self._memory = host_memory.create(size)
        for rank in range(size):
            os.pwrite(self._memory, begin.to_bytes(4, "little"), rank * host_memory.LINE_BYTES)
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(size):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=self._run, args=(rank, size, work, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def _run(self, rank: int, size: int, work: Work, pipe: Connection) -> None:
        torch.set_num_threads(1)
        group = RankGroup.connect(rank, size, Path("unused"), timeout_s=20, memory=self._memory)
        try:
            pipe.send(work(group))
        except RankLostError as error:
            pipe.send(str(error))
        pipe.close()

    def results(self, *ranks: int) -> list[Any]:
        """What those ranks returned, or the words of their error."""
        for rank in ranks:
            assert self.pipes[rank].poll(30), f"rank {rank} says nothing"
        return [self.pipes[rank].recv() for rank in ranks]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        os.close(self._memory)


@pytest.fixture
def start() -> Iterator[Callable[..., Ranks]]:
    started: list[Ranks] = []

    def make(size: int, work: Work, **options: Any) -> Ranks:
        started.append(Ranks(size, work, **options))
        return started[-1]

    yield make
    for ranks in started:
        ranks.close()


@pytest.mark.parametrize("size", [2, 3])
def test_sums_and_gathers_of_any_type_and_length(size: int, start: Callable[..., Ranks]) -> None:
    cases = [
        ((1,), torch.float32),
        ((16, 576), torch.float32),
        ((LONG,), torch.float32),
        ((3, 5), torch.bfloat16),
        ((7,), torch.float16),
        ((2, 3), torch.float64),
        ((4,), torch.int32),
        ((9,), torch.int64),
    ]

    def work(group: RankGroup) -> list[Any]:
        out = []
        for shape, dtype in cases:
            mine = values(group.rank, shape, dtype)
            out += [
                group.all_reduce(mine.clone()).float().numpy(),
                group.all_gather_rows(mine).float().numpy(),
            ]
        across = values(group.rank, (6, 4), torch.float32).t()
        assert not across.is_contiguous()
        out.append(group.all_reduce(across).numpy())
        out.append(
            group.all_gather_columns(
                values(group.rank, (2, group.rank + 1), torch.float32), list(range(1, size + 1))
            ).numpy()
        )
        return out

    expected = []
    for shape, dtype in cases:
        parts = [values(rank, shape, dtype).float() for rank in range(size)]
        expected += [torch.stack(parts).sum(0), torch.cat(parts)]
    expected.append(sum(values(rank, (6, 4), torch.float32).t() for rank in range(size)))  # type: ignore[arg-type]
    expected.append(torch.cat([values(rank, (2, rank + 1), torch.float32) for rank in range(size)], dim=1))
    for results in start(size, work).results(*range(size)):
        for one, other in zip(results, expected, strict=True):
            assert torch.equal(torch.from_numpy(one), other)


def test_many_turns_with_ranks_that_come_late(start: Callable[..., Ranks]) -> None:
    """Places are used again every second turn: whoever comes late must find what was meant for it."""

    def work(group: RankGroup) -> list[float]:
        sums = []
        for turn in range(400):
            if turn % 50 == 10 * group.rank:
                time.sleep(0.003)  # past the spinning, into the kernel
            sums.append(float(group.all_reduce(torch.full((33,), float(turn * 3 + group.rank)))[32]))
        return sums

    wanted = [float(turn * 9 + 3) for turn in range(400)]
    assert start(3, work).results(0, 1, 2) == [wanted] * 3


def test_the_counter_wraps(start: Callable[..., Ranks]) -> None:
    begin = (1 << 32) - 3

    def work(group: RankGroup) -> list[float]:
        group._exchange._turn = begin  # type: ignore[attr-defined]
        return [float(group.all_reduce(torch.tensor([float(turn)]))) for turn in range(8)]

    assert start(2, work, begin=begin).results(0, 1) == [[2.0 * turn for turn in range(8)]] * 2


def test_a_rank_that_is_gone_is_named(start: Callable[..., Ranks]) -> None:
    def work(group: RankGroup) -> str:
        group.all_reduce(torch.ones(4))
        group._exchange._timeout_s = 10.0  # type: ignore[attr-defined]
        if group.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        group.all_reduce(torch.ones(4))
        return "summed without rank 1"

    ranks = start(3, work)
    for rank, said in zip((0, 2), ranks.results(0, 2), strict=True):
        assert said == f"rank 1 did not come to exchange 2 within 10 s; rank {rank} waited"


def test_ranks_agree_only_if_all_do(start: Callable[..., Ranks]) -> None:
    def work(group: RankGroup) -> list[bool]:
        device = torch.device("cpu")
        return [group.all_agree(yes, device) for yes in (True, group.rank == 0, group.rank == 1, False)]

    assert start(2, work).results(0, 1) == [[True, False, False, False]] * 2
    assert RankGroup().all_agree(True, torch.device("cpu"))
    assert not RankGroup().all_agree(False, torch.device("cpu"))
