"""Which layers a stage runs. Pure arithmetic."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate, pairwise

from stagemesh.model.config import ModelConfig
from stagemesh.wire.errors import ConfigError


def parse_stage(text: str) -> tuple[int, int]:
    """Reads --stage INDEX/COUNT, counted from 0: '0/3' is the first of three.

    Returns:
        (stage index, number of stages).

    Raises:
        ConfigError: Not of that form, or an index that is not below the count.
    """
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if match is None:
        raise ConfigError(f"--stage is {text!r}, expected INDEX/COUNT counted from 0, as 0/3")
    index, count = int(match[1]), int(match[2])
    if index >= count:
        raise ConfigError(
            f"--stage is {text!r}, expected an index from 0 to {count - 1}: stages count from 0"
        )
    return index, count


def parse_layers(text: str, num_layers: int | None = None) -> range:
    """Reads --layers BEGIN:END, half-open: '10:20' is layers 10 to 19.

    Args:
        text: The flag.
        num_layers: Layers of the model, where known: END may not be above it.

    Raises:
        ConfigError: Not of that form, empty, or past the model's layers.
    """
    match = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    if match is None:
        raise ConfigError(f"--layers is {text!r}, expected BEGIN:END, half-open, as 10:20")
    begin, end = int(match[1]), int(match[2])
    if begin >= end:
        raise ConfigError(f"--layers is {text!r}, expected BEGIN below END: the range is half-open")
    if num_layers is not None and end > num_layers:
        raise ConfigError(f"--layers is {text!r}, but the model has {num_layers} layers: END is at most that")
    return range(begin, end)


def split_layers(config: ModelConfig, num_stages: int, head_share: float = 1.0) -> tuple[range, ...]:
    """Cuts the model's layers into contiguous ranges, a stage each, with the cheapest most expensive stage.

    The unit of cost is a weight, which is both bytes read and multiply-adds of a decode step: a layer's own,
    and the head's on the last stage. The embedding counts as nothing: a step reads one row of it per token.
    Not modelled: attention over the context (alike on all layers). In prefill the head is next to nothing, since it
    computes sampled rows only: `head_share` of its weights count.

    Raises:
        ConfigError: Fewer than one stage, or more stages than layers.
    """
    costs = [config.layer_parameters] * config.num_layers
    costs[-1] += round(config.head_parameters * head_share)
    return split_costs(costs, num_stages)


def split_costs(costs: Sequence[int], num_parts: int) -> tuple[range, ...]:
    """Cuts a sequence of costs into contiguous, non-empty parts.

    The greatest sum of a part is as small as can be; among such cuts the parts are as even as can be (least
    sum of squares); among those the last parts are shorter.

    Raises:
        ConfigError: Fewer than one part, or more parts than costs.
    """
    count = len(costs)
    if num_parts < 1:
        raise ConfigError(f"{num_parts} stages asked for, expected at least 1")
    if num_parts > count:
        raise ConfigError(
            f"{num_parts} stages asked for, but the model has {count} layers; a stage needs at least one: "
            f"use at most {count}"
        )
    sums = [0, *accumulate(costs)]
    bound = _least_bound(sums, num_parts)
    # best[end]: the least sum of squares of a cut of costs[:end] into `part` parts within the bound; begin_of
    # keeps its last part's begin. Begins are tried from the right, so that ties leave the last part short.
    best: list[int | None] = [0] + [None] * count
    begins: list[list[int]] = []
    for part in range(1, num_parts + 1):
        following: list[int | None] = [None] * (count + 1)
        begin_of = [0] * (count + 1)
        for end in range(part, count + 1):
            for begin in range(end - 1, part - 2, -1):
                cost = sums[end] - sums[begin]
                if cost > bound:
                    break
                before, current = best[begin], following[end]
                if before is not None and (current is None or before + cost * cost < current):
                    following[end], begin_of[end] = before + cost * cost, begin
        best = following
        begins.append(begin_of)
    cuts = [count]
    for begin_of in reversed(begins):
        cuts.append(begin_of[cuts[-1]])
    cuts.reverse()
    return tuple(range(begin, end) for begin, end in pairwise(cuts))


def _least_bound(sums: Sequence[int], num_parts: int) -> int:
    """The least greatest part of any cut into num_parts non-empty parts, from the running sums."""
    count = len(sums) - 1
    least = list(sums)
    for part in range(2, num_parts + 1):
        following = list(least)
        for end in range(part, count + 1):
            following[end] = min(max(least[begin], sums[end] - sums[begin]) for begin in range(part - 1, end))
        least = following
    return least[count]
