"""Faults planted in the stages turn the comparison red."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import MeshOf
from models_for_tests import SHAPES
from prompts_for_tests import check_run, sixteen_requests
from reference import Reference

from stagemesh.router.scheduler import Request
from stagemesh.stage.attention import TorchPagedAttention
from stagemesh.stage.engine.batch import Batch
from stagemesh.stage.engine.slots import SlotTable
from stagemesh.stage.models.rope import RotaryTable


@pytest.fixture
def requests() -> list[Request]:
    return sixteen_requests(SHAPES["untied"]["vocab_size"])


def test_rope_off_by_one(
    requests: list[Request],
    mesh_of: MeshOf,
    references: dict[str, Reference],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = RotaryTable.at

    def shifted(table: RotaryTable, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # All alike would turn queries and keys alike, and show nowhere: from position 20 on.
        return honest(table, positions + (positions >= 20))

    monkeypatch.setattr(RotaryTable, "at", shifted)
    run = mesh_of("untied", 1, 1).run(requests)
    with pytest.raises(AssertionError, match=r"transformers says|logits after a prompt"):
        check_run(references["untied"], run)


def test_two_kv_blocks_swapped(
    requests: list[Request],
    mesh_of: MeshOf,
    references: dict[str, Reference],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = TorchPagedAttention.plan
    swapped: list[int] = []

    def plan(attention: TorchPagedAttention, batch: Batch) -> None:
        # Blocks of one sequence could change places unseen: attention does not look at their order.
        if not swapped and batch.number > 6 and len(batch.slots) > 1:
            one, other = (slice(block * 8, block * 8 + 8) for block in batch.tables[:2, 0].tolist())
            cells = attention._cache
            cells[..., one, :], cells[..., other, :] = (
                cells[..., other, :].clone(),
                cells[..., one, :].clone(),
            )
            swapped.append(batch.number)
        honest(attention, batch)

    monkeypatch.setattr(TorchPagedAttention, "plan", plan)
    run = mesh_of("untied", 1, 1).run(requests)
    assert len(swapped) == 1
    with pytest.raises(AssertionError, match=r"transformers says|logits after a prompt"):
        check_run(references["untied"], run)


def test_another_token_than_the_sampled_one(
    requests: list[Request],
    mesh_of: MeshOf,
    references: dict[str, Reference],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = SlotTable.input_tokens
    planted: list[int] = []

    def input_tokens(slots: SlotTable, batch: Batch, *, held: bool) -> npt.NDArray[np.int64]:
        tokens = honest(slots, batch, held=held).copy()
        if batch.number == 9:
            tokens[0] = (tokens[0] + 1) % SHAPES["untied"]["vocab_size"]
            planted.append(batch.number)
        return tokens

    monkeypatch.setattr(SlotTable, "input_tokens", input_tokens)
    run = mesh_of("untied", 1, 1).run(requests)
    assert planted
    with pytest.raises(AssertionError, match=r"transformers says|logits after a prompt"):
        check_run(references["untied"], run)
