"""Meshes of real processes on the GPUs of this machine, and what their logs and status say of them.

STAGEMESH_GPU_TESTS=cpu runs the tests on CPU stages instead, with smaller models: it proves the tests, not
the GPUs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc
import numpy as np
import numpy.typing as npt
import torch
from mesh_processes import Service, start_stage, wait_for
from running_mesh import RunningMesh

from stagemesh.v1 import admin_pb2, stage_pb2, stage_pb2_grpc

REHEARSAL = os.environ.get("STAGEMESH_GPU_TESTS") == "cpu"
START_TIMEOUT_S = 60.0 if REHEARSAL else 300.0
"""The first start on a machine compiles kernels."""
HOST_LINK = "unix" if REHEARSAL else "grpc"
"""What links stages of one host that NCCL does not."""
TOLD_TIMEOUT_S = 5.0
NUM_GPUS = 4 if REHEARSAL else torch.cuda.device_count()


class GPUMesh(RunningMesh):
    """A lane whose ranks have a GPU each, in order, again from the first where there are too few; `devices` may put a
    stage on the CPU.

    Args:
        folder: For logs.
        model: What it serves.
        tps: Ranks of each stage.
        devices: "cuda" or "cpu" for each stage; by default all on GPUs.
        shared: Every stage on GPU 0.
        share: Of a GPU's memory, for each stage.
        stage_flags: Further flags of every stage.
        router_flags: Further flags of the router.
    """

    def __init__(
        self,
        folder: Path,
        model: Path,
        tps: Sequence[int],
        *,
        devices: Sequence[str] = (),
        shared: bool = False,
        share: float = 0.3,
        dtype: str = "bfloat16",
        stage_flags: Sequence[str] = (),
        router_flags: Sequence[str] = (),
    ) -> None:
        self._devices = devices or ["cuda"] * len(tps)
        self._shared = shared
        self._gpu_flags = ("--memory-share", str(share), "--max-graph-rows", "64")
        common = ("--dtype", dtype, "--max-context", "2048", *stage_flags)
        super().__init__(
            folder,
            model,
            tps,
            stage_flags=common,
            router_flags=("--max-context", "2048", "--no-prefix-cache", "--debug-logits", *router_flags),
        )

    def wait_ready(self) -> admin_pb2.LaneStatus:
        """Wait until the lane is ready; kernels may have to be compiled."""

        def look() -> admin_pb2.LaneStatus | None:
            for service in (*self.stages, self.router):
                assert service.process.poll() is None, f"{service.name} ended:\n{service.log.read_text()}"
            lane = self.lane
            return lane if lane.state == admin_pb2.LANE_STATE_READY else None

        return wait_for(look, "the lane", START_TIMEOUT_S)

    def logits(self) -> dict[str, npt.NDArray[np.float32]]:
        """[generated tokens, vocabulary] of every request that this router has run, by its id."""
        rows: dict[int, list[str]] = {}
        found: dict[str, list[npt.NDArray[np.float32]]] = {}
        for text in self.step_log.read_text().splitlines():
            line = json.loads(text)
            if "rows" in line:
                rows[line["step"]] = [name for name, _, sampled in line["rows"] if sampled]
            elif "logits" in line:
                names = rows[line["result"]]
                values = np.frombuffer(bytes.fromhex(line["logits"]), np.float32).reshape(len(names), -1)
                for name, row in zip(names, values, strict=True):
                    found.setdefault(name, []).append(row)
        return {name: np.stack(parts) for name, parts in found.items()}

    def links(self) -> list[tuple[str, str]]:
        """Transport and reason, of each stage's outgoing link."""
        return [(stage.link_transport, stage.link_reason) for stage in self.lane.stages]

    def close(self) -> None:
        """End every process; what computed and what linked goes to the test's output before."""
        try:
            if hasattr(self, "admin"):
                print(*self.told(), sep="\n")
        except (grpc.RpcError, AssertionError, IndexError) as error:
            print(f"{self.folder.name}: no status at its end: {error}")
        finally:
            super().close()

    def told(self) -> list[str]:
        """A line for each stage: its attention, steps with and without graphs, link and why it was chosen.

        The router is ended and the stages opened anew: a worker tells its steps when its epoch ends.
        """
        lane = self.lane
        self.router.kill()
        epoch = max(int(time.time() * 1000), lane.epoch + 1)
        for index, address in enumerate(self.addresses):
            with grpc.insecure_channel(address) as channel:
                request = stage_pb2.OpenLaneRequest(
                    lane_id="end",
                    epoch=epoch,
                    stage_index=index,
                    num_stages=len(self.tps),
                    num_blocks=lane.num_blocks,
                    max_slots=1,
                    depth=2,
                )
                stage_pb2_grpc.StageServiceStub(channel).OpenLane(request, timeout=20)
        lines = []
        for index, stage in enumerate(lane.stages):
            name = f"{self.folder.name}, stage {index} of {len(self.tps)}"
            for rank in stage.description.ranks:
                backends = dict(rank.backends)
                steps = self._steps_told(index, rank.rank) if rank.device.startswith("cuda") else []
                lines.append(
                    f"{name}, rank {rank.rank} on {rank.device}: attention {backends.get('attention', 'of the CPU')}, "
                    f"all-reduce {backends.get('all-reduce', 'of the CPU')}, graphs {backends.get('graphs', 'none')}, steps "
                    f"{'; then '.join(steps) or 'not told'}, link {stage.link_transport} ({stage.link_reason})"
                )
        return lines

    def _steps_told(self, index: int, rank: int) -> list[str]:
        """What a worker said of its steps when an epoch ended; the last time may take it a moment."""
        deadline = time.monotonic() + TOLD_TIMEOUT_S
        while True:
            told = re.findall(rf"worker {rank}: steps so far: (.*)", self.stages[index].log.read_text())
            if told or time.monotonic() > deadline:
                return told
            time.sleep(0.05)

    def _start_stage(self, index: int, listen: str = "127.0.0.1:0") -> Service:
        flags = [*self._stage_flags]
        if self._devices[index] == "cpu" or REHEARSAL:
            flags += ["--device", "cpu", "--kv-memory", "64MiB"]
        else:
            gpus = ",".join(map(str, self.gpus(index)))
            flags += ["--device", "cuda", "--gpus", gpus, *self._gpu_flags]
        tp, count = self.tps[index], len(self.tps)
        return start_stage(self.folder, self.model, index, count, tp=tp, listen=listen, flags=flags)

    def gpus(self, index: int) -> list[int]:
        """Of a stage, in order of its ranks."""
        before = zip(self.tps[:index], self._devices, strict=False)
        first = 0 if self._shared else sum(tp for tp, device in before if device == "cuda")
        return [(first + rank) % NUM_GPUS for rank in range(self.tps[index])]


MeshOf = Callable[..., GPUMesh]


def used_mib() -> list[int]:
    """Memory in use on each GPU, as the driver counts it."""
    if REHEARSAL:
        return [0]
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return [int(line) for line in subprocess.check_output(command, text=True).split()]


def settled_mib() -> list[int]:
    """The same once it no longer changes: the driver frees late."""
    last = used_mib()
    for _ in range(20):
        time.sleep(0.25)
        now = used_mib()
        if now == last:
            return now
        last = now
    return last
