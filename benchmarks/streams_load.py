"""A client that takes every message of many streams, in a process of its own.

The first line it is sent says what to ask for. After every further one it says how much it has got; it ends when
its input ends.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Request = tuple[int, int]
"""Prompt tokens, output tokens."""
OPTIONS = (("grpc.max_receive_message_length", 64 << 20), ("grpc.use_local_subchannel_pool", 1))
MAX_LIVE = 1_000
CALL_TIMEOUT_S = 300.0


@dataclass(slots=True)
class Delivered:
    """What has come so far, over all streams."""

    tokens: int = 0
    characters: int = 0
    messages: int = 0
    finished: int = 0
    failed: int = 0
    first_error: str = ""


class Load:
    """The child, in a with-block.

    Args:
        address: Of the router.
        kind: "session": all requests over one; "generate": a call each, over 8 connections.
        requests: What to ask for.
    """

    def __init__(self, address: str, kind: str, requests: Sequence[Request]) -> None:
        spec = json.dumps({"address": address, "kind": kind, "requests": requests})
        self._child = subprocess.Popen(
            [sys.executable, str(Path(__file__))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._child.stdin is not None
        print(spec, file=self._child.stdin, flush=True)

    def so_far(self) -> Delivered:
        """What it has got."""
        return self._ask("so far")

    def finish(self) -> Delivered:
        """Wait until every stream has ended, or its call's deadline of CALL_TIMEOUT_S has passed."""
        return self._ask("finish")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._child.kill()
        self._child.wait()

    def _ask(self, question: str) -> Delivered:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        print(question, file=self._child.stdin, flush=True)
        answer = self._child.stdout.readline()
        if not answer:
            raise RuntimeError("the load generator ended; its words are above")
        return Delivered(**json.loads(answer))


async def _main(spec: dict[str, Any]) -> None:
    import grpc

    from stagemesh.v1 import inference_pb2 as pb
    from stagemesh.v1 import inference_pb2_grpc

    got = Delivered()
    requests = [
        pb.GenerateRequest(
            request_id=f"{index:032d}",
            token_ids=pb.TokenIds(ids=[(index * 31 + place * 7) % 40_000 + 5 for place in range(prompt)]),
            max_tokens=output,
            temperature=0.5,
            seed=index,
            ignore_eos=True,
        )
        for index, (prompt, output) in enumerate(spec["requests"])
    ]

    def fail(error: str) -> None:
        got.failed += 1
        got.first_error = got.first_error or error

    async def session(stub: Any) -> None:
        waiting = list(reversed(requests))
        live = 0
        call = stub.Session(timeout=CALL_TIMEOUT_S)

        async def start(count: int) -> None:
            nonlocal live
            some = [waiting.pop() for _ in range(min(count, len(waiting)))]
            live += len(some)
            if some:
                await call.write(pb.SessionRequest(start=some))

        await start(MAX_LIVE)
        while live:
            response = await call.read()
            got.messages += 1
            got.tokens += len(response.token_ids)
            got.characters += sum(map(len, response.texts))
            for end in response.ends:
                live -= 1
                if end.status:
                    fail(repr(end.status))
                else:
                    got.finished += 1
            if response.ends:
                await start(len(response.ends))
        await call.done_writing()

    async def generate(stub: Any, request: pb.GenerateRequest) -> None:
        try:
            async for response in stub.Generate(request, timeout=CALL_TIMEOUT_S):
                got.messages += 1
                got.tokens += len(response.token_ids)
                got.characters += len(response.text)
                got.finished += bool(response.finish_reason)
        except grpc.RpcError as error:
            fail(f"{error.code()}: {error.details()}")

    channels = [
        grpc.aio.insecure_channel(spec["address"], OPTIONS)
        for _ in range(1 if spec["kind"] == "session" else 8)
    ]
    stubs = [inference_pb2_grpc.InferenceServiceStub(channel) for channel in channels]

    async def generate_all() -> None:
        await asyncio.gather(*(generate(stubs[i % len(stubs)], one) for i, one in enumerate(requests)))

    work = asyncio.create_task(session(stubs[0]) if spec["kind"] == "session" else generate_all())
    while line := await asyncio.to_thread(sys.stdin.readline):
        if line.strip() == "finish":
            await work
        print(json.dumps(asdict(got)), flush=True)


if __name__ == "__main__":
    import uvloop

    uvloop.run(_main(json.loads(sys.stdin.readline())))
