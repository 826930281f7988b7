"""The scheduler's limits, as the router sets them for a lane of such stages."""

from __future__ import annotations

from stagemesh.router.config import RouterConfig
from stagemesh.router.lane.chain import Member
from stagemesh.router.lane.driving import limits_of
from stagemesh.router.scheduler import Limits
from stagemesh.router.simulate.spec import LaneSpec
from stagemesh.v1 import stage_pb2


def lane_limits(lane: LaneSpec, num_stages: int) -> Limits:
    """For that many stages, each a device of its own on a host of its own."""
    members = [
        Member(
            index,
            f"simulated-{index}",
            stage_pb2.DescribeResponse(
                num_blocks=lane.num_blocks,
                block_size=lane.block_size,
                max_context=lane.max_context,
                max_slots=lane.max_sequences,
                host_id=str(index),
                ranks=[stage_pb2.RankInfo(device="sim")],
            ),
        )
        for index in range(num_stages)
    ]
    config = RouterConfig(
        model="simulated",
        stages=tuple(member.address for member in members),
        max_in_flight=lane.max_in_flight,
        lookahead=lane.lookahead,
        step_tokens=lane.step_tokens,
        max_sequences=lane.max_sequences,
        max_waiting=lane.max_waiting,
        prefix_cache=lane.prefix_cache,
        itl_target_ms=lane.itl_target_ms,
    )
    return limits_of(config, members)
