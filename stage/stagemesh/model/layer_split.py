"""How layers are split over stages by what they cost in time, and what that gains. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stagemesh.model.config import ModelConfig
from stagemesh.model.cost import StepShape
from stagemesh.wire.errors import ConfigError

ALIKE = 0.15
"""Stages whose layers differ by less are taken for devices of one kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTimes:
    """Seconds that the parts of a model take of a step on one device."""

    layer_s: float
    head_s: float
    step_s: float = 0.0
    """Once on each stage, whatever its layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device by what it can do at most."""

    bytes_per_s: float
    """Of memory read."""
    flops: float
    """Multiplications and additions per second."""
    itemsize: int
    """Bytes of an element of weights and KV."""

    def parts(self, config: ModelConfig, shape: StepShape) -> PartTimes:
        """What a step takes of a layer and of the head: to read the weights, or to multiply by them.

        Args:
            config: The model.
            shape: Of the step; `context` is the sum over its rows.
        """
        kv = 2 * config.num_kv_heads * config.head_dim * shape.context
        read = (config.layer_parameters + kv) * self.itemsize / self.bytes_per_s
        multiply = 2 * config.layer_parameters * shape.tokens / self.flops
        head_read = config.head_parameters * self.itemsize / self.bytes_per_s
        head_multiply = 2 * config.head_parameters * shape.rows / self.flops
        return PartTimes(layer_s=max(read, multiply), head_s=max(head_read, head_multiply))


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A split and what it costs."""

    split: tuple[int, ...]
    """Layers of each stage."""
    times_s: tuple[float, ...]
    """Predicted, of a step on each stage."""

    @property
    def slowest_s(self) -> float:
        """What the lane's throughput follows."""
        return max(self.times_s)

    @property
    def efficiency(self) -> float:
        """Of the stages' time that a full pipeline uses."""
        return sum(self.times_s) / (len(self.times_s) * self.slowest_s)


def propose(num_layers: int, parts: Sequence[PartTimes]) -> Proposal:
    """The split whose slowest stage is the fastest.

    Layers go one by one to the stage that is fastest with one more: no other split has a smaller greatest time,
    since times grow with layers alone.

    Args:
        num_layers: Of the model.
        parts: Of each stage; the head is the last one's.

    Raises:
        ConfigError: Fewer layers than stages.
    """
    if num_layers < len(parts):
        raise ConfigError(f"{len(parts)} stages, but the model has {num_layers} layers: a stage needs one")
    split = [1] * len(parts)
    for _ in range(num_layers - len(parts)):
        with_one_more = [stage_time(count + 1, parts, index) for index, count in enumerate(split)]
        split[with_one_more.index(min(with_one_more))] += 1
    return predict(tuple(split), parts)


def predict(split: tuple[int, ...], parts: Sequence[PartTimes]) -> Proposal:
    """What a given split costs."""
    times = tuple(stage_time(count, parts, index) for index, count in enumerate(split))
    return Proposal(split=split, times_s=times)


def stage_time(num_layers: int, parts: Sequence[PartTimes], index: int) -> float:
    """Seconds of a step on a stage with so many layers."""
    part = parts[index]
    head_s = part.head_s if index == len(parts) - 1 else 0.0
    return part.step_s + num_layers * part.layer_s + head_s


def parts_from_stages(split: Sequence[int], times_s: Sequence[float]) -> tuple[PartTimes, ...]:
    """What the parts take, from what whole stages were measured to take.

    The head is what the last stage takes above its layers, at the pace of the others. Stages whose layers differ
    by ALIKE or more are devices of different kinds, each with its own pace; the last is taken for one like the
    others on average.

    Raises:
        ConfigError: A single stage: its head cannot be told from its layers.
    """
    if len(split) < 2:
        raise ConfigError("a mesh of one stage has no split to measure: measure the model's parts instead")
    paces = [time / count for time, count in zip(times_s[:-1], split[:-1], strict=True)]
    mean = sum(times_s[:-1]) / sum(split[:-1])
    if max(paces) - min(paces) < ALIKE * mean:
        paces = [mean] * len(paces)
    pace = min(mean, times_s[-1] / split[-1])
    head_s = max(0.0, times_s[-1] - split[-1] * pace)
    return (
        *(PartTimes(layer_s=one, head_s=0.0) for one in paces),
        PartTimes(layer_s=pace, head_s=head_s),
    )
