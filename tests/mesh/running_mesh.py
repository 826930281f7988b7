"""A router and its stages, each a process, and the stubs to talk to them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from mesh_processes import START_TIMEOUT_S, Service, address_of, start_router, start_stage, wait_for

from stagemesh.v1 import admin_pb2, admin_pb2_grpc, inference_pb2_grpc

CALL_TIMEOUT_S = 60.0


class RunningMesh:
    """One lane of real processes.

    Args:
        folder: For logs.
        model: What it serves.
        tps: Ranks of each stage.
        stage_flags: Further flags of every stage.
        own_flags: And of each one alone.
        own_prefix: Of the command of each one alone.
        router_flags: Further flags of the router.
    """

    def __init__(
        self,
        folder: Path,
        model: Path,
        tps: Sequence[int],
        *,
        stage_flags: Sequence[str] = ("--kv-memory", "16MiB"),
        own_flags: Sequence[Sequence[str]] = (),
        own_prefix: Sequence[Sequence[str]] = (),
        router_flags: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self.model = model
        self.tps = tuple(tps)
        self._stage_flags = stage_flags
        self._own_flags = own_flags
        self._own_prefix = own_prefix
        self.router_flags = router_flags
        self._channels: list[grpc.Channel] = []
        self.stages: list[Service] = []
        try:
            self.stages += [self._start_stage(index) for index in range(len(tps))]
            self.addresses = [address_of(stage) for stage in self.stages]
            self.start_router()
        except BaseException:
            self.close()
            raise

    def start_router(self) -> None:
        """A router for the stages that are there; the one before it must have ended."""
        self.step_log = self.folder / f"steps-{len(list(self.folder.iterdir()))}.jsonl"
        flags = ("--step-log", str(self.step_log), *self.router_flags)
        self.router = start_router(self.folder, self.model, self.addresses, flags)
        listen, admin = self.router.said(r"listening on (\S+), admin on (\S+),").groups()
        self.listen, self.admin_listen = listen, admin
        self._channels += [grpc.insecure_channel(listen), grpc.insecure_channel(admin)]
        self.stub = inference_pb2_grpc.InferenceServiceStub(self._channels[-2])
        self.admin = admin_pb2_grpc.AdminServiceStub(self._channels[-1])

    def restart_router(self) -> None:
        """Another router process against the same stages."""
        assert self.router.stop() == 0
        self.start_router()
        self.wait_ready()

    def restart_stage(self, index: int) -> None:
        """A stage that has ended comes back where it was."""
        self.stages[index].process.wait(START_TIMEOUT_S)
        self.stages[index] = self._start_stage(index, self.addresses[index])

    def status(self) -> admin_pb2.MeshStatus:
        return self.admin.GetStatus(
            admin_pb2.GetStatusRequest(), timeout=CALL_TIMEOUT_S, wait_for_ready=True
        ).status

    @property
    def lane(self) -> admin_pb2.LaneStatus:
        return self.status().lanes[0]

    def wait_ready(self) -> admin_pb2.LaneStatus:
        """Wait until the lane is ready."""

        def look() -> admin_pb2.LaneStatus | None:
            assert self.router.process.poll() is None, self.router.log.read_text()
            lane = self.lane
            return lane if lane.state == admin_pb2.LANE_STATE_READY else None

        return wait_for(look, "the lane", START_TIMEOUT_S)

    def wait_reason(self, text: str) -> str:
        """Wait until the lane says why it is not ready, in words that have `text`."""
        return wait_for(
            lambda: reason if text in (reason := self.lane.reason) else None, f"a reason with '{text}'"
        )

    def wait_idle(self) -> admin_pb2.LaneStatus:
        """Wait until nothing runs and no step is in flight."""

        def look() -> admin_pb2.LaneStatus | None:
            status = self.status()
            busy = status.num_running or status.num_waiting or status.lanes[0].steps_in_flight
            return None if busy else status.lanes[0]

        return wait_for(look, "an idle mesh")

    def steps(self) -> list[dict[str, Any]]:
        """Every step this router has sent so far; rows are (request id, tokens, whether it is sampled)."""
        lines = self.step_log.read_text().splitlines(keepends=True)
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return [record for record in records if "step" in record]

    def steps_of(self, request_id: str) -> list[int]:
        """Numbers of the steps that a request has rows in."""
        return [step["step"] for step in self.steps() if any(row[0] == request_id for row in step["rows"])]

    def worker_pids(self) -> list[list[int]]:
        """Of every stage."""
        return [[rank.process_id for rank in stage.description.ranks] for stage in self.lane.stages]

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        for service in (*([self.router] if hasattr(self, "router") else []), *self.stages):
            service.kill()

    def _start_stage(self, index: int, listen: str = "127.0.0.1:0") -> Service:
        return start_stage(
            self.folder,
            self.model,
            index,
            len(self.tps),
            tp=self.tps[index],
            listen=listen,
            flags=(*self._stage_flags, *(self._own_flags[index] if self._own_flags else ())),
            prefix=self._own_prefix[index] if self._own_prefix else (),
        )
