"""The parts of the CUDA engine that are plain arithmetic."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from batches_for_tests import batch

from stagemesh.model.deal import RankDeal
from stagemesh.router.lane.forming import choose_transport
from stagemesh.router.lane.stage_link import StageLink
from stagemesh.stage.cuda.buckets import bucket_for, graph_buckets, section_buckets
from stagemesh.stage.cuda.columns import Layout, fill, plan_rows
from stagemesh.stage.cuda.environment import cuda_environment
from stagemesh.stage.cuda.flashinfer_attention import FlashInferAttention
from stagemesh.stage.cuda.scratch import MIN_MLP_ROWS, mlp_slices, plan_scratch
from stagemesh.stage.cuda.waits import split_wait
from stagemesh.stage.cuda.workspace import most_splits, workspace_bytes
from stagemesh.stage.engine.interface import CompleteStep, NoLinks, StepOutput
from stagemesh.stage.gpus import Gpu, pick_gpus
from stagemesh.stage.worker.results import LaunchedStep, ResultThread
from stagemesh.stage.worker.watchdog import Watchdog
from stagemesh.v1 import stage_pb2
from stagemesh.wire.errors import ChainError, ConfigError


def test_every_number_of_rows_has_a_bucket_that_wastes_little() -> None:
    buckets = graph_buckets(512)
    assert buckets[:5] == (1, 2, 4, 8, 16)
    assert buckets[-1] == 512
    for rows in range(1, 513):
        bucket = bucket_for(buckets, rows)
        assert bucket is not None
        assert rows <= bucket <= max(rows * 2 - 1, rows + rows // 2)
    assert bucket_for(buckets, 513) is None


def test_steps_with_prefill_have_buckets_as_far_as_graphs_pay() -> None:
    buckets = section_buckets(8192)
    assert (buckets[0], buckets[-1]) == (64, 1024)
    assert all(bucket_for(buckets, size) - size < 128 for size in range(1, 1025))
    assert bucket_for(buckets, 1025) is None
    assert section_buckets(256)[-1] == 256
    assert section_buckets(32) == (32,)
    assert graph_buckets(3) == (1, 2, 3)


def test_columns_are_aligned_and_do_not_overlap() -> None:
    layout = Layout(tokens=7, rows=3, samples=2, changes=5)
    end = 0
    for part in layout.columns.values():
        assert part.start >= end
        assert part.start % 4 == 0
        end = part.stop
    assert layout.size == end


def test_a_step_fills_its_columns_and_the_rest_is_harmless() -> None:
    # Block size 4: a decode at position 5, a prompt's chunk of 3 from position 2.
    step = batch([(5, 1, [8, 9]), (2, 3, [3, 4])], 4)
    layout = Layout(tokens=6, rows=4, samples=4, changes=1)
    buffer = np.full(layout.size, 77, np.int32)
    rows = plan_rows(step, 4)
    fill(
        buffer,
        layout,
        step,
        rows,
        np.array([10, 11, 12, -1 - 6]),
        block_size=4,
        scratch_cell=1000,
        scratch_slot=50,
    )
    column = {name: buffer[part].tolist() for name, part in layout.columns.items()}
    assert column["tokens"] == [10, 11, 12, -7, 0, 0]
    assert column["positions"] == [5, 2, 3, 4, 0, 0]
    assert column["cells"] == [37, 14, 15, 16, 1000, 1000]
    assert column["token_slots"] == [0, 1, 1, 1, 50, 50]
    assert column["kv_begins"] == [0, 2, 4, 4, 4]
    assert column["last_page"] == [2, 1, 1, 1]
    assert column["prefill_begins"][:2] == [0, 3]
    assert column["sampled_rows"] == [0, 3, 0, 0]
    assert column["sampled_slots"] == [0, 1, 50, 50]
    assert column["change_slots"] == [-1]
    assert (rows.num_decodes, rows.num_rows) == (1, 2)


def test_single_positions_behind_a_chunk_count_as_prefill() -> None:
    rows = plan_rows(batch([(0, 2, [1]), (5, 1, [8, 9])], 4), 4)
    assert rows.num_decodes == 0
    assert rows.prefill_begins.tolist() == [0, 2, 3]


def test_gpus_of_ranks() -> None:
    there = (Gpu(0, "a", 1), Gpu(1, "b", 2))
    assert [gpu.index for gpu in pick_gpus("", 2, there)] == [0, 1]
    assert [gpu.index for gpu in pick_gpus("1,1", 2, there)] == [1, 1]
    for wanted, ranks in (("", 3), ("2", 1), ("0", 2), ("x", 1)):
        with pytest.raises(ConfigError):
            pick_gpus(wanted, ranks, there)


def test_multicast_stays_off_whatever_the_environment_says() -> None:
    environment = cuda_environment({"NCCL_NVLS_ENABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "8"})
    assert environment["NCCL_NVLS_ENABLE"] == "0"
    assert environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"


def test_programs_beside_the_interpreter_are_found_last() -> None:
    """pip puts FlashInfer's ninja there."""
    assert cuda_environment({"PATH": "/a:/b"})["PATH"] == f"/a:/b:{Path(sys.executable).parent}"


