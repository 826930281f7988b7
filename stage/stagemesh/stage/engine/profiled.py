"""An engine that records some of its decode steps with torch's profiler, for benchmarks/launch_gaps.py and the like.

STAGEMESH_PROFILE=FOLDER;ROWS:SKIP:COUNT[;...] makes every worker wrap its engine so: after SKIP decode steps of ROWS
rows, one after the other, the next COUNT are traced, to FOLDER/rank-PID-rows-ROWS.json.gz.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagemesh.stage.engine.batch import Batch
from stagemesh.stage.engine.interface import Engine, EngineLinks, RankFacts, StepHandle, StepInputs
from stagemesh.v1 import stage_pb2
from stagemesh.wire.errors import ConfigError

log = logging.getLogger(__name__)

VARIABLE = "STAGEMESH_PROFILE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """Steps to trace."""

    rows: int
    """Rows of each, all of them decodes."""
    skip: int
    """Such steps in a row before the first traced one, at least 1."""
    count: int
    """Steps to trace."""


def parse_profile(text: str) -> tuple[Path, list[Episode]]:
    """Reads the variable; ConfigError says what it should look like."""
    folder, *parts = text.split(";")
    try:
        episodes = [
            Episode(rows=rows, skip=skip, count=count)
            for rows, skip, count in ([int(number) for number in part.split(":")] for part in parts)
        ]
    except ValueError:
        episodes = []
    if not folder or not episodes or any(episode.skip < 1 for episode in episodes):
        raise ConfigError(
            f"{VARIABLE} is '{text}'; expected FOLDER;ROWS:SKIP:COUNT such as /tmp/traces;64:8:200"
        )
    return Path(folder), episodes


def profiled(engine: Engine) -> Engine:
    """The engine, wrapped if the variable asks for it."""
    text = os.environ.get(VARIABLE)
    return ProfiledEngine(engine, *parse_profile(text)) if text else engine


class ProfiledEngine:
    """Passes everything on, and traces.

    Args:
        engine: Does the work.
        folder: Where traces go.
        episodes: What to trace, each once.
        make_profiler: Of torch, but for tests.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        episodes: list[Episode],
        make_profiler: Callable[[], Any] | None = None,
    ) -> None:
        self._engine = engine
        self._folder = folder
        self._open_episodes = list(episodes)
        self._make_profiler = make_profiler or _torch_profiler
        self._rows = 0
        self._seen = 0
        """Decode steps of `_rows` rows, one after the other, up to now."""
        self._profiler: Any = None
        self._episode: Episode | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def links(self) -> EngineLinks:
        return self._engine.links

    @property
    def holds_tokens(self) -> bool:
        return self._engine.holds_tokens

    def facts(self) -> RankFacts:
        return self._engine.facts()

    def open(self, lane: stage_pb2.OpenLaneRequest) -> None:
        self._engine.open(lane)

    def launch(self, batch: Batch, inputs: StepInputs) -> StepHandle:
        rows = len(batch.slots) if len(batch.slots) == batch.num_tokens else 0
        if rows != self._rows:
            self._rows, self._seen = rows, 0
            self._end()
        elif rows:
            self._seen += 1
            if self._episode and self._seen == self._episode.skip + self._episode.count:
                self._end()
            elif self._episode is None:
                self._begin()
        return self._engine.launch(batch, inputs)

    def _begin(self) -> None:
        for episode in self._open_episodes:
            if episode.rows == self._rows and episode.skip == self._seen:
                self._open_episodes.remove(episode)
                self._episode = episode
                self._profiler = self._make_profiler()
                self._profiler.start()
                return

    def _end(self) -> None:
        if self._episode is None:
            return
        profiler, self._profiler = self._profiler, None
        path = self._folder / f"rank-{os.getpid()}-rows-{self._episode.rows}.json"
        self._episode = None
        profiler.stop()
        # Written beside the steps that follow; they are not measured any more.
        threading.Thread(target=_export, args=(profiler, path), name="trace").start()


def _torch_profiler() -> Any:
    import torch
    from torch.profiler import ProfilerActivity, profile

    device = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    return profile(activities=[device], acc_events=True)


def _export(profiler: Any, path: Path) -> None:
    profiler.export_chrome_trace(f"{path}.partial.gz")
    Path(f"{path}.partial.gz").rename(f"{path}.gz")
    log.info("trace written to %s.gz", path)
