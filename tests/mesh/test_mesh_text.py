"""Text and chat on a real model: SmolLM2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mesh_calls import generate, make_request, read_answer, refusal
from running_mesh import CALL_TIMEOUT_S, RunningMesh

from stagemesh.client import Client
from stagemesh.v1 import inference_pb2


@pytest.fixture(scope="module")
def demo(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    flags = ("--kv-memory", "256MiB")
    mesh = RunningMesh(tmp_path_factory.mktemp("demo"), demo_model, (1,), stage_flags=flags)
    try:
        mesh.wait_ready()
        yield mesh
    finally:
        mesh.close()


def chat(content: str) -> inference_pb2.Chat:
    return inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content=content)])


def test_the_capital_of_france(demo: RunningMesh) -> None:
    answer = generate(demo, None, 32, chat=chat("What is the capital of France?"), ignore_eos=False)
    assert "Paris" in answer.text
    assert answer.finish_reason == inference_pb2.FINISH_REASON_STOP
    assert "<|im_end|>" not in answer.text


def test_the_client_library_and_the_wire_say_the_same(demo: RunningMesh) -> None:
    expected = generate(demo, None, 16, text="Once upon a time")
    assert len(expected.token_ids) == 16
    with Client(demo.listen) as client:
        text = "".join(
            chunk.text for chunk in client.generate("Once upon a time", max_tokens=16, temperature=0.0)
        )
    assert text == expected.text


def test_a_session_gives_the_same_text(demo: RunningMesh) -> None:
    prompts = {
        f"t{index}": text for index, text in enumerate(("Zürich is", "List three colours:", "2 + 2 ="))
    }
    starts = [make_request(None, 8, text=text, request_id=name) for name, text in prompts.items()]
    texts = dict.fromkeys(prompts, "")
    requests = iter([inference_pb2.SessionRequest(start=starts)])
    for response in demo.stub.Session(requests, timeout=CALL_TIMEOUT_S):
        for name, text in zip(response.request_ids, response.texts, strict=True):
            texts[name] += text
    for name, prompt in prompts.items():
        call = demo.stub.Generate(make_request(None, 8, text=prompt), timeout=CALL_TIMEOUT_S)
        assert texts[name] == read_answer(call).text != ""


def test_empty_text_is_refused(demo: RunningMesh) -> None:
    refused = refusal(demo, text="")
    assert (refused.field, refused.reason) == ("text", "EMPTY_PROMPT")
