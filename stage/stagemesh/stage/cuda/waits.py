"""What of the time before a step was a wait. Pure arithmetic."""

from __future__ import annotations

RECEIVE_NS = 30_000
LINK_BYTES_PER_NS = 40.0
"""What a receive takes whose data is there, roughly: NCCL over NVLink on two channels."""


def split_wait(waited_ns: int, received_bytes: int) -> tuple[int, int]:
    """(waiting, receiving) of the time between asking for a step's inputs and having them.

    A stage that was late itself finds its inputs there and only takes them. The router reads the hops
    between stages from those that did wait, so a transfer must not pass for a wait.
    """
    transfer_ns = RECEIVE_NS + int(received_bytes / LINK_BYTES_PER_NS)
    if waited_ns < 2 * transfer_ns + RECEIVE_NS:
        return 0, waited_ns
    return waited_ns - transfer_ns, transfer_ns
