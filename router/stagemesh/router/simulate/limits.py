"""The scheduler's limits as the router would set them for the simulated lane."""

from __future__ import annotations

from stagemesh.router.scheduler import Limits
from stagemesh.router.simulate.spec import LaneSpec


def lane_limits(lane: LaneSpec, num_stages: int) -> Limits:
    """For a lane of that many stages, each with a device of its own."""
    microbatches = lane.max_in_flight or num_stages
    return Limits(
        num_blocks=lane.num_blocks,
        block_size=lane.block_size,
        max_slots=min(lane.max_sequences, 1 << 16) * num_stages,
        max_blocks=-(-lane.max_context // lane.block_size),
        max_waiting=lane.max_waiting,
        step_tokens=lane.step_tokens,
        num_microbatches=microbatches,
        depth=microbatches + (1 if lane.lookahead else 0),
        lookahead=lane.lookahead,
        prefix_cache=lane.prefix_cache,
    )