def stage(index: int, transports: list[str], gpu: str, host: str = "one") -> StageLink:
    link = StageLink.__new__(StageLink)
    link.index, link.address = index, f"host:{index}"
    link.description = stage_pb2.DescribeResponse(transports=transports, host_id=host)
    link.description.ranks.add(gpu_id=gpu)
    return link


def test_the_transport_and_why_it_is_no_better() -> None:
    both = ["nccl", "grpc"]
    assert choose_transport(stage(0, both, "a"), stage(1, both, "b")) == ("nccl", "best on both ends")
    transport, reason = choose_transport(stage(0, both, "a"), stage(1, ["grpc"], ""))
    assert (transport, reason) == ("grpc", "no nccl on stage 1 (host:1)")
    transport, reason = choose_transport(stage(0, both, "a"), stage(1, both, "a"))
    assert transport == "grpc"
    assert "joins no GPU to itself" in reason


def test_unix_is_for_one_host_and_a_wanted_transport_is_taken_or_refused() -> None:
    cpu = ["unix", "grpc"]
    ours, theirs = stage(0, cpu, ""), stage(1, cpu, "")
    transport, reason = choose_transport(ours, theirs)
    assert transport == "unix"
    assert reason == "no nccl on stage 0 (host:0); no nccl on stage 1 (host:1)"
    transport, reason = choose_transport(ours, stage(1, cpu, "", host="another"))
    assert transport == "grpc"
    assert "unix is for one host, and these are two" in reason
    transport, reason = choose_transport(ours, stage(1, ["nccl", "grpc"], "a"))
    assert transport == "grpc"
    assert "no unix on stage 1 (host:1)" in reason
    assert choose_transport(ours, theirs, "grpc") == ("grpc", "--link-transport grpc")
    with pytest.raises(ChainError, match="nccl, as --link-transport wants"):
        choose_transport(ours, theirs, "nccl")
    with pytest.raises(ChainError, match="two"):
        choose_transport(ours, stage(1, cpu, "", host="another"), "unix")


def test_results_come_in_order_and_an_error_ends_them() -> None:
    seen: list[int] = []
    errors: list[BaseException] = []

    def finish(step: LaunchedStep) -> None:
        if step.number == 3:
            raise RuntimeError("device lost")
        seen.append(step.number)

    results = ResultThread(finish, errors.append)
    for number in (1, 2, 3, 4):
        results.add(launched(number, time.monotonic_ns()))
    deadline = time.monotonic() + 60
    while not errors and time.monotonic() < deadline:
        time.sleep(0.01)
    assert seen == [1, 2]
    assert [str(error) for error in errors] == ["device lost"]


def launched(number: int, launched_ns: int) -> LaunchedStep:
    return LaunchedStep(None, 0, 0, number, launched_ns, CompleteStep(StepOutput()))  # type: ignore[arg-type]


class BadLinks(NoLinks):
    def check(self) -> str:
        return "the ring link failed: remote process exited"


def test_the_watchdog_finds_an_overdue_step_and_a_failed_link() -> None:
    results = ResultThread(lambda step: None, lambda error: None)
    watchdog = Watchdog(results, NoLinks(), 5.0, lambda what: None)
    assert watchdog.find(10**12) == ""
    results._oldest = launched(7, 0)
    assert watchdog.find(4 * 10**9) == ""
    assert watchdog.find(6 * 10**9) == "step 7 has not ended on the device after 5 s"
    assert "remote process" in Watchdog(results, BadLinks(), 60.0, lambda what: None).find(10**9)


def test_a_transfer_does_not_pass_for_a_wait() -> None:
    assert split_wait(70_000, 2 << 20) == (0, 70_000)
    wait_ns, receive_ns = split_wait(5_000_000, 2 << 20)
    assert wait_ns + receive_ns == 5_000_000
    assert receive_ns < 100_000
    assert split_wait(5_000, 0) == (0, 5_000)


LLAMA_8B = RankDeal(
    rank=0, size=1, kv_heads=range(8), heads=range(32), columns=range(14336), vocab=range(128256)
)


