"""What the object of a benchmark says of its run."""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from benchmarks_for_tests import import_benchmark


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    return import_benchmark(monkeypatch, "report")


def test_the_commit_is_marked_where_the_tree_has_changes(report: Any, tmp_path: Path) -> None:
    def git(*args: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false")
        done = subprocess.run(
            ["git", *identity, *args], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert report.commit(tmp_path) == ""
    git("init", "-q")
    assert report.commit(tmp_path) == ""
    file = tmp_path / "file"
    file.write_text("one")
    git("add", "file")
    git("commit", "-q", "--no-verify", "-m", "one")
    head = git("rev-parse", "--short", "HEAD")
    (tmp_path / "result.json").write_text("{}")
    assert report.commit(tmp_path) == head
    file.write_text("two")
    assert report.commit(tmp_path) == f"{head}+"


def test_without_git_there_is_no_commit(report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert report.commit() == ""


def test_the_object_says_commit_and_time(report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "commit", lambda: "abc+")
    found = json.loads(report.Report("one", as_json=True).text())
    assert found["commit"] == "abc+"
    time = datetime.fromisoformat(found["time"])
    assert time.tzinfo == UTC
    assert abs(datetime.now(UTC) - time) < timedelta(days=1)
