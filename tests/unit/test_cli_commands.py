"""generate, chat, status and trace, as processes and in process, against a scripted router."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_router import WAIT_S, ScriptedRouter, endless, refusal, words

from stagemesh.client import UnavailableError
from stagemesh.client.cli import main
from stagemesh.client.cli._admin import Admin
from stagemesh.v1 import admin_pb2, stage_pb2
from stagemesh.v1 import inference_pb2 as pb

COMMAND = [sys.executable, "-m", "stagemesh.client.cli"]


@pytest.fixture
def router() -> Iterator[ScriptedRouter]:
    with ScriptedRouter() as router:
        yield router


def run(*args: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command, run in this process."""
    with pytest.raises(SystemExit) as caught:
        main(args)
    output = capsys.readouterr()
    return int(caught.value.code or 0), output.out, output.err


def test_generate_streams_the_text(router: ScriptedRouter, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--max-tokens",
        "4",
        "--temperature",
        "0",
        "--top-k",
        "5",
        "--top-p",
        "0.5",
        "--seed",
        "0",
        "--ignore-eos",
    ]
    code, out, _ = run("generate", "hi", "--address", router.address, *options, capsys=capsys)
    assert (code, out) == (0, "Hello world\n")
    [seen] = router.received
    expected = pb.GenerateRequest(
        text="hi", max_tokens=4, temperature=0, top_k=5, top_p=0.5, seed=0, ignore_eos=True
    )
    expected.request_id = seen.request.request_id
    assert seen.request == expected


def test_generate_leaves_unset_what_is_not_given(
    router: ScriptedRouter, capsys: pytest.CaptureFixture[str]
) -> None:
    run("generate", "--token-ids", "5,6", "--address", router.address, "--timeout", "7", capsys=capsys)
    [seen] = router.received
    assert seen.request == pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[5, 6]), request_id=seen.request.request_id
    )
    assert seen.remaining_s is not None
    assert seen.remaining_s < 7.1


def test_generate_json_is_a_line_a_chunk(router: ScriptedRouter, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(
        "generate", "hi", "--json", "--request-id", "r", "--address", router.address, capsys=capsys
    )
    chunks = [json.loads(line) for line in out.splitlines()]
    assert [chunk["text"] for chunk in chunks] == ["Hello", " world", ""]
    assert chunks[-1]["finish_reason"] == "stop"
    assert chunks[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 1}
    assert {chunk["request_id"] for chunk in chunks} == {"r"}


def test_generate_reads_standard_input_and_the_environment(router: ScriptedRouter) -> None:
    env = {**os.environ, "STAGEMESH_ADDRESS": router.address}
    done = subprocess.run(
        [*COMMAND, "generate", "-"], input="from a pipe", env=env, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "Hello world\n")
    assert router.received[0].request.text == "from a pipe"


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--max-tokens", "-1"], 2, "error: max_tokens: -1 does not fit"),
        (["--address", "nowhere"], 2, "error: address: 'nowhere' is not an address"),
        (["--address", "127.0.0.1:9"], 1, "error: no connection to 127.0.0.1:9: Connection refused"),
    ],
)
def test_an_error_is_one_line(
    args: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str], router: ScriptedRouter
) -> None:
    got = run(
        "generate",
        "hi",
        *(["--address", router.address] if "--address" not in args else []),
        *args,
        capsys=capsys,
    )
    assert got[0] == code
    assert got[2].startswith(message)
    assert got[2].count("\n") == 1


def test_an_admin_address_where_nothing_answers_is_named_with_its_option(
    router: ScriptedRouter, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(
        "generate", "hi", "--trace", "--address", router.address, "--admin", "127.0.0.1:9", capsys=capsys
    )
    assert (code, out) == (1, "Hello world\n")
    assert err.startswith("error: no connection to 127.0.0.1:9 (--admin): Connection refused")


def test_an_error_after_text_has_a_line_of_its_own(
    router: ScriptedRouter, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost(request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(text="Hel")
        yield from refusal(UnavailableError("stage 1 went away", stage="stage 1"))(request, context)

    router.script = lost
    code, out, err = run("generate", "hi", "--request-id", "r", "--address", router.address, capsys=capsys)
    assert (code, out, err) == (1, "Hel\n", "error: stage 1 went away (request r)\n")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("generate", "--bogus"), "--bogus; see stagemesh generate --help"),
        (("generate", "hi", "--max-tokens", "x"), "'--max-tokens': "),
        (("bogus",), "'bogus'; see stagemesh --help"),
        (("--debug",), "see stagemesh --help"),
    ],
)
def test_a_wrong_flag_is_one_line_too(
    args: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAGEMESH_DEBUG", "")
    code, out, err = run(*args, capsys=capsys)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1


def test_without_a_command_it_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys=capsys)
    assert code == 0
    assert "Stream the continuation of a prompt." in out


def test_what_a_terminal_cannot_show_is_no_reason_to_stop(router: ScriptedRouter) -> None:
    router.script = words("na\u00efve ", "\u4f60\u597d")
    command = [*COMMAND, "generate", "hi", "--address", router.address]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=WAIT_S)
    assert (done.returncode, done.stdout, done.stderr) == (0, "na?ve ??\n", "")


def test_a_reader_that_leaves_ends_generate_without_a_word(router: ScriptedRouter) -> None:
    router.script = endless
    command = [*COMMAND, "generate", "hi", "--address", router.address]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.read(3) == "xxx"
    process.stdout.close()
    assert process.stderr is not None
    assert (process.stderr.read(), process.wait(WAIT_S)) == ("", 1)
    process.stderr.close()
    assert router.has_ended(0)


def test_debug_gives_the_traceback(router: ScriptedRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    router.script = refusal(UnavailableError("forming"))
    monkeypatch.setenv("STAGEMESH_DEBUG", "")  # so that --debug's own setting is undone
    with pytest.raises(UnavailableError):
        main(["--debug", "generate", "hi", "--address", router.address])


def test_ctrl_c_cancels_generate(router: ScriptedRouter) -> None:
    router.script = endless
    command = [*COMMAND, "generate", "hi", "--address", router.address]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.read(3) == "xxx"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, err) == (130, "")
    assert router.has_ended(0)


def test_chat_in_a_pipe_keeps_the_conversation(router: ScriptedRouter) -> None:
    command = [*COMMAND, "chat", "--system", "Be brief.", "--address", router.address, "--temperature", "0"]
    done = subprocess.run(
        command, input="one\n\ntwo\n/exit\nthree\n", capture_output=True, text=True, timeout=WAIT_S
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hello world\nHello world\n", "")
    second = router.received[1].request
    assert len(router.received) == 2
    assert [(message.role, message.content) for message in second.chat.messages] == [
        ("system", "Be brief."),
        ("user", "one"),
        ("assistant", "Hello world"),
        ("user", "two"),
    ]
    assert second.temperature == 0
    assert second.HasField("temperature")


def test_chat_ctrl_c_stops_only_the_answer(router: ScriptedRouter) -> None:
    router.scripts = [endless]
    primary, secondary = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "chat", "--address", router.address],
        stdin=secondary,
        stdout=secondary,
        stderr=secondary,
        start_new_session=True,
    )
    os.close(secondary)
    try:
        read_until(primary, "> ")
        os.write(primary, b"one\n")
        read_until(primary, "xxx")
        process.send_signal(signal.SIGINT)
        read_until(primary, "[stopped]")
        assert router.has_ended(0)
        os.write(primary, b"two\n")
        read_until(primary, "Hello world")
        os.write(primary, b"\x04")
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.wait()
        os.close(primary)
    messages = router.received[1].request.chat.messages
    assert [message.role for message in messages] == ["user", "assistant", "user"]
    assert messages[1].content.startswith("xxx")


