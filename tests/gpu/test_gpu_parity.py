"""Answers of GPU meshes against transformers on the same GPU, over layouts and ways to run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gpu_mesh import HOST_LINK, REHEARSAL, GPUMesh, MeshOf
from gpu_reference import KV_HEADS, VOCAB_SIZE, Comparison, Reference, make_model
from mesh_calls import make_request, read_answer
from running_mesh import CALL_TIMEOUT_S

LENGTHS = (1, 2, 3, 15, 16, 17, 31, 33, 64, 100, 129, 200, 257, 300, 383, 511)
COUNTS = (12, 24, 17, 9)
NUM_CONCURRENT = 64


def ask(mesh: GPUMesh, requests: int, *, seed: int) -> dict[str, tuple[list[int], list[int]]]:
    """(prompt, answer) of so many greedy requests at once, by their ids."""
    rng = np.random.default_rng(seed)
    prompts = {
        f"s{seed}-{index}": rng.integers(0, VOCAB_SIZE, LENGTHS[index % len(LENGTHS)] + index // 16).tolist()
        for index in range(requests)
    }
    calls = {
        name: mesh.stub.Generate(
            make_request(prompt, COUNTS[index % len(COUNTS)], request_id=name), timeout=CALL_TIMEOUT_S
        )
        for index, (name, prompt) in enumerate(prompts.items())
    }
    answers = {name: read_answer(call).token_ids for name, call in calls.items()}
    for index, tokens in enumerate(answers.values()):
        assert len(tokens) == COUNTS[index % len(COUNTS)]
    return {name: (prompts[name], answers[name]) for name in prompts}


def compare(mesh: GPUMesh, reference: Reference, requests: int = 16, *, seed: int = 0) -> None:
    """Ask, and hold every answer with its logits against transformers."""
    answers = ask(mesh, requests, seed=seed)
    logits = mesh.logits()
    comparison = Comparison()
    for name, (prompt, tokens) in answers.items():
        comparison.add(reference, prompt, tokens, logits[name])
    comparison.check()


def check_links(mesh: GPUMesh) -> None:
    """Stages without a GPU in common are linked by NCCL."""
    if len(mesh.tps) > 1 and not REHEARSAL:
        gpus = [set(mesh.gpus(index)) for index in range(len(mesh.tps))]
        expected = [
            "grpc" if here & there else "nccl" for here, there in zip(gpus, gpus[1:] + gpus[:1], strict=True)
        ]
        assert [transport for transport, _ in mesh.links()] == expected, mesh.links()


LAYOUTS = [
    pytest.param((1,), id="1"),
    pytest.param((2,), id="TP2", marks=pytest.mark.gpus(2)),
    pytest.param((1, 1), id="2stages", marks=pytest.mark.gpus(2)),
    pytest.param((2, 1), id="TP2-TP1", marks=pytest.mark.gpus(2)),
    pytest.param((1, 2), id="TP1-TP2", marks=pytest.mark.gpus(2)),
    pytest.param((4,), id="TP4", marks=pytest.mark.gpus(4)),
    pytest.param((2, 2), id="2stages-TP2", marks=pytest.mark.gpus(2)),
    pytest.param((1, 1, 1), id="3stages", marks=pytest.mark.gpus(2)),
]


@pytest.mark.parametrize("tps", LAYOUTS)
def test_layouts(tps: tuple[int, ...], mesh_of: MeshOf, reference: Reference) -> None:
    mesh = mesh_of(tps)
    check_links(mesh)
    compare(mesh, reference)


@pytest.mark.gpus(2)
def test_four_stages(mesh_of: MeshOf, tmp_path: Path) -> None:
    """With a layer each, of a model that has one more than the others' here; two of them may share a GPU."""
    model = make_model(tmp_path, layers=4)
    mesh = mesh_of((1, 1, 1, 1), model=model, share=0.1)
    check_links(mesh)
    compare(mesh, Reference.load(model, torch.bfloat16))


@pytest.mark.gpus(2)
@pytest.mark.parametrize("tps", [(2,), (2, 1)], ids=["TP2", "TP2-TP1"])
def test_heads_that_ranks_share_unevenly(tps: tuple[int, ...], mesh_of: MeshOf, tmp_path: Path) -> None:
    """One KV head with its queries more on one rank than on the other."""
    model = make_model(tmp_path, kv_heads=KV_HEADS + 1)
    mesh = mesh_of(tps, model=model, share=0.2)
    check_links(mesh)
    compare(mesh, Reference.load(model, torch.bfloat16))


@pytest.mark.parametrize("tps", LAYOUTS[1:3])
def test_sixty_four_at_once(tps: tuple[int, ...], mesh_of: MeshOf, reference: Reference) -> None:
    mesh = mesh_of(tps)
    compare(mesh, reference, NUM_CONCURRENT, seed=1)
    assert max(len(step["rows"]) for step in mesh.steps()) > 16


@pytest.mark.gpus(2)
def test_sums_and_norm_by_two_kernels(mesh_of: MeshOf, reference: Reference) -> None:
    """As every step of many rows has them."""
    flags = () if REHEARSAL else ("--no-fused-all-reduce",)
    compare(mesh_of((2,), stage_flags=flags), reference, NUM_CONCURRENT, seed=10)


