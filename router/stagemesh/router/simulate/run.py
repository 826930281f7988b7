"""A file and its variants, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from stagemesh.router.config import load_yaml
from stagemesh.router.simulate.result import SimulationResult
from stagemesh.router.simulate.simulation import simulate
from stagemesh.router.simulate.spec import read, variant
from stagemesh.wire.errors import ConfigError


def run_file(path: str | Path, what_if: Sequence[str] = ()) -> list[SimulationResult]:
    """Simulate a file as it is, then its variants.

    Args:
        path: Of the YAML file.
        what_if: Further variants, each "key=value" with dots in keys and commas between pairs.
    """
    base, variants = read(path)
    for text in what_if:
        variants[text] = variant(load_yaml(path), parse_changes(text), f"--what-if {text}")
    return [simulate(base, "as it is"), *(simulate(spec, name) for name, spec in variants.items())]


def parse_changes(text: str) -> dict[str, Any]:
    """The changes of one --what-if; a list in brackets may hold commas."""
    changes: dict[str, Any] = {}
    for part in _pairs(text):
        key, found, value = part.partition("=")
        if not found or not key.strip():
            raise ConfigError(f"--what-if: '{part}' is not KEY=VALUE, such as link.latency=5ms")
        try:
            changes[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--what-if: '{value}' of {key.strip()} is not YAML") from error
    return changes


def _pairs(text: str) -> list[str]:
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts
