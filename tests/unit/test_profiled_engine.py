"""The engine that traces some of its steps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stagemesh.stage.engine.profiled import Episode, ProfiledEngine, parse_profile
from stagemesh.wire.errors import ConfigError


class Recorder:
    """An engine and a profiler in one: what was launched while it ran."""

    holds_tokens = False

    def __init__(self) -> None:
        self.running = False
        self.traced: list[list[int]] = []
        self.num_launched = 0

    def launch(self, batch: Any, inputs: Any) -> None:
        self.num_launched += 1
        if self.running:
            self.traced[-1].append(batch.number)

    def start(self) -> None:
        self.running = True
        self.traced.append([])

    def stop(self) -> None:
        self.running = False

    def export_chrome_trace(self, path: str) -> None:
        Path(path).write_text("{}")


def test_steps_of_a_size_are_traced_once(tmp_path: Path) -> None:
    recorder = Recorder()
    episodes = [Episode(rows=4, skip=2, count=3), Episode(rows=1, skip=1, count=2)]
    engine = ProfiledEngine(recorder, tmp_path, episodes, lambda: recorder)  # type: ignore[arg-type]
    sizes = [(4, 9), *[(4, 4)] * 8, (5, 7), *[(4, 4)] * 8, *[(1, 1)] * 5]
    for number, (rows, tokens) in enumerate(sizes):
        engine.launch(SimpleNamespace(number=number, slots=[0] * rows, num_tokens=tokens), None)  # type: ignore[arg-type]
    # The first step of 4 is number 1, two more are passed over; the prefill and the 5 rows are no decodes of 4.
    assert recorder.traced == [[3, 4, 5], [19, 20]]
    assert recorder.num_launched == len(sizes)


def test_a_change_of_size_ends_a_trace(tmp_path: Path) -> None:
    recorder = Recorder()
    engine = ProfiledEngine(recorder, tmp_path, [Episode(rows=2, skip=1, count=9)], lambda: recorder)  # type: ignore[arg-type]
    for number, rows in enumerate([2, 2, 2, 3, 2]):
        engine.launch(SimpleNamespace(number=number, slots=[0] * rows, num_tokens=rows), None)  # type: ignore[arg-type]
    assert recorder.traced == [[1, 2]]
    assert not recorder.running


def test_the_variable_is_read_or_refused() -> None:
    assert parse_profile("/tmp/t;64:8:200;1:2:5") == (
        Path("/tmp/t"),
        [Episode(rows=64, skip=8, count=200), Episode(rows=1, skip=2, count=5)],
    )
    for text in ("/tmp/t", "/tmp/t;64", "/tmp/t;a:b:c", ";1:1:1", "/tmp/t;64:0:9"):
        with pytest.raises(ConfigError, match="expected FOLDER;ROWS:SKIP:COUNT"):
            parse_profile(text)