def test_what_is_needed_at_one_time_does_not_overlap_in_the_scratch_memory() -> None:
    workspace = workspace_bytes(32, 8, 128)
    scratch = plan_scratch(
        LLAMA_8B, 128, step_tokens=8192, sampled_rows=512, itemsize=2, workspace_bytes=workspace
    )
    assert scratch.attended >= 8192 * (32 + 2 * 8) * 128 * 2
    assert scratch.workspace >= scratch.attended + 8192 * 32 * 128 * 2
    assert scratch.total >= scratch.workspace + workspace
    assert scratch.total >= 512 * 128256 * 4
    assert scratch.total >= scratch.mlp_rows * 2 * 14336 * 2
    assert MIN_MLP_ROWS <= scratch.mlp_rows < 8192
    small = plan_scratch(LLAMA_8B, 128, step_tokens=64, sampled_rows=0, itemsize=2, workspace_bytes=0)
    assert small.mlp_rows == 64
    assert small.total == 64 * 2 * 14336 * 2


@pytest.mark.parametrize("count", [1, 4480, 4481, 8192, 8960, 8961, 20_000])
def test_slices_of_the_mlp_are_even_and_leave_nobody_out(count: int) -> None:
    slices = mlp_slices(count, 4480)
    assert [part.start for part in slices] == [0, *(part.stop for part in slices[:-1])]
    assert slices[-1].stop == count
    sizes = [part.stop - part.start for part in slices]
    assert max(sizes) <= 4480
    assert len(slices) == -(-count // 4480)
    assert max(sizes) - min(sizes) <= 128 * len(sizes)


def test_the_workspace_holds_the_pieces_of_any_split() -> None:
    """As FlashInfer counts them: in a graph a tile for each piece there may be, and one for each row but one."""
    for heads, kv_heads in ((32, 8), (16, 4), (64, 8), (8, 1), (24, 8), (64, 1)):
        splits = most_splits(kv_heads, 132)
        group = heads // kv_heads
        tile = 16 if group <= 16 else 64
        tiles = max(splits, -(-splits * group // tile) + splits - 1)
        needed = heads * max(tiles * tile, splits * 128) * (128 + 1) * 4
        assert workspace_bytes(heads, kv_heads, 128) >= needed


class PlanModule:
    def plan(self, *args: Any) -> dict[str, Any]:
        names = ("begins", "kv_begins", "lengths", "tokens", "rows")
        found = dict(zip(names, args[3:], strict=False))
        return {**found, "workspace": args[1], "graph": args[11], "whole": args[17]}


def flashinfer_attention() -> Any:
    attention = FlashInferAttention.__new__(FlashInferAttention)
    attention._module, attention._most_splits = PlanModule(), 33
    attention._float_workspace = attention._prefill_workspace = None
    attention._decode_workspace, attention._whole = torch.zeros(16), {}
    attention.cache = SimpleNamespace(block_size=4)  # type: ignore[assignment]
    attention.shape = SimpleNamespace(num_heads=4, num_kv_heads=2, head_dim=8)  # type: ignore[assignment]
    return attention


def test_contexts_are_split_in_graphs_of_few_rows_where_one_is_long() -> None:
    attention = flashinfer_attention()
    assert attention.variants(32) == (False, True)
    assert attention.variants(48) == (False,)
    short = plan_rows(batch([(5, 1, [8, 9]), (6, 1, [3, 4])], 4), 4)
    assert not attention.variant(short, 2)

    def even(rows: int, context: int, others: int = 0) -> bool:
        lengths = [context] * rows + [16] * others
        step = batch([(length - 1, 1, list(range(length // 4))) for length in lengths], 4)
        return bool(attention.variant(plan_rows(step, 4), rows + others))

    attention.shape.num_kv_heads = 8
    # What one layer took on an H100, whole and split, us: 10.3 and 10.8, 16.9 and 11.3, 11.5 and 12.6, 18.5 and 15.3,
    # 52 and 56.
    assert [even(1, 1024), even(4, 512), even(4, 1024), even(16, 2048)] == [True, False, True, False]
    assert even(1, 4096, others=15)
    assert not even(1, 4096, others=47)
    attention.shape.num_kv_heads = 2
    slot: Any = SimpleNamespace(plans=(None, None))
    attention.plan(short, slot, bucket=4, split=False)
    plan = attention._decode_plan
    # A padding row is work without keys: the graph's grid is one tile for each row.
    assert plan["begins"].tolist() == [0, 1, 2, 3, 4]
    assert (plan["graph"], plan["whole"], plan["tokens"]) == (False, True, 4)
    attention.plan(plan_rows(batch([(9, 1, [1, 2, 7])], 4), 4), slot, bucket=4, split=False)
    assert attention._decode_plan is plan
    assert attention._decode_in is plan["workspace"]
    assert attention._decode_in is not attention._decode_workspace
    attention.plan(short, slot, bucket=4, split=True)
    plan = attention._decode_plan
    assert plan["begins"].tolist() == [0, 1, 2, 2, 2]
    assert (plan["graph"], plan["whole"]) == (True, False)
    assert attention._decode_in is attention._decode_workspace
