"""A simulation file: stages, links, router, lane, load, and what to compare it with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from stagemesh.model.cost import CostModel, StepShape
from stagemesh.model.split import split_costs
from stagemesh.router.config import RouterConfig, load_yaml
from stagemesh.router.simulate.units import Bandwidth, Cost, Duration
from stagemesh.wire.errors import ConfigError

_ALIKE, _LISTED = "alike", "listed"
"""The two ways of giving stages."""
MOST_REQUESTS = 10_000_000
"""Of a load: each has columns, drawn before anything runs."""
_ONE_OF = (("load", "prompt"), ("load", "output"))
"""Keys that hold one kind of several: a variant replaces it, where it changes other keys and keeps their neighbours."""
_ROUTER_DEFAULTS = RouterConfig.model_fields


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class Link(_Section):
    """From one stage to the next."""

    latency: Duration = Field(default="0.2ms", validate_default=True)
    bandwidth: Bandwidth | None = None
    """Unset: no limit."""

    def nanoseconds(self, num_bytes: int) -> int:
        """From the end of the step on one stage to its arrival on the next."""
        return self.latency + (round(num_bytes / self.bandwidth * 1e9) if self.bandwidth else 0)


class Stage(_Section):
    """One stage of a list."""

    cost: Cost
    link: Link | None = None
    """To the next stage; unset: as `link` of the file says."""


class Layers(_Section):
    """What stages are made of where their costs are not given: layers, and the head on the last stage."""

    count: int = Field(ge=1)
    cost: Cost
    """Of one layer."""
    head: Cost = Field(default="0us", validate_default=True)
    step: Cost = Field(default="0us", validate_default=True)
    """Once for each step on each stage, whatever its layers."""
    balance_rows: int = Field(default=64, ge=1)
    """The split is balanced for decode steps of so many rows."""

    def split(self, num_stages: int) -> tuple[int, ...]:
        """Layers of each stage, such that the dearest is as cheap as can be."""
        shape = StepShape(tokens=self.balance_rows, rows=self.balance_rows, prefill=0, context=0)
        costs = [max(1, self.cost.nanoseconds(shape))] * self.count
        costs[-1] += self.head.nanoseconds(shape)
        return tuple(len(part) for part in split_costs(costs, num_stages))

    def costs(self, split: tuple[int, ...]) -> tuple[CostModel, ...]:
        """Of each stage."""
        last = len(split) - 1
        return tuple(
            CostModel(
                (
                    *self.step.terms,
                    *((count * value, variable) for value, variable in self.cost.terms),
                    *(self.head.terms if index == last else ()),
                )
            )
            for index, count in enumerate(split)
        )


class Stages(_Section):
    """Stages that are alike, or made of layers."""

    count: int | None = Field(default=None, ge=1, le=4096)
    cost: Cost | None = None
    """Of each; unset: made of `layers`."""
    split: tuple[int, ...] | None = None
    """Layers of each stage; unset: balanced."""


class Router(_Section):
    """How long the control path takes. None of it is computed: the scheduler's own time is not simulated."""

    step: Duration = Field(default="0.3ms", validate_default=True)
    """From an event in the router to the arrival of the step it causes at every stage."""
    admit: Duration = Field(default="0ms", validate_default=True)
    """To put one request into its first step: a step that follows another at once leaves later by it for each."""
    result: Duration = Field(default="0.3ms", validate_default=True)
    """From the end of a step on the last stage to its result in the router."""
    request: Duration = Field(default="0ms", validate_default=True)
    """To take a request in; they are taken one after the other, and those that came together start together."""
    client: Duration = Field(default="0.2ms", validate_default=True)
    """From the router to the client, and from the client to the router."""


class LaneSpec(_Section):
    """The lane's settings, named as the router's flags are."""

    max_in_flight: int = Field(default=0, ge=0)
    """0: chosen by cost."""
    lookahead: int = Field(default=_ROUTER_DEFAULTS["lookahead"].default, ge=0)
    step_tokens: int = Field(default=_ROUTER_DEFAULTS["step_tokens"].default, ge=1)
    max_sequences: int = Field(default=_ROUTER_DEFAULTS["max_sequences"].default, ge=1)
    """For each stage."""
    max_waiting: int = Field(default=_ROUTER_DEFAULTS["max_waiting"].default, ge=1)
    prefix_cache: bool = _ROUTER_DEFAULTS["prefix_cache"].default
    itl_target_ms: float = Field(default=_ROUTER_DEFAULTS["itl_target_ms"].default, ge=0)
    num_blocks: int = Field(default=1 << 16, ge=1, le=1 << 24)
    block_size: int = Field(default=16, ge=1)
    max_context: int = Field(default=8192, ge=2, le=1 << 24)


