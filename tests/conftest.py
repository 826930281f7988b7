"""For every test."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# The same examples on every run, and no limit on the time that one takes: a busy machine finds nothing of its own.
settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=(HealthCheck.too_slow,)
)
settings.load_profile("steady")
