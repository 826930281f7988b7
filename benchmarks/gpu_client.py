"""The client of the GPU benchmarks, a process of its own: token ids over one Session call each time.

    python benchmarks/gpu_client.py ADDRESS --sizes 1,16 --requests 512,2048

Prints a JSON line before and after each measurement, with the names and definitions of the yardstick's
bench_vllm.py: `decode` (itl_ms_steady is the figure to quote) and `throughput`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence

import grpc
from gpu_requests import DECODE_LENGTHS, SEED, Load, fixed_load, mixed_load, random_prompt, steady_step_ms

from stagemesh.v1 import inference_pb2 as pb
from stagemesh.v1 import inference_pb2_grpc

OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
CALL_TIMEOUT_S = 540.0


class Runner:
    """Sends loads and waits for them.

    Args:
        channel: To the router.
        vocab_size: Of the model.
    """

    def __init__(self, channel: grpc.Channel, vocab_size: int) -> None:
        self._stub = inference_pb2_grpc.InferenceServiceStub(channel)
        self._vocab_size = vocab_size
        self._rng = random.Random(SEED)
        self._sent = 0

    def run(self, prompts: Sequence[Sequence[int]], output_lengths: Sequence[int]) -> tuple[float, float]:
        """Seconds until every answer was whole, and until every request had its first token.

        Raises:
            RuntimeError: A request failed, or did not get all of its tokens.
        """
        starts = []
        wanted: dict[str, int] = {}
        for prompt, length in zip(prompts, output_lengths, strict=True):
            self._sent += 1
            name = f"b{self._sent}"
            wanted[name] = length
            starts.append(
                pb.GenerateRequest(
                    request_id=name,
                    token_ids=pb.TokenIds(ids=prompt),
                    max_tokens=length,
                    temperature=0.0,
                    ignore_eos=True,
                )
            )
        message = pb.SessionRequest(start=starts)
        got = dict.fromkeys(wanted, 0)
        without_token, running = len(wanted), len(wanted)
        began = time.perf_counter()
        first_s = 0.0
        call = self._stub.Session(iter([message]), timeout=CALL_TIMEOUT_S)
        for response in call:
            for name, count in zip(response.request_ids, response.token_counts, strict=True):
                without_token -= not got[name] and count > 0
                got[name] += count
            if not without_token and not first_s:
                first_s = time.perf_counter() - began
            for end in response.ends:
                if end.status:
                    raise RuntimeError(f"request {end.request_id} failed: {end.status!r}")
            running -= len(response.ends)
            if not running:
                break
        seconds = time.perf_counter() - began
        call.cancel()
        short = [name for name in wanted if got[name] != wanted[name]]
        if short:
            raise RuntimeError(
                f"{len(short)} of {len(wanted)} requests are not whole; {short[0]} has {got[short[0]]} of "
                f"{wanted[short[0]]} tokens"
            )
        return seconds, first_s

    def prompts(self, lengths: Sequence[int]) -> list[list[int]]:
        """Fresh random prompts."""
        return [random_prompt(self._rng, length, self._vocab_size) for length in lengths]

    def decode(self, batch: int, prompt_length: int, reps: int) -> dict[str, object]:
        """The step time at a batch size."""
        times: dict[int, list[float]] = {length: [] for length in DECODE_LENGTHS}
        self.run(self.prompts([prompt_length] * batch), [4] * batch)
        for _ in range(reps):
            for length, kept in times.items():
                kept.append(self.run(self.prompts([prompt_length] * batch), [length] * batch)[0])
        least = {length: min(kept) for length, kept in times.items()}
        step_ms = steady_step_ms(least)
        return {
            "batch": batch,
            "prompt_len": prompt_length,
            "itl_ms": round((least[129] - least[1]) / 128 * 1e3, 4),
            "itl_ms_steady": round(step_ms, 4),
            "out_tok_s_steady": round(batch / step_ms * 1e3, 1),
            "t1_ms_min": round(least[1] * 1e3, 3),
            "raw_s": {str(length): [round(value, 5) for value in kept] for length, kept in times.items()},
        }

    def throughput(self, load: Load, reps: int) -> dict[str, object]:
        """All requests at once."""
        prompts = self.prompts(load.prompt_lengths)
        runs = [self.run(prompts, load.output_lengths) for _ in range(reps)]
        seconds, first_s = min(runs)
        return {
            "requests": len(prompts),
            "prompt_tokens": load.prompt_tokens,
            "output_tokens": load.output_tokens,
            "seconds": round(seconds, 3),
            "all_seconds": [round(run[0], 3) for run in runs],
            "last_first_token_s": round(first_s, 3),
            "output_tok_s": round(load.output_tokens / seconds, 1),
            "total_tok_s": round((load.output_tokens + load.prompt_tokens) / seconds, 1),
        }


def emit(measure: str, **facts: object) -> None:
    """A line for whoever started this."""
    print(json.dumps({"measure": measure, "unix_s": round(time.time(), 3), **facts}), flush=True)


def main() -> None:
    """Measure what was asked for, in order."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("address")
    parser.add_argument("--sizes", default="", help="batch sizes of the decode measurement")
    parser.add_argument("--requests", default="", help="numbers of requests, each a throughput measurement")
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--reps", type=int, default=2, help="of decode; throughput is run --load-reps times")
    parser.add_argument("--load-reps", type=int, default=1)
    parser.add_argument(
        "--fixed", default="", metavar="PROMPT,OUTPUT", help="equal requests of these lengths"
    )
    parser.add_argument("--scale", type=int, default=1, help="divides the lengths of requests, for dry runs")
    options = parser.parse_args()
    sizes = [int(text) for text in options.sizes.split(",") if text]
    with grpc.insecure_channel(options.address, options=OPTIONS) as channel:
        model = inference_pb2_grpc.InferenceServiceStub(channel).GetModel(pb.GetModelRequest(), timeout=10)
        runner = Runner(channel, model.vocab_size)
        began = time.perf_counter()
        for batch in sorted({1, *(max(sizes, default=1),)}):
            runner.run(runner.prompts([options.prompt_len] * batch), [8] * batch)
        emit("warmup", s=round(time.perf_counter() - began, 3))
        for batch in sizes:
            emit("begin", of="decode", batch=batch)
            emit("decode", **runner.decode(batch, options.prompt_len, options.reps))
        for text in options.requests.split(","):
            if not text:
                continue
            if options.fixed:
                prompt, output = (int(part) for part in options.fixed.split(","))
                load = fixed_load(int(text), prompt, output)
            else:
                load = mixed_load(int(text), scale=options.scale)
            emit("begin", of="throughput", requests=int(text))
            emit("throughput", **runner.throughput(load, options.load_reps))
    emit("done")


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, grpc.RpcError) as error:
        emit("error", what=str(error))
        sys.exit(1)