class Distribution(_Section):
    """Of lengths in tokens: one of them."""

    fixed: int | None = Field(default=None, ge=1)
    uniform: tuple[int, int] | None = None
    """Lowest and highest."""
    lognormal: tuple[int, float] | None = None
    """Median, and sigma of the logarithm; cut off at 20 medians."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in ("fixed", "uniform", "lognormal") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("expected one of fixed, uniform and lognormal")
        if self.uniform and not 1 <= self.uniform[0] <= self.uniform[1]:
            raise ValueError("uniform: expected [lowest, highest], at least 1")
        if self.lognormal and not (self.lognormal[0] >= 1 and 0 <= self.lognormal[1] < math.inf):
            raise ValueError("lognormal: expected [median, sigma], the median at least 1, sigma at least 0")
        return self

    @property
    def lowest(self) -> int:
        """Of all lengths that it can give."""
        return self.fixed or (self.uniform[0] if self.uniform else 1)

    @property
    def highest(self) -> int | None:
        """None: not bounded by the file but by the context, to which a lognormal length is cut."""
        return self.fixed or (self.uniform[1] if self.uniform else None)


class Load(_Section):
    """Who asks for what, and when."""

    arrivals: Literal["poisson", "at_once"] = "poisson"
    rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Requests per second; of Poisson arrivals."""
    requests: int | None = Field(default=None, ge=1, le=MOST_REQUESTS)
    duration: Duration | None = None
    """Arrivals end after it; with `requests`, whatever comes first."""
    prompt: Distribution
    output: Distribution
    shared_prefix: int = Field(default=0, ge=0, le=1 << 24)
    """Tokens that all prompts begin with; each is cut to its length."""
    stops: float = Field(default=0.0, ge=0, le=1)
    """Share of requests that end by an end token that the router cannot foresee; the others by max_tokens."""
    seed: int = 1

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.arrivals == "poisson" and self.rate is None:
            raise ValueError("rate is missing: poisson arrivals need it, in requests per second")
        if self.arrivals == "at_once" and self.requests is None:
            raise ValueError("requests is missing: how many arrive at once?")
        if self.requests is None and self.duration is None:
            raise ValueError("requests or duration is missing: the load has no end")
        if self.requests is None and (self.rate or 0) * (self.duration or 0) / 1e9 > MOST_REQUESTS:
            raise ValueError(f"rate times duration is more than {MOST_REQUESTS:,} requests; ask for fewer")
        return self


