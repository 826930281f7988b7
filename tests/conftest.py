"""For every test."""

from __future__ import annotations

import os
import sys

from hypothesis import HealthCheck, settings

# Triton's kernels run in its interpreter, on the CPU, but in the tests of GPUs (-m gpu). It reads this when it is first
# imported, which transformers does as well, and conftest files further down import that.
if "gpu" not in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples on every run, and no limit on the time that one takes: a busy machine finds nothing of its own.
settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=(HealthCheck.too_slow,)
)
settings.load_profile("steady")
