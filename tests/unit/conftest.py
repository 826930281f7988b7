"""Before anything imports triton: its kernels run in its interpreter, on the CPU."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
