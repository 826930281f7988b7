"""stagemesh beside transformers on this machine's CPU: the same model, the same run, interleaved.

    python benchmarks/cpu.py --json

SmolLM2-135M-Instruct in float32 with two threads. Ours is measured at a gRPC client, through router and
stages; transformers in process, with sdpa and logits_to_keep=1. A figure is the median of `--repeats`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc
from bench_mesh import RunningMesh, running_mesh
from process_memory import children, pss_mib
from report import Report
from transformers_peer import TransformersPeer

from stagemesh.client import Client
from stagemesh.v1 import admin_pb2, admin_pb2_grpc

PROMPT_TOKENS = 64
OUTPUT_TOKENS = 48
PREFILL_TOKENS = 1024
STREAMS = 16
DEMO_MODEL = Path(__file__).parent.parent / ".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf"
VOCAB = 40_000

Prompts = list[list[int]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--model", default=str(DEMO_MODEL), help="a GGUF file (default: the demo model)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    report = Report("cpu", options.json)
    threads = ["--threads", str(options.threads)]
    with (
        running_mesh(options.model, "--stages", "1", *threads) as one,
        running_mesh(options.model, "--stages", "2", *threads) as two,
    ):
        report.note("meshes of 1 and 2 stages are up; loading transformers")
        peer = TransformersPeer(Path(options.model), options.threads)
        _against_transformers(report, peer, one, options.repeats)
        _two_stages(report, one, two, options.repeats)
    _start_and_memory(report, options.model, options.repeats)
    report.finish()


def _against_transformers(report: Report, peer: TransformersPeer, mesh: RunningMesh, repeats: int) -> None:
    rows: list[tuple[str, int, float, float]] = [
        ("decode, 1 stream, 1 stage", 1, 1.2, 1.5),
        ("decode, 16 streams, 1 stage", STREAMS, 2.5, 4.0),
    ]
    with Client(mesh.listen) as client:
        for name, streams, target, stretch in rows:
            ours, theirs = _interleaved(
                repeats,
                lambda: decode_rate(client, prompts(streams, PROMPT_TOKENS)),  # noqa: B023 - called at once
                lambda: peer.decode_rate(prompts(streams, PROMPT_TOKENS), OUTPUT_TOKENS),  # noqa: B023
            )
            report.add(
                name,
                ours / theirs,
                "x",
                target=target,
                stretch=stretch,
                reference=f"ours {ours:.1f} tok/s, transformers {theirs:.1f} tok/s",
            )
        ours, theirs = _interleaved(
            repeats,
            lambda: prefill_rate(client, prompts(1, PREFILL_TOKENS)[0]),
            lambda: peer.prefill_rate(prompts(1, PREFILL_TOKENS)[0]),
        )
        report.add(
            f"prefill of {PREFILL_TOKENS:,} tokens",
            ours / theirs,
            "x",
            target=1.0,
            stretch=1.4,
            reference=f"ours {ours:.0f} tok/s, transformers {theirs:.0f} tok/s",
        )


def _two_stages(report: Report, one: RunningMesh, two: RunningMesh, repeats: int) -> None:
    with Client(one.listen) as first, Client(two.listen) as second:
        single, double = _interleaved(
            2 * repeats,
            lambda: decode_rate(first, prompts(1, PROMPT_TOKENS)),
            lambda: decode_rate(second, prompts(1, PROMPT_TOKENS)),
        )
        report.add(
            "1 stream, 2 stages against 1 stage",
            double / single,
            "x",
            target=0.85,
            stretch=0.95,
            reference=f"2 stages {double:.1f} tok/s, 1 stage {single:.1f} tok/s",
        )
        single, double = _interleaved(
            repeats,
            lambda: decode_rate(first, prompts(STREAMS, PROMPT_TOKENS)),
            lambda: decode_rate(second, prompts(STREAMS, PROMPT_TOKENS)),
        )
        report.add(
            "16 streams, 2 stages against 1 stage",
            double / single,
            "x",
            reference=f"2 stages {double:.1f} tok/s, 1 stage {single:.1f} tok/s; both use all cores, so 1.0 is the limit",
        )


def _start_and_memory(report: Report, model: str, repeats: int) -> None:
    seconds = []
    for attempt in range(max(1, repeats - 2)):
        with running_mesh(model, "--stages", "3", "--tp", "1,2,1") as mesh:
            seconds.append(mesh.ready_s)
            if attempt == 0:
                _memory(report, mesh)
    report.add(
        "`stagemesh up` to ready, 3 stages, TP 1·2·1",
        statistics.median(seconds),
        "s",
        target=15,
        stretch=8,
        at_most=True,
        reference=f"median of {len(seconds)}",
    )


def _memory(report: Report, mesh: RunningMesh) -> None:
    with Client(mesh.listen) as client:
        prefill_rate(client, prompts(1, PREFILL_TOKENS)[0])
    with grpc.insecure_channel(mesh.admin) as channel:
        status = admin_pb2_grpc.AdminServiceStub(channel).GetStatus(admin_pb2.GetStatusRequest()).status
    overheads, leaders = [], []
    for stage in status.lanes[0].stages:
        described = stage.description
        for rank in described.ranks:
            touched = rank.kv_bytes / described.num_blocks * -(-PREFILL_TOKENS // described.block_size)
            held = (rank.weight_bytes + touched) / (1 << 20)
            overheads.append(pss_mib(rank.process_id) - held)
        leaders.append(_parent(described.ranks[0].process_id))
    router = next(pid for pid in children(mesh.up_pid) if pid not in leaders)
    report.add(
        "worker's memory over shard and touched KV, worst",
        max(overheads),
        "MiB",
        target=350,
        at_most=True,
        reference="PSS, each: " + ", ".join(f"{value:.0f}" for value in overheads),
    )
    report.add(
        "leader's memory, worst", max(map(pss_mib, leaders)), "MiB", target=100, at_most=True, reference="PSS"
    )
    report.add("router's memory", pss_mib(router), "MiB", target=250, at_most=True, reference="PSS")


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _interleaved(repeats: int, *runs: Callable[[], float]) -> list[float]:
    """The median of each, taken in turns after one unmeasured round."""
    for run in runs:
        run()
    values: Sequence[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, kept in zip(runs, values, strict=True):
            kept.append(run())
    return [statistics.median(kept) for kept in values]


def prompts(count: int, length: int) -> Prompts:
    """Random token ids, another set at each call, so that no cache helps."""
    return [[random.randrange(VOCAB) for _ in range(length)] for _ in range(count)]


def prefill_rate(client: Client, prompt: list[int]) -> float:
    """Prompt tokens per second until the first token is at the client."""
    began = time.perf_counter()
    client.complete(token_ids=prompt, max_tokens=1, temperature=0, ignore_eos=True)
    return len(prompt) / (time.perf_counter() - began)


def decode_rate(client: Client, batch: Prompts) -> float:
    """Tokens per second at the client while every stream decodes; all of them share one connection."""
    arrivals: list[list[float]] = [[] for _ in batch]
    stream = client.generate_many(batch, max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)
    for index, chunk in stream:
        if chunk.error is not None:
            raise chunk.error
        arrivals[index] += [time.perf_counter()] * len(chunk.token_ids)
    begin, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    counted = sum(begin < at <= end for times in arrivals for at in times)
    return counted / (end - begin)


if __name__ == "__main__":
    main()
