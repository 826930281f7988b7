"""The requests of a simulated load: when they come and how long they are, drawn before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stagemesh.router.scheduler import Request, Sampling
from stagemesh.router.simulate.spec import Distribution, LaneSpec, Load

Int64 = npt.NDArray[np.int64]

VOCAB = 32_000
END_TOKEN = 0
MAX_TOKENS_FACTOR = 2
"""max_tokens over the length of an answer that ends by an end token."""
LOGNORMAL_CUT = 20
"""Medians at which a lognormal length is cut off."""
_GREEDY = Sampling(temperature=0.0)
_DRAWN = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """A column for each property."""

    arrivals_ns: Int64
    """At the client, ascending, from 0."""
    prompts: Int64
    outputs: Int64
    stops: npt.NDArray[np.bool_]
    """Ends by an end token, not by max_tokens."""
    shared_prefix: int
    tokens: npt.NDArray[np.uint32]
    """What prompts are cut from."""
    max_context: int
    num_cut: int
    """Of them: drawn longer than the context, prompt and answer together, and cut to it."""

    def __len__(self) -> int:
        return len(self.arrivals_ns)

    def request(self, index: int) -> Request:
        """As the scheduler gets it."""
        length, output = int(self.prompts[index]), int(self.outputs[index])
        begin = index * 31 % _DRAWN
        own = np.resize(self.tokens[begin:], max(0, length - self.shared_prefix))
        if len(own):
            own[0] = 1 + index % (VOCAB - 1)  # no two prompts begin alike by chance
        stops = bool(self.stops[index])
        return Request(
            request_id=str(index),
            prompt=np.concatenate((self.tokens[: min(length, self.shared_prefix)], own)),
            max_tokens=min(output * MAX_TOKENS_FACTOR, self.max_context - length) if stops else output,
            sampling=_GREEDY,
            end_token_ids=frozenset((END_TOKEN,)) if stops else frozenset(),
        )


def draw(load: Load, lane: LaneSpec) -> Requests:
    """Draw every request of the load; what does not fit the context is cut, the prompt only where it leaves no answer."""
    random = np.random.default_rng(load.seed)
    if load.arrivals == "at_once":
        assert load.requests is not None
        arrivals = np.zeros(load.requests, np.int64)
    else:
        assert load.rate is not None
        count = load.requests or int(load.rate * (load.duration or 0) / 1e9 * 1.2 + 100)
        arrivals = np.cumsum(random.exponential(1e9 / load.rate, count)).astype(np.int64)
        if load.duration is not None:
            arrivals = arrivals[arrivals < load.duration]
    count = len(arrivals)
    drawn_prompts, drawn_outputs = (_lengths(one, count, random) for one in (load.prompt, load.output))
    prompts = np.minimum(drawn_prompts, lane.max_context - load.output.lowest)
    outputs = np.minimum(drawn_outputs, lane.max_context - prompts)
    return Requests(
        arrivals_ns=arrivals,
        prompts=prompts,
        outputs=outputs,
        stops=random.random(count) < load.stops,
        shared_prefix=load.shared_prefix,
        tokens=random.integers(1, VOCAB, max(_DRAWN, load.shared_prefix) * 2).astype(np.uint32),
        max_context=lane.max_context,
        num_cut=int(((prompts < drawn_prompts) | (outputs < drawn_outputs)).sum()),
    )


def _lengths(distribution: Distribution, count: int, random: np.random.Generator) -> Int64:
    if distribution.fixed is not None:
        return np.full(count, distribution.fixed)
    if distribution.uniform is not None:
        return random.integers(distribution.uniform[0], distribution.uniform[1] + 1, count)
    assert distribution.lognormal is not None
    median, sigma = distribution.lognormal
    drawn = np.rint(median * np.exp(sigma * random.standard_normal(count)))
    cut: Int64 = np.clip(drawn, 1, LOGNORMAL_CUT * median).astype(np.int64)
    return cut
