"""`make demo`: a real model on three stages, the middle one with two ranks, answers a question.

Starts `stagemesh up` on free ports, asks over gRPC, prints the answer as it streams, then the layout of
the mesh and where the time of the request went, and stops everything. Exits 0 only if tokens came.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from stagemesh.client import Client, StagemeshError

QUESTION = "What is the capital of France?"
STOP_TIMEOUT_S = 20.0
INTERRUPTED_TIMEOUT_S = 5.0
COMMAND = [sys.executable, "-m", "stagemesh.client.cli"]


@contextmanager
def mesh(model: str, *, stages: int, tp: str, timeout_s: float) -> Iterator[dict[str, Any]]:
    """A mesh on free ports of this machine: yields what its ready file says, and stops it at the end."""
    with tempfile.TemporaryDirectory(prefix="stagemesh-demo-") as folder:
        ready_file = Path(folder, "ready.json")
        command = [*COMMAND, "up", model, f"--stages={stages}", f"--tp={tp}", "--device=cpu"]
        command += [
            "--listen=127.0.0.1:0",
            "--admin=127.0.0.1:0",
            "--stage-port=0",
            f"--ready-file={ready_file}",
        ]
        process = subprocess.Popen(command)
        try:
            deadline = time.monotonic() + timeout_s
            while not ready_file.exists():
                if process.poll() is not None:
                    sys.exit(
                        f"error: the mesh did not start: `stagemesh up` exited with code {process.returncode}"
                    )
                if time.monotonic() > deadline:
                    sys.exit(f"error: the mesh was not ready within {timeout_s:g} s")
                time.sleep(0.05)
            yield json.loads(ready_file.read_text())
        except KeyboardInterrupt:  # the terminal sent it to `up` too, which would take a second one for haste
            with suppress(subprocess.TimeoutExpired):
                process.wait(INTERRUPTED_TIMEOUT_S)
            raise
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C would: the mesh ends what it started. Its children die with it even if it must be killed."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ask(address: str, question: str) -> tuple[str, int]:
    """Print the answer as it comes; returns the request's id and the number of tokens."""
    num_tokens = 0
    print(f"\n> {question}", flush=True)
    with Client(address) as client:
        stream = client.chat([{"role": "user", "content": question}], max_tokens=64, temperature=0)
        with stream:
            for chunk in stream:
                num_tokens += len(chunk.token_ids)
                print(chunk.text, end="", flush=True)
    print("\n", flush=True)
    return stream.request_id, num_tokens


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description="Serve a model on three stages and ask it a question.")
    parser.add_argument("model", help="a GGUF file or a Hugging Face folder")
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--tp", default="1,2,1", help="ranks of each stage (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds the mesh may take to start")
    options = parser.parse_args()
    # Ctrl-C or a plain kill: the mesh is stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with mesh(options.model, stages=options.stages, tp=options.tp, timeout_s=options.timeout) as ready:
            request_id, num_tokens = ask(ready["listen"], options.question)
            admin = {**os.environ, "STAGEMESH_ADMIN": ready["admin"]}
            subprocess.run([*COMMAND, "status"], env=admin, check=True)
            subprocess.run([*COMMAND, "trace", request_id], env=admin, check=True)
    except StagemeshError as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: `stagemesh {error.cmd[len(COMMAND)]}` exited with code {error.returncode}")
    except KeyboardInterrupt:
        sys.exit(130)
    if num_tokens == 0:
        sys.exit("error: no token came")


if __name__ == "__main__":
    main()
