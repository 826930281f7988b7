"""Every layout gives transformers' tokens: stages times ranks, even and uneven."""

from __future__ import annotations

import pytest
from conftest import MeshOf
from mesh_for_tests import Drive
from models_for_tests import SHAPES
from prompts_for_tests import check_run, sixteen_requests
from reference import Reference

UNIFORM = [(tp,) * stages for stages in (1, 2, 3, 5) for tp in (1, 2, 3)]
MIXED = [(1, 2, 1), (3, 1), (2, 1, 3), (1, 2, 3, 2, 1)]


@pytest.mark.parametrize("tps", [*UNIFORM, *MIXED], ids=lambda tps: "x".join(map(str, tps)))
def test_sixteen_requests_at_once(
    tps: tuple[int, ...], mesh_of: MeshOf, references: dict[str, Reference]
) -> None:
    # Large steps, since there are fewer of them: full pipelines are in test_drives.py.
    drive = Drive(num_microbatches=2 if len(tps) > 1 and tps in MIXED else 1)
    run = mesh_of("untied", *tps).run(sixteen_requests(SHAPES["untied"]["vocab_size"]), drive)
    assert max(len(step.slots) for step in run.steps) == 16
    check_run(references["untied"], run)


@pytest.mark.parametrize("shape", ["tied", "llama3"])
@pytest.mark.parametrize("tps", [(2,), (1, 3)], ids=lambda tps: "x".join(map(str, tps)))
def test_other_models(
    shape: str, tps: tuple[int, ...], mesh_of: MeshOf, references: dict[str, Reference]
) -> None:
    run = mesh_of(shape, *tps).run(sixteen_requests(SHAPES[shape]["vocab_size"]), Drive(step_tokens=96))
    check_run(references[shape], run)
