"""What the metrics endpoint of a service says."""

from __future__ import annotations

import re
import urllib.request

from running_mesh import CALL_TIMEOUT_S


def scrape(address: str) -> dict[str, float]:
    """Every sample: name with labels, value. Gauges and counts of all series."""
    text = urllib.request.urlopen(f"http://{address}/metrics", timeout=CALL_TIMEOUT_S).read().decode()
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


def metrics_of_name(samples: dict[str, float], name: str) -> dict[str, float]:
    """The samples of one metric; of a histogram its counts and sums."""
    return {key: value for key, value in samples.items() if re.match(rf"{name}(_count|_sum)?(\{{|$)", key)}
