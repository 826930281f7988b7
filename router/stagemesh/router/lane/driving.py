"""How a lane is driven: the scheduler's limits, from what its stages say of themselves."""

from __future__ import annotations

from collections.abc import Sequence

from stagemesh.router.config import RouterConfig
from stagemesh.router.lane.chain import Member
from stagemesh.router.scheduler import Limits

SPARE_MICROBATCHES = 2
"""In flight beyond one a stage, where the hops between the stages are worth it."""


def limits_of(config: RouterConfig, members: Sequence[Member]) -> Limits:
    """Of a lane of these stages."""
    first, num_stages = members[0].description, len(members)
    at_once = num_microbatches(members)
    if config.max_in_flight:
        begin, most = config.max_in_flight, 0
    elif at_once < num_stages or num_stages == 1:
        begin, most = at_once, at_once
    else:
        begin, most = num_stages, num_stages + SPARE_MICROBATCHES
    slots = min(config.max_sequences, *(member.description.max_slots for member in members), 1 << 16)
    return Limits(
        num_blocks=min(member.description.num_blocks for member in members),
        block_size=first.block_size,
        max_slots=slots * num_stages,
        max_blocks=-(-first.max_context // first.block_size),
        max_waiting=config.max_waiting,
        step_tokens=min(
            config.step_tokens,
            *(member.description.max_step_tokens or config.step_tokens for member in members),
        ),
        num_stages=num_stages,
        num_microbatches=begin,
        max_microbatches=most,
        depth=depth_of(most or begin, config.lookahead),
        lookahead=config.lookahead,
        itl_target_s=config.itl_target_ms / 1e3,
        prefix_cache=config.prefix_cache,
        consecutive_blocks=any(
            rank.device == "cpu" for member in members for rank in member.description.ranks
        ),
    )


def depth_of(num_microbatches: int, lookahead: int) -> int:
    """Unanswered steps to open a lane for (D).

    One round of microbatches for each token of lookahead, and a step that lies ready at the first stage while
    results travel. How many of them are used follows from the hops.
    """
    return num_microbatches * lookahead + 1 if lookahead else num_microbatches


def num_microbatches(members: Sequence[Member]) -> int:
    """How many microbatches to keep in flight: as many as stages that can compute at the same time.

    Stages whose threads share the cores of one host gain nothing from computing at once: two steps
    each take twice as long. A host counts for as many stages as its cores can run side by side.
    """
    hosts: dict[str, list[Member]] = {}
    for member in members:
        hosts.setdefault(member.description.host_id, []).append(member)
    total = 0
    for group in hosts.values():
        cpu = [member for member in group if all(rank.device == "cpu" for rank in member.description.ranks)]
        wanted = sum(member.description.threads_per_rank * len(member.description.ranks) for member in cpu)
        cores = max((member.description.num_cores for member in cpu), default=1)
        at_once = len(cpu) if wanted <= cores else max(1, len(cpu) * cores // max(wanted, 1))
        total += len(group) - len(cpu) + (at_once if cpu else 0)
    return total
