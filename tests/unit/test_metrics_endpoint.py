"""The endpoint beside a server, asked by whoever comes along."""

from __future__ import annotations

import asyncio
import http.client
import logging
from collections.abc import Callable

import pytest

from stagemesh.wire.telemetry.endpoint import MetricsEndpoint


async def ask(scrape: Callable[[], bytes], method: str, path: str) -> tuple[int, int, bytes] | str:
    """Status, length and body; what went wrong where there is no answer."""
    endpoint = MetricsEndpoint("127.0.0.1:0", scrape, lambda: "", asyncio.get_running_loop())

    def call() -> tuple[int, int, bytes] | str:
        connection = http.client.HTTPConnection(endpoint.address, timeout=60)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            return response.status, int(response.headers["Content-Length"]), response.read()
        except http.client.HTTPException as error:
            return type(error).__name__
        finally:
            connection.close()

    try:
        return await asyncio.to_thread(call)
    finally:
        await asyncio.to_thread(endpoint.close)


@pytest.mark.parametrize(("method", "body"), [("GET", b"ok\n"), ("HEAD", b"")])
async def test_balancers_may_ask_without_wanting_the_answer(method: str, body: bytes) -> None:
    assert await ask(lambda: b"", method, "/healthz") == (200, 3, body)


@pytest.mark.parametrize(
    ("error", "level"), [(ConnectionResetError("gone"), logging.DEBUG), (KeyError("a bug"), logging.ERROR)]
)
async def test_what_goes_wrong_is_in_the_log_and_who_hangs_up_is_no_news(
    error: Exception, level: int, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    def scrape() -> bytes:
        raise error

    caplog.set_level(logging.DEBUG)
    assert await ask(scrape, "GET", "/metrics") == "RemoteDisconnected"
    [record] = [record for record in caplog.records if "on the metrics endpoint" in record.message]
    assert (record.levelno, record.exc_info is not None) == (level, True)
    assert not capsys.readouterr().err
