"""The environment of a server process."""

from __future__ import annotations

import pytest

from stagemesh.wire import polling


def test_the_choice_is_made_once_and_only_for_versions_that_know_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling.grpc, "__version__", "1.84.3")
    chosen = polling.with_polling({"PATH": "/bin"})
    fork = {"GRPC_ENABLE_FORK_SUPPORT": "0"}
    assert chosen == {"PATH": "/bin", polling.VARIABLE: polling.CHOICE} | fork
    assert polling.with_polling({polling.VARIABLE: ""}) == {polling.VARIABLE: ""}
    monkeypatch.setattr(polling.grpc, "__version__", "1.99.0")
    assert polling.with_polling({"PATH": "/bin"}) == {"PATH": "/bin"}


def test_a_server_replaces_itself_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.delenv(polling.VARIABLE, raising=False)
    monkeypatch.setattr(polling.grpc, "__version__", "1.84.0")
    monkeypatch.setattr(
        polling.sys, "orig_argv", ["python", "-m", "stagemesh.client.cli", "stage", "--tp", "2"]
    )
    monkeypatch.setattr(polling.os, "execve", lambda *args: calls.append(args))
    polling.restart_with_polling()
    assert calls[0][1][1:] == ["-m", "stagemesh.client.cli", "stage", "--tp", "2"]
    assert calls[0][2][polling.VARIABLE] == polling.CHOICE
    monkeypatch.setenv(polling.VARIABLE, polling.CHOICE)
    polling.restart_with_polling()
    assert len(calls) == 1
