"""Typed reading of the values in a model's configuration, with errors that name the key."""

from __future__ import annotations

from collections.abc import Mapping

from stagemesh.wire.errors import ModelError


class Fields:
    """The values of one file. A null counts as absent."""

    def __init__(self, origin: str, values: Mapping[str, object]) -> None:
        self.origin = origin
        self._values = values

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def raw(self, key: str) -> object:
        """The value as it is, None where absent."""
        return self._values.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number; absent without a default is a ModelError."""
        value = self._get(key, default, "a whole number")
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number; absent without a default is a ModelError."""
        value = self._get(key, default, "a number")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a number")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A string; absent without a default is a ModelError."""
        value = self._get(key, default, "a string")
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._get(key, default, "true or false")
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def section(self, key: str) -> Fields | None:
        """A nested object, None where absent."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return Fields(f"{self.origin} {key}", value)

    def token_ids(self, key: str) -> set[int]:
        """One id or a list of ids; empty where absent. Some files write a negative id for none."""
        value = self._values.get(key)
        tokens: set[int] = set()
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if isinstance(token, bool) or not isinstance(token, int):
                raise self._wrong(key, "a token id or a list of them")
            if token >= 0:
                tokens.add(token)
        return tokens

    def _get(self, key: str, default: object, expected: str) -> object:
        value = self._values.get(key)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{self.origin} has no {key}, expected {expected}; the file is incomplete")
        return value

    def _wrong(self, key: str, expected: str) -> ModelError:
        return ModelError(f"{self.origin}: {key} is {self._values.get(key)!r}, expected {expected}")
