"""The HTTP endpoint beside a router or a stage: /metrics, /healthz and /readyz, in threads of its own."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client.exposition import CONTENT_TYPE_LATEST

from stagemesh.wire.address import split_address
from stagemesh.wire.errors import ConfigError

log = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 5.0
HEALTH_TIMEOUT_S = 1.0
"""An event loop that does not take a turn within it is not healthy."""


class MetricsEndpoint:
    """Serves until `close`.

    Args:
        address: HOST:PORT to listen on; port 0 takes a free one.
        scrape: Makes the answer of /metrics.
        not_ready: Why the process cannot serve now; empty when it can.
        loop: The process's event loop; /healthz asks whether it takes its turns.

    Raises:
        ConfigError: It cannot listen there.
    """

    def __init__(
        self,
        address: str,
        scrape: Callable[[], bytes],
        not_ready: Callable[[], str],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        host, port = split_address(address, key="--metrics")
        self._scrape = scrape
        self._not_ready = not_ready
        self._loop = loop

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """In the log, as everything else; a client that hangs up is no news."""
                hung_up = isinstance(sys.exception(), ConnectionError)
                log.log(
                    logging.DEBUG if hung_up else logging.ERROR,
                    "no answer to %s on the metrics endpoint",
                    client_address[0],
                    exc_info=True,
                )

        try:
            self._server = Server((host, port), _handler(self))
        except OSError as error:
            raise ConfigError(
                f"--metrics: cannot listen on {address}: {error.strerror}; choose another"
            ) from error
        self.address = f"{f'[{host}]' if ':' in host else host}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """Status, content type and body of a GET."""
        plain = "text/plain; charset=utf-8"
        if path == "/metrics":
            return 200, CONTENT_TYPE_LATEST, self._scrape()
        if path == "/healthz":
            turned = threading.Event()
            self._loop.call_soon_threadsafe(turned.set)
            if turned.wait(HEALTH_TIMEOUT_S):
                return 200, plain, b"ok\n"
            return 503, plain, f"the event loop took no turn for {HEALTH_TIMEOUT_S:g} s\n".encode()
        if path == "/readyz":
            reason = self._not_ready()
            return (503, plain, f"{reason}\n".encode()) if reason else (200, plain, b"ok\n")
        return 404, plain, b"expected /metrics, /healthz or /readyz\n"


def _handler(endpoint: MetricsEndpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_TIMEOUT_S
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.wfile.write(self.do_HEAD())

        def do_HEAD(self) -> bytes:
            status, content_type, body = endpoint.answer(self.path.partition("?")[0])
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            return body

        def log_message(self, format: str, *args: Any) -> None:
            """A scrape every few seconds is no news."""

    return Handler