def test_without_pdl(mesh_of: MeshOf, reference: Reference) -> None:
    flags = () if REHEARSAL else ("--no-pdl",)
    compare(mesh_of((1,), stage_flags=flags), reference, seed=11)


def test_without_graphs(mesh_of: MeshOf, reference: Reference) -> None:
    flags = () if REHEARSAL else ("--no-cuda-graphs",)
    compare(mesh_of((1,), stage_flags=flags), reference, seed=2)


@pytest.mark.gpus(2)
def test_without_lookahead(mesh_of: MeshOf, reference: Reference) -> None:
    compare(mesh_of((1, 1), router_flags=("--lookahead", "0")), reference, seed=3)


@pytest.mark.gpus(2)
def test_small_steps_and_chunked_prompts(mesh_of: MeshOf, reference: Reference) -> None:
    compare(mesh_of((1, 1), router_flags=("--step-tokens", "48", "--lookahead", "2")), reference, seed=4)


@pytest.mark.parametrize("tps", LAYOUTS[:3])
def test_prompts_that_begin_alike(tps: tuple[int, ...], mesh_of: MeshOf, reference: Reference) -> None:
    """A beginning of 93 blocks, kept from one prompt and shared by 48 that come at once."""
    mesh = mesh_of(tps, router_flags=("--prefix-cache",))
    rng = np.random.default_rng(13)
    beginning = rng.integers(0, VOCAB_SIZE, 1500).tolist()
    prompts = {
        f"p{index}": beginning + rng.integers(0, VOCAB_SIZE, 1 + index).tolist() for index in range(49)
    }
    answers = {}
    for names in (list(prompts)[:1], list(prompts)[1:]):
        calls = {
            name: mesh.stub.Generate(make_request(prompts[name], 12, request_id=name), timeout=CALL_TIMEOUT_S)
            for name in names
        }
        answers |= {name: read_answer(call) for name, call in calls.items()}
    assert [answer.usage.cached_tokens for answer in answers.values()] == [0] + 48 * [1488]
    logits = mesh.logits()
    comparison = Comparison()
    for name, answer in answers.items():
        comparison.add(reference, prompts[name], answer.token_ids, logits[name])
    comparison.check()


@pytest.mark.skipif(REHEARSAL, reason="the kernels are those of GPUs")
@pytest.mark.parametrize("tps", [(1,), pytest.param((2,), marks=pytest.mark.gpus(2))], ids=["1", "TP2"])
def test_kernels_that_do_not_compile_are_done_without(
    tps: tuple[int, ...],
    mesh_of: MeshOf,
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """FlashInfer is there, its compiler fails and nothing is in its cache."""
    monkeypatch.setenv("FLASHINFER_NVCC", "/bin/false")
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path))
    mesh = mesh_of(tps, share=0.29)
    for rank in mesh.lane.stages[0].description.ranks:
        backends = dict(rank.backends)
        assert backends["attention"].startswith("triton")
        assert "RuntimeError: Ninja build failed" in backends["attention-reason"]
    compare(mesh, reference, seed=12)


def test_float16(mesh_of: MeshOf, reference: Reference) -> None:
    """Narrower than bfloat16 in range and not in digits: its error is within bfloat16's."""
    compare(mesh_of((1,), dtype="float16"), reference, seed=5)


def test_two_stages_on_one_gpu_fall_back(mesh_of: MeshOf, reference: Reference) -> None:
    """NCCL links no two processes on one GPU: the grpc link takes over, and status says why."""
    mesh = mesh_of((1, 1), shared=True, share=0.2, stage_flags=() if REHEARSAL else ("--no-nccl-links",))
    transport, reason = mesh.links()[0]
    assert transport == HOST_LINK
    assert "nccl" in reason
    compare(mesh, reference, seed=6)


def test_a_cpu_stage_before_a_gpu_stage(mesh_of: MeshOf, reference: Reference) -> None:
    mesh = mesh_of((1, 1), devices=("cpu", "cuda"))
    assert mesh.links()[0][0] == HOST_LINK
    compare(mesh, reference, 4, seed=7)


@pytest.mark.gpus(2)
def test_sockets_carry_a_link(mesh_of: MeshOf, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """What links hosts, forced on one."""
    for name in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    mesh = mesh_of((1, 1), stage_flags=("--log-level", "info"), share=0.31)
    check_links(mesh)
    compare(mesh, reference, seed=8)


def test_sampling_is_the_same_on_any_layout(mesh_of: MeshOf) -> None:
    """A seed draws the same tokens twice, alone and in company."""
    mesh = mesh_of((1,))
    prompt = np.random.default_rng(9).integers(0, VOCAB_SIZE, 40).tolist()

    def draw(seed: int) -> list[int]:
        fields = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "seed": seed}
        return read_answer(
            mesh.stub.Generate(make_request(prompt, 32, **fields), timeout=CALL_TIMEOUT_S)
        ).token_ids

    first = draw(1)
    assert draw(1)[:4] == first[:4]
    assert draw(2) != first
