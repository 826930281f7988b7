"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "b": 1}
for _exponent, _prefix in enumerate("kmgt", start=1):
    _UNITS[f"{_prefix}ib"] = 1 << (10 * _exponent)
    _UNITS[f"{_prefix}b"] = 1000**_exponent
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of "512MiB", "1.5GiB", "2GB" or "1048576"; ValueError names what is expected."""
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(
            f"'{text}' is not a size; expected bytes or a number with KiB, MiB, GiB, TiB, KB, MB, GB or TB"
        )
    return int(float(match[1]) * unit)


def format_size(num_bytes: int) -> str:
    """The largest unit that needs no more than one decimal: "1GiB", "1.5GiB"."""
    for prefix in "TGMK":
        unit = _UNITS[f"{prefix.lower()}ib"]
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f}".removesuffix(".0") + f"{prefix}iB"
    return f"{num_bytes}B"