def read_until(primary: int, text: str) -> str:
    seen, deadline = "", time.monotonic() + WAIT_S
    while text not in seen:
        ready, _, _ = select.select([primary], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"no {text!r} in {seen!r}"
        seen += os.read(primary, 4096).decode()
    return seen


def make_status() -> admin_pb2.MeshStatus:
    ranks = [
        stage_pb2.RankInfo(rank=0, device="cpu", num_heads=6, num_kv_heads=2),
        stage_pb2.RankInfo(rank=1, device="cpu", num_heads=3, num_kv_heads=1),
    ]
    description = stage_pb2.DescribeResponse(
        layer_begin=0, layer_end=16, num_layers=30, ranks=ranks, num_blocks=777, dtype="float32"
    )
    ready = admin_pb2.StageStatus(
        stage_index=0,
        address="127.0.0.1:50061",
        state="ready",
        description=description,
        link_transport="grpc",
        link_reason="no nccl on stage 1",
    )
    absent = admin_pb2.StageStatus(stage_index=1, address="127.0.0.1:50062", state="absent", detail="refused")
    lane = admin_pb2.LaneStatus(
        lane_id="0",
        state=admin_pb2.LANE_STATE_FORMING,
        reason="waits for stage 1",
        epoch=4,
        num_blocks=777,
        num_free_blocks=700,
        block_size=16,
        stages=[ready, absent],
    )
    return admin_pb2.MeshStatus(
        model_name="smol", lanes=[lane], num_running=2, num_waiting=1, output_tokens=99
    )


def test_status_shows_what_an_operator_asks(
    router: ScriptedRouter, capsys: pytest.CaptureFixture[str]
) -> None:
    router.status = make_status()
    code, out, _ = run("status", "--admin", router.address, capsys=capsys)
    assert code == 0
    [first] = [line for line in out.splitlines() if "127.0.0.1:50061" in line]
    for cell in ("0:16 of 30", "6/2 + 3/1", "cpu float32", "777", "grpc (no nccl on stage 1)", "ready"):
        assert cell in first
    [second] = [line for line in out.splitlines() if "127.0.0.1:50062" in line]
    assert "absent: refused" in second
    assert "lane 0: forming (waits for stage 1) · epoch 4 · 700 of 777 blocks" in out
    assert "limited by stage 0" in out
    assert "limits the pace" not in out, "nothing is learnt yet"
    assert "2 running, 1 waiting" in out
    assert "99 output tokens" in out


def test_status_names_the_stage_that_limits_the_pace(
    router: ScriptedRouter, capsys: pytest.CaptureFixture[str]
) -> None:
    router.status = make_status()
    lane = router.status.lanes[0]
    lane.slowest_stage, lane.cycle_ms, lane.stages[1].step_ms = 1, 18.25, 6.5
    _, out, _ = run("status", "--admin", router.address, capsys=capsys)
    assert "stage 1 limits the pace: 6.50 ms a step, 18.25 ms a token" in out


def test_status_json_and_watch(router: ScriptedRouter, capsys: pytest.CaptureFixture[str]) -> None:
    router.status = make_status()
    _, out, _ = run("status", "--json", "--admin", router.address, capsys=capsys)
    status = json.loads(out)
    assert status["lanes"][0]["stages"][0]["description"]["ranks"][1]["num_kv_heads"] == 1
    assert status["num_failed"] == "0"  # protobuf's JSON writes 64-bit numbers as text
    _, out, _ = run("status", "--json", "--watch", "--admin", router.address, capsys=capsys)
    assert len([json.loads(line) for line in out.splitlines()]) == 2


def test_top_shows_stages_and_rates(router: ScriptedRouter, capsys: pytest.CaptureFixture[str]) -> None:
    router.status = make_status()
    router.status.inter_token_p50_ms, router.status.inter_token_p99_ms = 21.5, 80.25
    router.status.lanes[0].stages[0].busy_share = 0.5
    code, out, _ = run("top", "--count", "2", "--admin", router.address, capsys=capsys)
    assert code == 0
    assert out.endswith("\n"), "what follows in a pipe or a file stands on the last line"
    for part in (
        "running 2",
        "inter-token p50 21.5 · p99 80.2 ms",
        "KV",
        "77 of 777 blocks",
        "50%",
        "absent",
    ):
        assert part in out


def test_top_ends_its_line_where_the_router_goes(
    router: ScriptedRouter, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error stands on a line of its own, where both go into one file."""
    router.status = make_status()
    monkeypatch.setattr("stagemesh.client.cli.top.top_view", lambda status, rates: "a frame")

    def watch(self: Admin, interval_ms: int) -> Iterator[admin_pb2.MeshStatus]:
        yield router.status
        raise UnavailableError("the router went away")

    monkeypatch.setattr(Admin, "watch", watch)
    code, out, err = run("top", "--admin", router.address, capsys=capsys)
    assert (code, out, err) == (1, "a frame\n", "error: the router went away\n")


def test_timeline_says_where_steps_are_left_out(
    router: ScriptedRouter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The epoch is not the one that the status had before."""
    file = tmp_path / "out.json"
    file.write_text("an older one, and longer than what comes" * 100)
    router.status = admin_pb2.MeshStatus(lanes=[admin_pb2.LaneStatus(lane_id="lane-0", epoch=5)])
    for epoch, is_said in ((5, False), (6, True)):
        router.timeline = admin_pb2.GetTimelineResponse(lane_id="lane-0", epoch=epoch)
        code, _, err = run("timeline", "-o", str(file), "--admin", router.address, capsys=capsys)
        assert code == 0
        assert json.loads(file.read_text())["otherData"]["epoch"] == str(epoch)
        assert ("steps before that are left out" in err) is is_said


def test_timeline_without_a_lane_says_why_and_leaves_no_file(
    router: ScriptedRouter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    router.timeline = UnavailableError("no lane is ready: waiting for stage 1", reason="LANE_NOT_READY")
    file = tmp_path / "out.json"
    code, _, err = run("timeline", "-o", str(file), "--admin", router.address, capsys=capsys)
    assert (code, err.splitlines()) == (1, ["error: no lane is ready: waiting for stage 1"])
    assert not file.exists()
    file.write_text("an older one")
    run("timeline", "-o", str(file), "--admin", router.address, capsys=capsys)
    assert file.read_text() == "an older one"


def test_timeline_asks_for_nothing_that_it_cannot_write(
    router: ScriptedRouter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    router.timeline = UnavailableError("nobody was to ask")
    code, _, err = run("timeline", "-o", str(tmp_path / "no" / "x"), "--admin", router.address, capsys=capsys)
    assert code == 2
    assert err.startswith("error: --output: cannot write ")


def test_trace_has_a_row_for_each_stage_and_phase(
    router: ScriptedRouter, capsys: pytest.CaptureFixture[str]
) -> None:
    phase = admin_pb2.PhaseTrace(
        num_steps=15, queue_ms=1.25, wait_ms=2.5, compute_ms=30, send_ms=4, bubble_share=0.07
    )
    stages = [admin_pb2.StageTrace(stage_index=index, prefill=phase, decode=phase) for index in (0, 1)]
    router.traces["r1"] = admin_pb2.GetRequestTraceResponse(
        request_id="r1", state="finished", prompt_tokens=3, output_tokens=16, ttft_ms=12.5, stages=stages
    )
    code, out, _ = run("trace", "r1", "--admin", router.address, capsys=capsys)
    assert code == 0
    rows = [line.split() for line in out.splitlines() if " prefill " in line or " decode " in line]
    assert [row[:2] for row in rows] == [["0", "prefill"], ["0", "decode"], ["1", "prefill"], ["1", "decode"]]
    assert rows[0][2:8] == ["15", "1.2", "2.5", "0.0", "30.0", "4.0"]
    assert rows[0][-2:] == ["4.0", "7%"], "transfer, and the bubble share"
    bars = [line for line in out.splitlines() if line.startswith("stage 1  ")]
    assert len(bars) == 1
    assert bars[0].count("█") > bars[0].count("▒") > 0
    assert "stage 0 limits: its steps kept it busy for 68.0 ms, the next one 68.0 ms" in out
    assert "first token 12.5 ms" in out
    code, _, err = run("trace", "r2", "--admin", router.address, capsys=capsys)
    assert (code, err) == (1, "error: no such request (request r2)\n")