class SimulationSpec(_Section):
    """The whole file."""

    stages: Annotated[
        Annotated[Stages, Tag(_ALIKE)] | Annotated[tuple[Stage, ...], Tag(_LISTED)],
        Discriminator(lambda value: _LISTED if isinstance(value, list | tuple) else _ALIKE),
    ]
    layers: Layers | None = None
    link: Link = Link()
    ring: Link = Link()
    position_bytes: int = Field(default=8192, ge=0, le=1 << 30)
    """Activations of one position on a link: hidden size times bytes of the dtype."""
    router: Router = Router()
    lane: LaneSpec = LaneSpec()
    load: Load
    what_if: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Variants by name: keys to change, nested as in the file or with dots."""

    @model_validator(mode="after")
    def _costs_known(self) -> Self:
        stages = self.stages
        if isinstance(stages, tuple):
            if not stages:
                raise ValueError("stages: expected at least one")
            return self
        if stages.cost is None and self.layers is None:
            raise ValueError("stages.cost is missing: give it, or `layers` to make stages of")
        if stages.cost is not None and stages.split is not None:
            raise ValueError("stages.split is of layers: leave stages.cost out and give `layers`")
        if stages.split is None and stages.count is None:
            raise ValueError("stages.count is missing")
        if stages.split is not None:
            assert self.layers is not None
            if min(stages.split) < 1 or sum(stages.split) != self.layers.count:
                raise ValueError(
                    f"stages.split {list(stages.split)} has {sum(stages.split)} layers, "
                    f"expected {self.layers.count}, at least 1 a stage"
                )
            if stages.count not in (None, len(stages.split)):
                raise ValueError(f"stages.count is {stages.count}, stages.split has {len(stages.split)}")
        elif stages.cost is None and stages.count and self.layers and stages.count > self.layers.count:
            raise ValueError(f"stages.count is {stages.count}, but there are {self.layers.count} layers")
        return self

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        """What is given by its bounds is never cut: a load of other lengths would be simulated than was asked for."""
        load, context = self.load, self.lane.max_context
        keys = (("load.prompt", load.prompt, load.output), ("load.output", load.output, load.prompt))
        for key, one, other in sorted(keys, key=lambda each: each[1].highest or 0, reverse=True):
            room = max(1, context - other.lowest)
            if one.highest is not None and one.highest > room:
                raise ValueError(
                    f"{key}: {one.highest} tokens can never fit; expected at most {room}, what lane.max_context {context} "
                    f"leaves beside the shortest {'answer' if one is load.prompt else 'prompt'}, {other.lowest}"
                )
        return self

    @property
    def split(self) -> tuple[int, ...]:
        """Layers of each stage; empty where costs are given."""
        if isinstance(self.stages, tuple) or self.stages.cost is not None or self.layers is None:
            return ()
        if self.stages.split is not None:
            return self.stages.split
        assert self.stages.count is not None
        return self.layers.split(self.stages.count)

    @property
    def costs(self) -> tuple[CostModel, ...]:
        """Of each stage."""
        if isinstance(self.stages, tuple):
            return tuple(stage.cost for stage in self.stages)
        if self.stages.cost is not None:
            assert self.stages.count is not None
            return (self.stages.cost,) * self.stages.count
        assert self.layers is not None
        return self.layers.costs(self.split)

    @property
    def links(self) -> tuple[Link, ...]:
        """Between neighbours; one fewer than stages."""
        if isinstance(self.stages, tuple):
            return tuple(stage.link or self.link for stage in self.stages[:-1])
        return (self.link,) * (len(self.costs) - 1)


def parse(content: Any, name: str) -> SimulationSpec:
    """Check what a file says; a ConfigError names the key at fault.

    Args:
        content: As YAML gives it.
        name: Of the file, for errors.
    """
    if not isinstance(content, Mapping):
        raise ConfigError(f"{name}: expected a mapping with stages and load")
    try:
        return SimulationSpec.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{name}: {_problem(error)}") from error


def read(path: str | Path) -> tuple[SimulationSpec, dict[str, SimulationSpec]]:
    """A file and its variants."""
    content = load_yaml(path)
    base = parse(content, str(path))
    return base, {
        name: variant(content, changes, f"{path}: what_if '{name}'") for name, changes in base.what_if.items()
    }


def variant(content: Mapping[str, Any], changes: Mapping[str, Any], name: str) -> SimulationSpec:
    """The file with some keys changed."""
    merged = dict(content)
    merged.pop("what_if", None)
    for key, value in changes.items():
        merged = _changed(merged, key.split("."), value, name)
    return parse(merged, name)


def _changed(content: Any, keys: list[str], value: Any, name: str, at: tuple[str, ...] = ()) -> Any:
    """`content`, which is at `at` in the file, with the value at `keys` changed."""
    key, rest = keys[0], keys[1:]
    if isinstance(content, list):
        if not key.isdigit() or int(key) >= len(content):
            raise ConfigError(f"{name}: '{key}' is not an index below {len(content)}")
        changed = list(content)
        changed[int(key)] = _changed(content[int(key)], rest, value, name, (*at, key)) if rest else value
        return changed
    have = dict(content) if isinstance(content, Mapping) else {}
    here = (*at, key)
    if at in _ONE_OF:
        have = {kind: have[kind] for kind in have if kind == key}
    if rest:
        have[key] = _changed(have.get(key, {}), rest, value, name, here)
    elif isinstance(value, Mapping) and isinstance(have.get(key), Mapping) and here not in _ONE_OF:
        for inner, one in value.items():
            have[key] = _changed(have[key], [str(inner)], one, name, here)
    else:
        have[key] = value
    return have


def _problem(error: ValidationError) -> str:
    finding = error.errors()[0]
    keys = [str(part) for part in finding["loc"] if part not in (_ALIKE, _LISTED)]
    if finding["type"] == "extra_forbidden":
        return f"unknown key '{'.'.join(keys)}'"
    if finding["type"] == "missing":
        return f"{'.'.join(keys)} is missing"
    message = finding["msg"].removeprefix("Value error, ")
    if not keys:
        return message
    return f"{'.'.join(keys)}: {message} (got {finding.get('input')!r})"
