"""What is asked of the mesh, from a client's container."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from compose_project import Project

QUESTION = "The three largest cities of France are"
_NUM_TOKENS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One request, as its client saw it."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    num_chunks: int


def ask(mesh: Project, request_id: str, question: str = QUESTION, num_tokens: int = _NUM_TOKENS) -> Answer:
    """Greedy, so that the same question has one answer; streamed through the router."""
    flags = ["--json", "--temperature", "0", "--max-tokens", str(num_tokens), "--timeout", "60"]
    output = mesh.run_client("generate", question, "--request-id", request_id, *flags)
    chunks: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return Answer(
        request_id=request_id,
        text="".join(chunk["text"] for chunk in chunks),
        token_ids=tuple(token for chunk in chunks for token in chunk["token_ids"]),
        num_chunks=len(chunks),
    )
