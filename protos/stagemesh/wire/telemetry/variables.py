"""Reads OTEL_* variables, checked at the start of a process."""

from __future__ import annotations

import logging
import re
import ssl
import threading
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from stagemesh.wire.address import split_address
from stagemesh.wire.errors import ConfigError

GRPC = "grpc"
HTTP = "http/protobuf"
DEFAULT_ENDPOINTS = {GRPC: "http://localhost:4317", HTTP: "http://localhost:4318"}
"""Of the specification, where an exporter is asked for and no receiver named."""
COMPRESSIONS = ("none", "gzip", "deflate")
_HEADER_NAME = re.compile(r"[0-9a-z_.-]+(?<!-bin)")
"""What gRPC sends with a text, of the names in small letters that both exporters make of theirs."""
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off", "no_content", "")


class Variables:
    """One variable at a time; an empty one counts as unset, as the specification says. ConfigError names the variable
    whose value cannot be used.

    Args:
        environment: Of the process.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def text(self, key: str) -> str:
        """Its value without blanks around it; empty where it is not set."""
        return self._environment.get(key, "").strip()

    def switch(self, key: str, also_true: tuple[str, ...] = ()) -> bool:
        """True or false; false where it is not set."""
        text = self.text(key).lower()
        if text not in (*_TRUE, *_FALSE, *also_true):
            raise ConfigError(f"{key}: '{text}' is neither true nor false")
        return text in (*_TRUE, *also_true)

    def choice(self, key: str, choices: tuple[str, ...], default: str) -> str:
        """One of `choices`."""
        text = self.text(key).lower() or default
        if text not in choices:
            raise ConfigError(f"{key}: '{text}' is not known; expected one of {', '.join(choices)}")
        return text

    def first_choice(self, keys: tuple[str, ...], choices: tuple[str, ...], default: str) -> str:
        """The same of the first of `keys` that is set."""
        key = next((key for key in keys if self.text(key)), keys[-1])
        return self.choice(key, choices, default)

    def number(self, key: str, default: float, *, low: float, high: float = float("inf")) -> float:
        """Within `low` to `high`."""
        text = self.text(key)
        try:
            value = float(text) if text else default
        except ValueError:
            raise ConfigError(f"{key}: '{text}' is not a number") from None
        if not low <= value <= high or value == float("inf"):
            upper = f" to {high:g}" if high < float("inf") else " or more"
            raise ConfigError(f"{key}: {text} is out of range; expected {low:g}{upper}")
        return value

    def seconds(self, key: str, default_s: float) -> float:
        """Of milliseconds, 1 at least and no more than a thread can wait."""
        return self.number(key, default_s * 1e3, low=1, high=threading.TIMEOUT_MAX * 1e3) / 1e3

    def transport(self, signal: str) -> None:
        """Check what the OTLP exporters of a signal read by themselves: the one over HTTP takes its default for a timeout or a
        compression that it cannot use, both leave out headers and write them into the log, and the one over grpc goes on
        without a file that it cannot read."""
        for prefix in ("OTEL_EXPORTER_OTLP_", f"OTEL_EXPORTER_OTLP_{signal}_"):
            self.choice(f"{prefix}COMPRESSION", COMPRESSIONS, "none")
            self.number(f"{prefix}TIMEOUT", 10, low=0.001, high=threading.TIMEOUT_MAX)
            self._headers(f"{prefix}HEADERS")
            self._file(f"{prefix}CERTIFICATE", of_authorities=True)
            self._file(f"{prefix}CLIENT_CERTIFICATE")
            self._file(f"{prefix}CLIENT_KEY")

    def _file(self, key: str, *, of_authorities: bool = False) -> None:
        path = self.text(key)
        if not path:
            return
        try:
            Path(path).open("rb").close()
            if of_authorities:
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
        except ssl.SSLError:
            raise ConfigError(f"{key}: '{path}' has no certificate in it; expected a PEM file") from None
        except OSError as error:
            raise ConfigError(
                f"{key}: '{path}' cannot be read ({error.strerror}); expected a PEM file"
            ) from None

    def _headers(self, key: str) -> None:
        """Checks NAME=VALUE,...: the exporters leave out what is not of that form, and cannot send all of the rest."""
        entries = [part.strip() for part in self.text(key).split(",") if part.strip()]
        if not entries:
            return
        try:
            from opentelemetry.util import re as parser
        except ModuleNotFoundError:
            return  # Nor is there an exporter then.
        # The values are secrets as a rule: neither the parser's log nor the message shows one.
        parsing = logging.getLogger(parser.__name__)
        was_disabled, parsing.disabled = parsing.disabled, True
        try:
            parsed = [parser.parse_env_headers(entry, liberal=True) for entry in entries]
        finally:
            parsing.disabled = was_disabled
        for entry in parsed:
            for name, value in entry.items() or [("", "")]:
                if not (_HEADER_NAME.fullmatch(name) and value.isascii() and value.isprintable()):
                    raise ConfigError(
                        f"{key}: an entry is not of the form NAME=VALUE, or has a character that must be "
                        "percent-encoded or cannot be sent"
                    )

    def protocol(self, signal: str) -> str:
        """grpc or http/protobuf, of a signal's own variable or the one for all of them."""
        return self.first_choice(
            (f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"), (GRPC, HTTP), GRPC
        )

    def endpoint(self, signal: str, protocol: str) -> str:
        """The same of its OTLP receiver; empty where none is named."""
        own, every = f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"
        key = own if self.text(own) else every
        text = self.text(key)
        if not text:
            return ""
        wanted = "http://HOST:PORT or https://HOST:PORT"
        if protocol == GRPC and "://" not in text:
            split_address(text, key=key)
            return text
        try:
            parts = urlsplit(text)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            good = False
        if not good:
            raise ConfigError(f"{key}: '{text}' is not an address; expected {wanted}")
        if protocol == GRPC and parts.port is None:
            raise ConfigError(f"{key}: '{text}' has no port; expected {wanted}, the usual port is 4317")
        return text

    def resource(self) -> None:
        """Check OTEL_RESOURCE_ATTRIBUTES, which the SDK reads by itself."""
        text = self.text("OTEL_RESOURCE_ATTRIBUTES")
        for item in filter(None, (part.strip() for part in text.split(","))):
            key, equals, _ = item.partition("=")
            if not equals or not key.strip():
                raise ConfigError(f"OTEL_RESOURCE_ATTRIBUTES: '{item}' is not KEY=VALUE")
