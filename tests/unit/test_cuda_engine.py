"""The CUDA engine on a CPU: its kernels run in Triton's interpreter, and must do what the torch engine does."""

from __future__ import annotations

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_nccl_for_tests
import numpy as np
import pytest
import torch
from host_device_for_tests import HostDevice

from stagemesh.model.deal import deal
from stagemesh.model.source import open_model
from stagemesh.stage.cuda import engine as engine_module
from stagemesh.stage.engine.interface import StepInputs
from stagemesh.stage.engine.slots import SlotTable
from stagemesh.stage.engine.torch_engine import TorchEngine
from stagemesh.stage.group import RankGroup
from stagemesh.stage.weights import load_shard
from stagemesh.v1 import stage_pb2
from stagemesh.wire.columns import F32, U8, U32, U64, pack
from stagemesh.wire.errors import InvalidArgumentError

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 320,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
BLOCK, BLOCKS, SLOTS, ROWS, TOKENS, DEPTH = 4, 64, 8, 4, 32, 2


@pytest.fixture
def source(tmp_path: Path) -> Any:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return open_model(str(tmp_path), weights=False)


def cuda_engine(
    source: Any,
    layers: range,
    device: HostDevice,
    *,
    graphs: bool = True,
    nccl: bool = False,
    warm: bool = False,
) -> Any:
    """Without the warm-up unless asked for: in the interpreter it takes most of a test, and nothing is loaded there."""
    from stagemesh.stage.cuda.attention import HeadShape, TritonAttention
    from stagemesh.stage.cuda.buffers import make_buffers
    from stagemesh.stage.cuda.cache import DeviceCache
    from stagemesh.stage.cuda.engine import CudaEngine, EngineParts
    from stagemesh.stage.cuda.filtered import FilteredChoice
    from stagemesh.stage.cuda.links import DeviceLinks, NcclLinks
    from stagemesh.stage.cuda.model import DeviceLlama
    from stagemesh.stage.cuda.reduce import Reducer
    from stagemesh.stage.cuda.scratch import plan_scratch
    from stagemesh.stage.kernels.choose import num_parts

    config, deals, group = source.config, deal(source.config, 1), RankGroup()
    first, last = layers.start == 0, layers.stop == config.num_layers
    weights = load_shard(
        source, layers, deals[0], dtype=torch.float32, has_embedding=first, has_head=last, dummy=True
    )
    shape = HeadShape(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        most_kv_heads=config.num_kv_heads,
    )
    cache = DeviceCache(
        device.torch_device,
        num_layers=len(layers),
        num_blocks=BLOCKS,
        block_size=BLOCK,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=torch.float32,
        max_slots=SLOTS,
        max_blocks=-(-config.max_context // BLOCK),
    )
    attention, reducer = TritonAttention(cache, shape), Reducer(group)
    scratch = plan_scratch(
        deals[0],
        config.head_dim,
        step_tokens=TOKENS,
        sampled_rows=2 if last else 0,
        itemsize=4,
        workspace_bytes=64,
    )
    buffers = make_buffers(
        config,
        deals[0],
        scratch,
        max_tokens=TOKENS,
        max_samples=2 if last else 0,
        num_parts=num_parts(config.vocab_size),
        dtype=torch.float32,
        device=device.torch_device,
    )
    stream = device.stream()
    links = DeviceLinks()
    if nccl:
        links = NcclLinks(
            device,
            stream,
            rank=0,
            size=1,
            hidden=config.hidden_size,
            dtype=torch.float32,
            max_tokens=TOKENS,
            max_samples=TOKENS,
            slot_tokens=cache.slot_tokens,
        )

    class Cold(CudaEngine):
        def _warm_up(self) -> None: ...

    return (CudaEngine if warm else Cold)(
        EngineParts(
            config=config,
            layers=layers,
            deal=deals[0],
            shards=[deals[0].vocab],
            device=device,
            stream=stream,
            cache=cache,
            attention=attention,
            reducer=reducer,
            buffers=buffers,
            model=DeviceLlama(
                config, layers, deals[0], weights, attention, reducer, buffers, max_context=config.max_context
            ),
            filtered=FilteredChoice(group, [deals[0].vocab]),
            links=links,
            max_slots=SLOTS,
            max_rows=2,
            max_tokens=TOKENS,
            plan_bytes=16,
            graphs=graphs,
            weight_bytes=0,
        )
    )


def torch_engine(source: Any, layers: range) -> TorchEngine:
    return TorchEngine(
        source,
        layers,
        deal(source.config, 1),
        RankGroup(),
        dtype="float32",
        num_blocks=BLOCKS,
        block_size=BLOCK,
        max_context=source.config.max_context,
        dummy=True,
    )


class Stage:
    """An engine and its slots, as a worker drives them."""

    def __init__(self, engine: Any, *, first: bool = True, last: bool = True, held: bool = False) -> None:
        self.engine = engine
        self.first, self.last = first, last
        self.held = held or (first and last and engine.holds_tokens)
        self.open(1)

    def open(self, epoch: int) -> None:
        self.slots = SlotTable(max_slots=SLOTS, max_blocks=16, block_size=BLOCK, num_blocks=BLOCKS)
        self.engine.open(
            stage_pb2.OpenLaneRequest(
                epoch=epoch,
                num_stages=1 if self.first and self.last else 2,
                stage_index=0 if self.first else 1,
                max_slots=SLOTS,
                depth=DEPTH,
            )
        )

    def run(self, step: stage_pb2.Step, hidden: memoryview | None = None) -> Any:
        batch = self.slots.apply(step)
        self.slots.begin(batch)
        tokens = self.slots.input_tokens(batch, held=self.held) if self.first else None
        handle = self.engine.launch(batch, StepInputs(arrived_ns=0, tokens=tokens, hidden=hidden))
        output = handle.wait()
        if output.tokens is not None and not self.held:
            self.slots.deliver(batch.number, output.tokens)
        return output


def admit(slots: list[int], sampling: list[tuple[int, float, int, float]]) -> stage_pb2.Admissions:
    return stage_pb2.Admissions(
        slots=pack(slots, U32),
        positions=pack([0] * len(slots), U32),
        seeds=pack([one[0] for one in sampling], U64),
        temperatures=pack([one[1] for one in sampling], F32),
        top_ks=pack([one[2] for one in sampling], U32),
        top_ps=pack([one[3] for one in sampling], F32),
    )


def script() -> list[stage_pb2.Step]:
    """Prompts, decodes alone and with a chunk of another prompt, a slot given away, and every way to sample."""
    rng = np.random.default_rng(5)

    def tokens(count: int) -> list[int]:
        return rng.integers(0, CONFIG["vocab_size"], count).tolist()

    def blocks(table: dict[int, list[int]]) -> dict[str, bytes]:
        return {
            "append_slots": pack([slot for slot, ids in table.items() for _ in ids], U32),
            "append_blocks": pack([block for ids in table.values() for block in ids], U32),
        }

    ways = [(11, 0.0, 0, 1.0), (12, 0.9, 0, 1.0), (13, 1.1, 5, 1.0), (2**63 + 5, 0.8, 0, 0.7)]
    return [
        stage_pb2.Step(
            number=1,
            admissions=admit([0, 1, 2], ways[:3]),
            **blocks({0: [9, 3], 1: [4], 2: [20, 21, 5]}),
            rows=stage_pb2.Rows(
                slots=pack([0, 1, 2], U32), counts=pack([7, 3, 10], U32), tokens=pack(tokens(20), U32)
            ),
        ),
        stage_pb2.Step(number=2, **blocks({1: [6]}), same_rows_as=1),
        stage_pb2.Step(
            number=3,
            admissions=admit([3], ways[3:]),
            **blocks({0: [7], 3: [30, 31]}),
            rows=stage_pb2.Rows(
                slots=pack([0, 1, 2, 3], U32),
                counts=pack([1, 1, 1, 5], U32),
                input_steps=pack([2, 2, 2, 0], U64),
                tokens=pack(tokens(5), U32),
                sample=pack([1, 1, 1, 0], U8),
            ),
        ),
        stage_pb2.Step(
            number=4,
            release_slots=pack([1], U32),
            rows=stage_pb2.Rows(
                slots=pack([0, 3], U32),
                counts=pack([1, 2], U32),
                input_steps=pack([3, 0], U64),
                tokens=pack(tokens(2), U32),
            ),
        ),
        stage_pb2.Step(number=5, same_rows_as=4),
        stage_pb2.Step(
            number=6,
            admissions=admit([1], ways[1:2]),
            **blocks({1: [4], 2: [40]}),
            rows=stage_pb2.Rows(
                slots=pack([2, 1], U32),
                counts=pack([1, 2], U32),
                input_steps=pack([3, 0], U64),
                tokens=pack(tokens(2), U32),
            ),
        ),
        stage_pb2.Step(number=7, same_rows_as=6),
        stage_pb2.Step(number=8, same_rows_as=7),
    ]


def test_an_mlp_in_slices_and_a_norm_in_place_change_nothing(
    source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for the MLP of 8 positions at a time; the first steps have 20 and 8."""
    from stagemesh.stage.cuda import scratch

    monkeypatch.setattr(scratch, "MLP_STEP", 4)
    planned = scratch.plan_scratch
    monkeypatch.setattr(
        scratch, "plan_scratch", lambda *args, **kwargs: replace(planned(*args, **kwargs), mlp_rows=8)
    )
    layers = range(source.config.num_layers)
    reference = Stage(torch_engine(source, layers))
    stage = Stage(cuda_engine(source, layers, HostDevice(), graphs=False))
    assert stage.engine._parts.buffers.gate_up.shape[0] == 8
    for step in script()[:4]:
        assert stage.run(step).tokens.tolist() == reference.run(step).tokens.tolist(), step.number


@pytest.mark.parametrize("graphs", [True, False])
def test_it_samples_what_the_torch_engine_samples(source: Any, graphs: bool) -> None:
    layers = range(source.config.num_layers)
    device = HostDevice()
    reference = Stage(torch_engine(source, layers))
    stage = Stage(cuda_engine(source, layers, device, graphs=graphs, warm=graphs))
    for step in script():
        expected, got = reference.run(step), stage.run(step)
        assert got.tokens.tolist() == expected.tokens.tolist(), step.number
    replays = sum(graph.replays for graph in device.graphs)
    assert replays > len(device.graphs) if graphs else not replays
    counts = stage.engine._num_steps
    ways = ["by a graph", "by graphs between attentions"] if graphs else ["without graphs"]
    assert all(counts[way] >= 2 for way in ways)
    assert sum(counts.values()) == sum(counts[way] for way in ways) == len(script())


def test_stages_hand_on_what_the_torch_engine_hands_on(source: Any) -> None:
    cut = [range(1), range(1, 2)]
    expected = [
        Stage(torch_engine(source, cut[0]), last=False),
        Stage(torch_engine(source, cut[1]), first=False),
    ]
    device = HostDevice()
    got = [
        Stage(cuda_engine(source, cut[0], device), last=False),
        Stage(cuda_engine(source, cut[1], device), first=False),
    ]
    for step in script():
        hidden, other = expected[0].run(step).hidden, got[0].run(step).hidden
        np.testing.assert_allclose(
            np.frombuffer(other, np.float32), np.frombuffer(hidden, np.float32), rtol=1e-4, atol=1e-5
        )
        tokens, others = expected[1].run(step, hidden).tokens, got[1].run(step, other).tokens
        assert others.tolist() == tokens.tolist(), step.number
        for pair in (expected, got):
            pair[0].slots.deliver(step.number, tokens)


def one_kernel_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter is not for two threads at once, and both stages fetch their columns before either waits."""

    def transfer(source: torch.Tensor, target: torch.Tensor, count: int) -> None:
        target[:count] = source[:count]

    monkeypatch.setattr("stagemesh.stage.cuda.engine.transfer", transfer)


def connect(stages: list[Stage], epoch: int) -> None:
    """Open the link and the ring of two stages, as their leaders would."""
    with ThreadPoolExecutor(4) as threads:
        opening = []
        for kind, ends in (
            (stage_pb2.LINK_KIND_ACTIVATIONS, stages),
            (stage_pb2.LINK_KIND_RING, stages[::-1]),
        ):
            minted = ends[1].engine.links.prepare(kind)
            for end, sender in zip(ends, (True, False), strict=True):
                request = stage_pb2.ConnectLinkRequest(
                    epoch=epoch, kind=kind, transport="nccl", sender=sender, nccl_unique_ids=[minted]
                )
                opening.append(threads.submit(end.engine.links.connect, request))
        for one in opening:
            one.result(timeout=20)


def test_links_of_their_own_carry_activations_and_tokens(
    source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nccl_for_tests.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    layers = range(source.config.num_layers)
    device = HostDevice()
    stages = [
        Stage(cuda_engine(source, range(1), device, nccl=True), last=False, held=True),
        Stage(cuda_engine(source, range(1, 2), device, nccl=True), first=False),
    ]
    one_kernel_at_a_time(monkeypatch)
    for epoch in (1, 2):  # a raised epoch closes and opens them again
        reference = Stage(torch_engine(source, layers))
        for stage in stages:
            stage.open(epoch)
        connect(stages, epoch)
        for step in script():
            expected = reference.run(step).tokens.tolist()
            with ThreadPoolExecutor(2) as threads:
                first, last = [threads.submit(stage.run, step) for stage in stages]
                assert last.result(timeout=60).tokens.tolist() == expected, step.number
                assert first.result(timeout=60).sent_bytes


def test_tokens_that_nobody_takes_do_not_pile_up_in_the_link(
    source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of prompts that end with their first token: nothing ever asks for what comes round the ring."""
    fake_nccl_for_tests.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    device = HostDevice()
    stages = [
        Stage(cuda_engine(source, range(1), device, nccl=True), last=False, held=True),
        Stage(cuda_engine(source, range(1, 2), device, nccl=True), first=False),
    ]
    one_kernel_at_a_time(monkeypatch)
    connect(stages, 1)
    expected, oldest = stages[0].engine.links._expected, {}
    for number in range(1, 8):
        step = stage_pb2.Step(
            number=number,
            release_slots=pack([0], U32) if number > 1 else b"",
            admissions=admit([0], [(number, 0.0, 0, 1.0)]),
            append_slots=pack([0], U32),
            append_blocks=pack([number], U32),
            rows=stage_pb2.Rows(slots=pack([0], U32), counts=pack([2], U32), tokens=pack([5, 6], U32)),
        )
        with ThreadPoolExecutor(2) as threads:
            first, last = [threads.submit(stage.run, step) for stage in stages]
            taken = last.result(timeout=60).tokens
            first.result(timeout=60)
        assert len(expected) == min(number, DEPTH)
        if number > DEPTH:
            assert int(stages[0].engine._parts.cache.slot_tokens[0]) == oldest[number - DEPTH]
        oldest[number] = int(taken[0])


def test_an_abort_ends_a_wait_for_a_peer(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nccl_for_tests.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    device = HostDevice()
    stages = [
        Stage(cuda_engine(source, range(1), device, nccl=True), last=False, held=True),
        Stage(cuda_engine(source, range(1, 2), device, nccl=True), first=False),
    ]
    connect(stages, 1)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(stages[1].run, script()[0])
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.3)
        stages[1].engine.links.abort()
        assert not stages[1].engine.links.receives_hidden
        waiting.result(timeout=20)


def test_links_that_wait_for_each_other_are_broken_off_together(
    source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queued send stands behind the receive of another link: its abort returns only after that one's."""
    fake_nccl_for_tests.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    device = HostDevice()
    stages = [
        Stage(cuda_engine(source, range(1), device, nccl=True), last=False, held=True),
        Stage(cuda_engine(source, range(1, 2), device, nccl=True), first=False),
    ]
    connect(stages, 1)
    links = stages[1].engine.links
    receiving = threading.Event()

    def abort(comm: Any) -> None:
        if comm in incoming:
            receiving.set()
        assert receiving.wait(10)

    incoming = links._links[stage_pb2.LINK_KIND_ACTIVATIONS, False].comms
    monkeypatch.setattr(fake_nccl_for_tests.NcclCommunicator, "abort", abort)
    began = time.monotonic()
    links.abort()
    assert time.monotonic() - began < 5
    assert not links.sends_ring


def test_few_rows_are_summed_together_with_the_norm() -> None:
    from stagemesh.stage.cuda.fused_reduce import FusedReducer

    calls: list[int] = []

    class Module:
        def sum_add_norm(self, part: torch.Tensor, *others: Any) -> None:
            calls.append(part.shape[0])

    reducer = FusedReducer.__new__(FusedReducer)
    reducer._module, reducer._group, reducer._fused_rows = Module(), RankGroup(), 8
    reducer._workspace, reducer._crossovers = torch.zeros(7), []
    residual, weight = torch.ones(16, 32), torch.ones(32)
    for rows in (8, 9):
        part = torch.ones(rows, 32)
        reducer.sum_add_norm(part, residual[:rows], weight, 0.0, part)
    assert calls == [8]
    # Nine rows went the long way: the residual and the part are 2, their norm is 1.
    assert torch.equal(residual[8], torch.full((32,), 2.0))
    torch.testing.assert_close(part, torch.ones(9, 32))


def two_stages(source: Any, monkeypatch: pytest.MonkeyPatch) -> list[Stage]:
    """Linked, without graphs; one kernel at a time, so that both may run in threads."""
    fake_nccl_for_tests.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    device = HostDevice()
    stages = [
        Stage(cuda_engine(source, range(1), device, nccl=True, graphs=False), last=False, held=True),
        Stage(cuda_engine(source, range(1, 2), device, nccl=True, graphs=False), first=False),
    ]
    one_kernel_at_a_time(monkeypatch)
    connect(stages, 1)
    return stages


def run_together(stages: list[Stage], step: stage_pb2.Step) -> None:
    threads = [threading.Thread(target=stage.run, args=(step,)) for stage in stages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("which", [0, 1])
def test_a_launch_beside_an_abort_goes_to_its_end(
    source: Any, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    """The watchdog breaks off the links while the launch thread is on its way to them: the ring's, or activations'."""
    stages = two_stages(source, monkeypatch)
    step = script()[0]
    if which == 0:  # so that a step's tokens are expected
        run_together(stages, step)
        step = stage_pb2.Step(
            number=2, append_slots=pack([1], U32), append_blocks=pack([6], U32), same_rows_as=1
        )
    engine = stages[which].engine
    plain = engine._write

    def write(*args: Any, **options: Any) -> None:
        plain(*args, **options)
        engine.links.abort()

    monkeypatch.setattr(engine, "_write", write)
    stages[which].run(step)


def test_ranks_make_the_same_sums_where_the_link_of_one_fails(
    source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others would wait in theirs; the failure is told when the step is launched whole."""
    sums = []
    for fails in (True, False):
        with monkeypatch.context() as patch:
            stages = two_stages(source, patch)
            engine, calls = stages[1].engine, []
            reducer = engine._parts.reducer
            for name in ("sum", "greatest_in_place"):
                plain = getattr(reducer, name)
                patch.setattr(
                    reducer,
                    name,
                    lambda part, name=name, plain=plain, calls=calls: (calls.append(name), plain(part))[1],
                )
            if fails:
                comm = engine.links._links[stage_pb2.LINK_KIND_ACTIVATIONS, False].comms[0]

                def recv(*args: Any) -> None:
                    raise fake_nccl_for_tests.NcclError("NCCL_ERROR_REMOTE_ERROR")

                patch.setattr(comm, "recv", recv)
                stages[1].run(script()[0])
                assert "activations link failed" in engine.links.failure() == engine.links.failure()
                assert engine.links.check()
            else:
                run_together(stages, script()[0])
                assert not engine.links.failure()
            sums.append(calls)
    assert sums[0] == sums[1] != []


def test_more_changes_of_tables_than_there_is_room_for_are_refused(source: Any) -> None:
    """A router counts those of cached prefixes; a step of more would run past the columns."""
    stage = Stage(cuda_engine(source, range(1), HostDevice(), graphs=False), last=False)
    slots = list(range(8))
    admissions = admit(slots, [(1, 0.0, 0, 1.0)] * 8)
    admissions.positions = pack([60] * 8, U32)
    step = stage_pb2.Step(
        number=1,
        admissions=admissions,
        append_slots=pack([slot for slot in slots for _ in range(16)], U32),
        append_blocks=pack([block for slot in slots for block in [*range(15), 20 + slot]], U32),
        rows=stage_pb2.Rows(slots=pack(slots, U32), counts=pack([2] * 8, U32), tokens=pack([5] * 16, U32)),
    )
    with pytest.raises(InvalidArgumentError, match="step 1 changes 128 blocks"):
        stage.run(step)


def test_the_longest_step_of_the_warm_up_has_room_for_its_blocks(
    source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows of a full context than slots, as with few slots and a short context."""
    monkeypatch.setattr(sys.modules[__name__], "TOKENS", 64 * 4)
    monkeypatch.setattr(sys.modules[__name__], "SLOTS", 2)
    engine = cuda_engine(source, range(1), HostDevice(), graphs=False)
    cache = engine._parts.cache
    longest = engine_module.padding_batch(engine._longest_step(), cache.scratch_slot)
    written = int(engine_module.plan_rows(longest, cache.block_size).kv_begins[-1])
    assert cache.tables.numel() < written <= engine._blocks.numel()


@pytest.mark.parametrize("graphs", [True, False])
def test_tables_are_changed_before_links_open(
    source: Any, monkeypatch: pytest.MonkeyPatch, graphs: bool
) -> None:
    """The kernel is loaded then (rule 9), by a change that is passed over; there is one variant for all counts."""
    slots: list[int] = []
    plain = engine_module.change_tables

    def change(tables: Any, changed: Any, *others: Any) -> None:
        slots.extend(changed.tolist())
        plain(tables, changed, *others)

    monkeypatch.setattr(engine_module, "change_tables", change)
    cuda_engine(source, range(1), HostDevice(), graphs=graphs, warm=True)
    assert set(slots) == {-1}
