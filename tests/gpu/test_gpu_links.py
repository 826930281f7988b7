"""NCCL links that are closed, opened again, and lose their other end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from gpu_mesh import HOST_LINK, REHEARSAL, GPUMesh, MeshOf, settled_mib
from gpu_reference import VOCAB_SIZE, Comparison, Reference
from mesh_calls import generate, make_request, read_answer
from mesh_processes import is_alive, wait_for
from running_mesh import CALL_TIMEOUT_S

from stagemesh.v1 import admin_pb2, stage_pb2, stage_pb2_grpc

pytestmark = pytest.mark.gpus(2)

REOPENINGS = 5 if REHEARSAL else 50
LEAK_MIB = 16
RECOVERY_S = 90.0
PROMPT = np.random.default_rng(1).integers(0, VOCAB_SIZE, 50).tolist()


@pytest.fixture
def mesh(mesh_of: MeshOf) -> GPUMesh:
    """Two stages on two GPUs, which notice a worker's silence in seconds."""
    flags = ("--worker-timeout-s", "5", "--group-timeout-s", "5")
    return mesh_of(
        (1, 1), stage_flags=flags, router_flags=("--heartbeat-timeout-s", "3", "--step-timeout-s", "10")
    )


def check_answer(mesh: GPUMesh, reference: Reference, prompt: list[int] = PROMPT) -> None:
    comparison = Comparison()
    comparison.add(reference, prompt, generate(mesh, prompt, 24).token_ids, None)
    comparison.check()


def test_the_link_is_what_the_machine_offers(mesh: GPUMesh) -> None:
    expected = HOST_LINK if REHEARSAL else "nccl"
    assert [transport for transport, _ in mesh.links()] == [expected] * 2, mesh.links()


def test_a_new_router_raises_the_epoch(mesh: GPUMesh, reference: Reference) -> None:
    """Processes and weights stay, links are opened anew."""
    before, epoch = mesh.worker_pids(), mesh.lane.epoch
    mesh.restart_router()
    assert mesh.lane.epoch > epoch
    assert mesh.worker_pids() == before
    check_answer(mesh, reference)


def test_an_epoch_raised_in_mid_stream(mesh: GPUMesh, reference: Reference) -> None:
    """Sends and receives are pending when the router is gone."""
    calls = [mesh.stub.Generate(make_request(PROMPT, 1500), timeout=CALL_TIMEOUT_S) for _ in range(8)]
    for call in calls:
        next(call)
    mesh.router.kill()
    mesh.start_router()
    mesh.wait_ready()
    check_answer(mesh, reference)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("stage", [0, 1])
def test_a_dead_peer_hangs_nobody(
    stage: int, number: signal.Signals, mesh: GPUMesh, reference: Reference
) -> None:
    """Every stream ends, with its tokens or a status, and the mesh comes back by itself."""
    victim = mesh.worker_pids()[stage][0]
    survivor = mesh.worker_pids()[1 - stage][0]
    with ThreadPoolExecutor(8) as pool:
        calls = [mesh.stub.Generate(make_request(PROMPT, 1500), timeout=RECOVERY_S) for _ in range(8)]
        for call in calls:
            next(call)
        os.kill(victim, number)
        began = time.monotonic()
        ends = list(pool.map(end_of, calls))
    assert time.monotonic() - began < RECOVERY_S
    assert all(end in (None, grpc.StatusCode.UNAVAILABLE) for end in ends), ends
    wait_for(lambda: not is_alive(victim), f"the end of worker {victim}", RECOVERY_S)
    wait_for(lambda: replaced(mesh, stage, victim), f"a worker in place of {victim}", RECOVERY_S)
    if mesh.worker_pids()[1 - stage][0] == survivor:
        print("survivor kept")
    else:
        print(f"survivor replaced: {mesh.stages[1 - stage].log.read_text()[-2000:]}")
    check_answer(mesh, reference)


def replaced(mesh: GPUMesh, stage: int, victim: int) -> bool:
    """Whether the lane is ready with another worker; until the loss is noticed it is ready with the old one."""
    lane = mesh.lane
    ranks = lane.stages[stage].description.ranks
    return lane.state == admin_pb2.LANE_STATE_READY and bool(ranks) and ranks[0].process_id != victim


def end_of(call: Iterator[object]) -> grpc.StatusCode | None:
    """How a stream ended: None is well."""
    try:
        read_answer(call)
    except grpc.RpcError as error:
        return error.code()
    return None


def test_links_opened_again_and_again_leak_nothing(mesh: GPUMesh, reference: Reference) -> None:
    """By the stage's own RPCs: every other time the old links were left with data under way."""
    mesh.router.stop()
    channels = [grpc.insecure_channel(address) for address in mesh.addresses]
    stubs = [stage_pb2_grpc.StageServiceStub(channel) for channel in channels]
    described = [stub.Describe(stage_pb2.DescribeRequest(), timeout=10) for stub in stubs]
    transport = "nccl" if all("nccl" in one.transports for one in described) else "grpc"
    blocks = min(one.num_blocks for one in described)
    epoch = int(time.time() * 1000)
    memory: list[list[int]] = []
    with ThreadPoolExecutor(8) as pool:
        for count in range(REOPENINGS):
            reopen(pool, stubs, mesh.addresses, epoch + count, blocks, transport)
            if count in (4, REOPENINGS - 1):
                memory.append(settled_mib())
    for channel in channels:
        channel.close()
    grown = [last - first for first, last in zip(memory[0], memory[-1], strict=True)]
    print(f"{REOPENINGS} times {transport}: MiB {memory[0]} then {memory[-1]}")
    assert max(grown) <= LEAK_MIB, memory
    mesh.start_router()
    mesh.wait_ready()
    check_answer(mesh, reference)


def reopen(
    pool: ThreadPoolExecutor,
    stubs: list[stage_pb2_grpc.StageServiceStub],
    addresses: list[str],
    epoch: int,
    blocks: int,
    transport: str,
) -> None:
    """What the router does to raise the epoch of a lane of two stages."""

    def all_of(calls: list[tuple[object, object]]) -> list[object]:
        futures = [pool.submit(method, request, timeout=60) for method, request in calls]  # type: ignore[arg-type]
        return [future.result() for future in futures]

    all_of(
        [
            (
                stub.OpenLane,
                stage_pb2.OpenLaneRequest(
                    lane_id="test",
                    epoch=epoch,
                    stage_index=index,
                    num_stages=2,
                    num_blocks=blocks,
                    max_slots=64,
                    depth=3,
                ),
            )
            for index, stub in enumerate(stubs)
        ]
    )
    links = [(0, 1, stage_pb2.LINK_KIND_ACTIVATIONS), (1, 0, stage_pb2.LINK_KIND_RING)]
    prepared = all_of(
        [
            (
                stubs[receiver].PrepareLink,
                stage_pb2.PrepareLinkRequest(epoch=epoch, kind=kind, transport=transport),
            )
            for _, receiver, kind in links
        ]
    )
    connects = []
    for (sender, receiver, kind), answer in zip(links, prepared, strict=True):
        for end in (sender, receiver):
            request = stage_pb2.ConnectLinkRequest(
                epoch=epoch,
                kind=kind,
                transport=transport,
                sender=end == sender,
                peer_address=addresses[receiver] if end == sender else "",
                nccl_unique_ids=answer.nccl_unique_ids,  # type: ignore[attr-defined]
                timeout_ms=20_000,
            )
            connects.append((stubs[end].ConnectLink, request))
    all_of(connects)
