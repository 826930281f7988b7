"""Which attention a GPU stage computes with: FlashInfer's where its kernels compile and run on every rank, else Triton's."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from stagemesh.stage.cuda import attention as attention_module
from stagemesh.stage.cuda.attention import HeadShape, make_attention
from stagemesh.stage.cuda.cache import DeviceCache
from stagemesh.stage.cuda.flashinfer_attention import FlashInferAttention
from stagemesh.stage.group import RankGroup

SHAPE = HeadShape(num_heads=3, num_kv_heads=1, head_dim=64, most_kv_heads=1)
NVCC = "Ninja build failed. Ninja output:\n/bin/sh: 1: /usr/local/cuda/bin/nvcc: not found\n"


class Module:
    """What FlashInfer would have compiled: notes what is run."""

    def __init__(self, problem: Exception | None = None) -> None:
        self.problem = problem
        self.masks: list[int] = []

    def plan(self, *args: Any) -> object:
        assert args[3].tolist() == args[4].tolist() == [0, 1]
        return "a plan"

    def paged_run(self, *args: Any) -> None:
        if self.problem:
            raise self.problem
        assert args[2] == "a plan"
        assert args[3].shape == args[10].shape
        assert args[3].shape[::2] == (1, 64)
        begins, kv_begins, blocks, last_page = (one.tolist() for one in args[6:10])
        assert (begins, kv_begins, blocks, last_page) == ([0, 1], [0, 1], [0], [1])
        self.masks.append(args[12])


class Fallback:
    def __init__(self, cache: DeviceCache, shape: HeadShape) -> None: ...


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(attention_module, "TritonAttention", Fallback)


def install(monkeypatch: pytest.MonkeyPatch, build: Any) -> None:
    """A flashinfer whose kernels `build` compiles."""
    for name in ("flashinfer", "flashinfer.jit", "flashinfer.jit.attention"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    spec = SimpleNamespace(build_and_load=build)
    modules: dict[str, Any] = sys.modules  # type: ignore[assignment]
    modules["flashinfer.jit.attention"].gen_batch_prefill_module = lambda *args: spec


def make(
    group: RankGroup | None = None, *, dtype: torch.dtype = torch.bfloat16, shape: HeadShape = SHAPE
) -> tuple[Any, str]:
    cache = DeviceCache(
        torch.device("cpu"),
        num_layers=1,
        num_blocks=2,
        block_size=4,
        num_kv_heads=shape.num_kv_heads,
        head_dim=64,
        dtype=dtype,
        max_slots=1,
        max_blocks=2,
    )
    workspace = torch.zeros(64, dtype=torch.uint8)
    return make_attention(cache, shape, workspace, group or RankGroup(), max_rows=2, max_tokens=8)


def raising(error: Exception) -> Any:
    def build() -> None:
        raise error

    return build


def test_flashinfer_is_tried_out_before_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Module()
    install(monkeypatch, lambda: module)
    attention, reason = make()
    assert isinstance(attention, FlashInferAttention)
    assert reason == ""
    assert sorted(module.masks) == [0, 1]  # prefill and decode


def test_ranks_with_unequal_heads_capture_the_same_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture sums over the ranks: one more of them on one rank, and it waits for the other for good."""
    install(monkeypatch, Module)

    def variants(kv_heads: int) -> list[tuple[bool, ...]]:
        shape = HeadShape(num_heads=4 * kv_heads, num_kv_heads=kv_heads, head_dim=64, most_kv_heads=5)
        attention, _ = make(shape=shape)
        return [attention.variants(bucket) for bucket in range(1, 200)]

    assert variants(5) == variants(4)
    # As many rows as the rank with five heads cuts contexts into pieces: two to each of 132 multiprocessors.
    assert variants(5).index((False,)) == 264 // 5


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        pytest.param(
            raising(RuntimeError(NVCC)), "RuntimeError: Ninja build failed. Ninja output:", id="compiler"
        ),
        pytest.param(
            raising(OSError(28, "No space left on device")),
            "OSError: [Errno 28] No space left on device",
            id="disk",
        ),
        pytest.param(
            raising(ImportError("libcudart.so.13: cannot open")),
            "ImportError: libcudart.so.13: cannot open",
            id="library",
        ),
        pytest.param(
            lambda: Module(RuntimeError("no kernel image is available")),
            "RuntimeError: no kernel image is available",
            id="device",
        ),
        pytest.param(raising(ValueError("x" * 1000)), "ValueError: " + 188 * "x", id="long"),
    ],
)
def test_kernels_that_cannot_be_had_leave_tritons(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, build: Any, reason: str
) -> None:
    install(monkeypatch, build)
    attention, said = make()
    assert isinstance(attention, Fallback)
    assert said == "FlashInfer's kernels cannot be had: " + reason
    assert said in caplog.text
    assert "Traceback" in caplog.text
    if "Ninja" in reason:
        assert "nvcc: not found" in caplog.text  # all of it, in the log


def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, raising(ModuleNotFoundError("No module named 'tvm_ffi'", name="tvm_ffi")))
    attention, said = make()
    assert isinstance(attention, Fallback)
    assert said == "tvm_ffi is not installed"
    assert "Traceback" not in caplog.text


def test_a_type_flashinfer_does_not_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Module)
    assert make(dtype=torch.float32)[1] == "FlashInfer does not compute float32"


class TwoRanks(RankGroup):
    """Rank 0, and what the other one votes."""

    def __init__(self, other: int) -> None:
        super().__init__(0, 2)
        self._other = other
        self.num_votes = 0

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.num_votes += 1
        return tensor.add_(self._other)


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_ranks_choose_alike(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, here: bool, there: bool
) -> None:
    install(monkeypatch, Module if here else raising(RuntimeError(NVCC)))
    group = TwoRanks(int(there))
    attention, reason = make(group)
    assert isinstance(attention, FlashInferAttention) == (here and there)
    assert bool(reason) != (here and there)
    assert ("another rank" in reason) == (here and not there)
    assert group.num_votes == 1, "a rank that does not vote keeps the others waiting"
    levels = {record.levelno for record in caplog.records}
    assert (logging.WARNING in levels) != (here and there)
