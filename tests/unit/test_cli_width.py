"""Tables in a terminal of 80 columns: fewer of them, and no number cut."""

from __future__ import annotations

import io

import pytest
from rich.console import Console, RenderableType

from stagemesh.client.cli._top_view import Rates, top_view
from stagemesh.client.cli._trace_view import trace_view
from stagemesh.v1 import admin_pb2 as pb

PHASE = pb.PhaseTrace(
    num_steps=1234,
    queue_ms=91433.1,
    wait_ms=91035.2,
    receive_ms=15.0,
    compute_ms=91432.4,
    send_ms=21.2,
    busy_p50_ms=113.7,
    busy_p99_ms=226.42,
    bubble_share=0.69,
)
TRACE = pb.GetRequestTraceResponse(
    request_id="r",
    stages=[pb.StageTrace(stage_index=index, prefill=PHASE, decode=PHASE) for index in range(3)],
)
STATUS = pb.MeshStatus(
    lanes=[
        pb.LaneStatus(
            num_steps=1,
            num_blocks=10,
            slowest_stage=1,
            stages=[
                pb.StageStatus(
                    stage_index=index,
                    state="ready",
                    busy_share=0.63,
                    bubble_share=0.19,
                    busy_p50_ms=124.31,
                    busy_p99_ms=255.17,
                    mean_wait_ms=140.82,
                    mean_compute_ms=124.96,
                    link_transport="unix",
                )
                for index in range(3)
            ],
        )
    ]
)


def shown(view: RenderableType, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("view", "numbers", "left_out"),
    [
        (
            trace_view(TRACE),
            ("1234", "91433.1", "91035.2", "91432.4", "113.70", "226.42", "36.2", "69%"),
            "receive ms",
        ),
        (top_view(STATUS, Rates()), ("63%", "19%", "124.31", "255.17", "140.82", "124.96"), "layers"),
    ],
    ids=["trace", "top"],
)
def test_a_narrow_terminal_has_fewer_columns_and_every_number_whole(
    view: RenderableType, numbers: tuple[str, ...], left_out: str
) -> None:
    narrow, wide = shown(view, 80), shown(view, 160)
    assert left_out in wide
    assert left_out not in narrow
    for text in (narrow, wide):
        assert "…" not in text
        assert [number for number in numbers if text.count(number) < 3] == []
