"""Programmatic dependent launch: a kernel starts while the one before it ends, and waits where it needs its results.

Every kernel that is launched so must wait on every path: the next one takes its end for the end of all before it.
"""

from __future__ import annotations

import torch


def pdl_options(pdl: bool) -> dict[str, bool]:
    """Launch options of a kernel that takes PDL: what Triton's own option of the launch needs to be."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


def has_pdl(device: torch.device) -> bool:
    """Whether the GPU can: from Hopper on."""
    return torch.cuda.get_device_capability(device) >= (9, 0)
