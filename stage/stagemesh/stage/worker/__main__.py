"""Starts a worker: `python -m stagemesh.stage.worker SPEC`, by a leader only."""

from __future__ import annotations

import logging
import signal
import socket
import sys
import time
import warnings
from pathlib import Path

from stagemesh.model.cost import CostModel
from stagemesh.stage.engine.interface import Engine
from stagemesh.stage.engine.profiled import profiled
from stagemesh.stage.local_queue import ToLeader
from stagemesh.stage.local_socket import WorkerSocket
from stagemesh.stage.plan import ITEMSIZE, StagePlan, plan_stage
from stagemesh.stage.worker.spec import WorkerSpec
from stagemesh.stage.worker.worker import Worker
from stagemesh.wire.columns import U64, pack
from stagemesh.wire.errors import ConfigError, StagemeshError
from stagemesh.wire.logs import setup_logging
from stagemesh.wire.process import die_with_parent, settle, take_short_slices

PROGRESS_INTERVAL_S = 0.2
SLICE_NS = 100_000
"""Of the thread of a worker that does not compute itself: it has 0.3 ms of work a step, and the next stage waits for it."""


def main() -> int:
    """Load, serve, leave. The leader hears why if loading fails."""
    spec = WorkerSpec.model_validate_json(sys.argv[1])
    die_with_parent(spec.leader_pid)
    # Ctrl-C on a terminal reaches every process of it; the leader decides when a worker stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    setup_logging(spec.config.log_level, spec.config.log_json, f"worker {spec.rank}")
    queue = WorkerSocket(socket.socket(fileno=spec.queue))
    try:
        worker = _load(spec, queue)
    except StagemeshError as error:
        queue.send_multipart([ToLeader.FAILED, f"{error.reason}\0{error}".encode()])
        return 1
    except Exception as error:
        logging.getLogger(__name__).exception("worker %d cannot start", spec.rank)
        queue.send_multipart([ToLeader.FAILED, f"BUG\0{type(error).__name__}: {error}".encode()])
        return 1
    else:
        settle()
        worker.serve()
        return 0
    finally:
        queue.close()


def _load(spec: WorkerSpec, queue: WorkerSocket) -> Worker:
    plan = plan_stage(spec.config, used_bytes=spec.used_bytes)
    if spec.config.engine == "sim":
        engine = _sim_engine(spec, plan)
    elif plan.device == "cuda":
        engine = _cuda_engine(spec, plan, queue)
    else:
        engine = _torch_engine(spec, plan, queue)
    if spec.config.engine == "sim" or plan.device == "cuda":  # what computes is not this thread
        take_short_slices(SLICE_NS)
    return Worker(
        spec.rank,
        profiled(engine),
        queue,
        queue,
        block_size=spec.config.block_size,
        max_context=plan.max_context,
        step_timeout_s=spec.config.worker_timeout_s,
        reports=spec.config.trace_ranks,
    )


def _sim_engine(spec: WorkerSpec, plan: StagePlan) -> Engine:
    from stagemesh.stage.engine.sim_engine import SimEngine

    model = plan.source.config
    return SimEngine(
        CostModel.parse(spec.config.cost),
        rank=spec.rank,
        hidden_bytes=model.hidden_size * ITEMSIZE[plan.dtype],
        num_blocks=plan.num_blocks,
        vocab_size=model.vocab_size,
        last=plan.layers.stop == model.num_layers,
    )


def _torch_engine(spec: WorkerSpec, plan: StagePlan, queue: WorkerSocket) -> Engine:
    began = time.perf_counter()
    import torch

    from stagemesh.stage import native
    from stagemesh.stage.engine.torch_engine import TorchEngine
    from stagemesh.stage.group import RankGroup

    # Activations are read where they arrived, in memory that is not writable; nothing writes them.
    warnings.filterwarnings("ignore", message="The given buffer is not writable")
    if spec.config.linears == "onednn" and not torch.backends.mkldnn.is_available():
        raise ConfigError("--linears onednn: this torch has no oneDNN; leave the flag out")
    if spec.config.linears == "native" and not native.is_available():
        raise ConfigError(
            "--linears native: it was built without a C compiler, or this CPU has no AVX-512; leave the flag out"
        )
    torch.set_num_threads(spec.config.num_threads)
    imported = time.perf_counter()
    group = RankGroup.connect(
        spec.rank,
        spec.config.tp,
        Path(spec.store),
        timeout_s=spec.config.group_timeout_s,
        memory=spec.memory,
    )
    last_said = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last_said
        now = time.monotonic()
        if done == total or now - last_said > PROGRESS_INTERVAL_S:
            last_said = now
            queue.send_multipart([ToLeader.PROGRESS, pack([spec.rank, done, total], U64)])

    return TorchEngine(
        plan.source,
        plan.layers,
        plan.deals,
        group,
        dtype=plan.dtype,
        num_blocks=plan.num_blocks,
        block_size=spec.config.block_size,
        max_context=plan.max_context,
        layout=None if spec.config.linears == "auto" else spec.config.linears,
        dummy=spec.config.load_format == "dummy",
        progress=progress,
        start_seconds={"import": imported - began},
    )


def _cuda_engine(spec: WorkerSpec, plan: StagePlan, queue: WorkerSocket) -> Engine:
    began = time.perf_counter()
    import torch

    from stagemesh.stage.cuda.device import CudaDevice
    from stagemesh.stage.cuda.parts import make_cuda_engine
    from stagemesh.stage.group import RankGroup

    imported = time.perf_counter()
    device = CudaDevice(plan.gpus[spec.rank].index)
    group = RankGroup.connect(
        spec.rank,
        spec.config.tp,
        Path(spec.store),
        # torch counts from the enqueue, and a sum may stand behind a receive: the worker's own deadline, which names who
        # is late, comes first.
        timeout_s=max(spec.config.group_timeout_s, 2 * spec.config.worker_timeout_s),
        device=device.torch_device,
    )
    torch.cuda.synchronize()
    context = time.perf_counter()
    said: dict[str, float] = {}

    def progress(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - said.get(what, 0.0) > PROGRESS_INTERVAL_S:
            said[what] = now
            queue.send_multipart([ToLeader.PROGRESS, pack([spec.rank, done, total], U64), what.encode()])

    return make_cuda_engine(
        spec.config,
        plan,
        group,
        device,
        progress=progress,
        start_seconds={"import": imported - began, "context": context - imported},
    )


if __name__ == "__main__":
    sys.exit(main())
