"""A load on a mesh, in a process of its own: one Session carries all requests, and every token's arrival counts.

    echo '{"address": "127.0.0.1:50051", "requests": [[0.0, 16, 200], ...]}' | python benchmarks/load.py

A request is [seconds from the start, prompt tokens, output tokens]. Prints one JSON object: for each request
the arrival of each token in seconds from the start.
"""

from __future__ import annotations

import json
import queue
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Request = tuple[float, int, int]
"""Seconds from the start, prompt tokens, output tokens."""
VOCAB = 32_000
OPTIONS = (("grpc.max_receive_message_length", 64 << 20), ("grpc.use_local_subchannel_pool", 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """What the client saw. Seconds from the start of the load."""

    sent: list[float]
    """When each request was handed to the session."""
    tokens: list[Floats]
    """Arrivals of each request's tokens."""
    errors: list[str]

    def ttft(self) -> Floats:
        """Seconds from request to first token, of each request that got one."""
        pairs = zip(self.sent, self.tokens, strict=True)
        return np.array([times[0] - sent for sent, times in pairs if len(times)])

    def inter_token(self) -> Floats:
        """Seconds between neighbouring tokens, over all requests."""
        gaps = [np.diff(times) for times in self.tokens if len(times) > 1]
        return np.concatenate(gaps) if gaps else np.zeros(0)

    def rate(self, begin: float, end: float) -> float:
        """Tokens per second within a window."""
        return sum(int(np.count_nonzero((times > begin) & (times <= end))) for times in self.tokens) / (
            end - begin
        )

    def steady_window(self) -> tuple[float, float]:
        """From when all streams have begun until the first has ended."""
        return max(times[0] for times in self.tokens), min(times[-1] for times in self.tokens)


def play(address: str, requests: Sequence[Request], *, timeout_s: float, seed: int = 1) -> Arrivals:
    """Run the load in a child process."""
    spec = {"address": address, "requests": requests, "timeout_s": timeout_s, "seed": seed}
    done = subprocess.run(
        [sys.executable, str(Path(__file__))],
        input=json.dumps(spec).encode(),
        capture_output=True,
        timeout=timeout_s + 60,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the load generator failed:\n{done.stderr.decode()[-4000:]}")
    result = json.loads(done.stdout)
    return Arrivals(
        sent=result["sent"], tokens=[np.array(times) for times in result["tokens"]], errors=result["errors"]
    )


def main() -> None:
    """The child."""
    spec: dict[str, Any] = json.load(sys.stdin)
    print(json.dumps(_play(spec["address"], spec["requests"], spec["timeout_s"], spec["seed"])))


def _play(address: str, requests: Sequence[Request], timeout_s: float, seed: int) -> dict[str, Any]:
    import grpc

    from stagemesh.v1 import inference_pb2 as pb
    from stagemesh.v1 import inference_pb2_grpc

    draw = random.Random(seed)
    messages = [
        pb.GenerateRequest(
            request_id=str(index),
            token_ids=pb.TokenIds(ids=[draw.randrange(3, VOCAB) for _ in range(prompt)]),
            max_tokens=output,
            temperature=0.0,
            ignore_eos=True,
        )
        for index, (_, prompt, output) in enumerate(requests)
    ]
    outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
    sent = [0.0] * len(requests)
    arrivals: list[list[float]] = [[] for _ in requests]
    errors: list[str] = []
    left = len(requests)

    def send() -> Iterator[Any]:
        while (message := outgoing.get()) is not None:
            yield message

    def feed() -> None:
        index = 0
        while index < len(requests):
            wait = begin + requests[index][0] - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            due = []
            now = time.monotonic() - begin
            while index < len(requests) and requests[index][0] <= now:
                sent[index] = now
                due.append(messages[index])
                index += 1
            if due:
                outgoing.put(pb.SessionRequest(start=due))

    with grpc.insecure_channel(address, OPTIONS) as channel:
        grpc.channel_ready_future(channel).result(10)
        call = inference_pb2_grpc.InferenceServiceStub(channel).Session(send(), timeout=timeout_s)
        begin = time.monotonic()
        feeder = threading.Thread(target=feed, daemon=True)
        feeder.start()
        for response in call:
            now = time.monotonic() - begin
            for request_id, count in zip(response.request_ids, response.token_counts, strict=True):
                arrivals[int(request_id)] += [now] * count
            for end in response.ends:
                left -= 1
                if end.status:
                    errors.append(f"request {end.request_id}: {end.status!r}")
            if not left:
                outgoing.put(None)
        feeder.join()
    return {"sent": sent, "tokens": arrivals, "errors": errors}


if __name__ == "__main__":
    main()
