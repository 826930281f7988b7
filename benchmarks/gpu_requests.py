"""The requests of the GPU benchmarks: those of the yardstick's bench_vllm.py, number for number."""

from __future__ import annotations

import random
from dataclasses import dataclass

SEED = 1234
DECODE_LENGTHS = (1, 33, 129, 161)
"""Output tokens of the runs whose differences are the step time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Requests that are sent all at once."""

    prompt_lengths: tuple[int, ...]
    output_lengths: tuple[int, ...]

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(self.prompt_lengths)

    @property
    def output_tokens(self) -> int:
        """Of all answers."""
        return sum(self.output_lengths)


def mixed_load(num_requests: int, *, seed: int = SEED, scale: int = 1) -> Load:
    """Prompts of 64 to 1,024 tokens and outputs of 64 to 512, uniform; `scale` divides both, for dry runs."""
    rng = random.Random(seed + 1)
    prompts = [rng.randint(64, 1024) for _ in range(num_requests)]
    outputs = [rng.randint(64, 512) for _ in range(num_requests)]
    return Load(
        prompt_lengths=tuple(max(1, length // scale) for length in prompts),
        output_lengths=tuple(max(1, length // scale) for length in outputs),
    )


def fixed_load(num_requests: int, prompt_length: int, output_length: int) -> Load:
    """Equal requests."""
    return Load(
        prompt_lengths=(prompt_length,) * num_requests, output_lengths=(output_length,) * num_requests
    )


def random_prompt(rng: random.Random, length: int, vocab_size: int) -> list[int]:
    """Token ids as the yardstick draws them."""
    return [rng.randrange(10, vocab_size - 10) for _ in range(length)]


def steady_step_ms(seconds: dict[int, float]) -> float:
    """(T(161) - T(33)) / 128: both runs hold the whole ramp up and down, so 128 steps at full batch remain."""
    return (seconds[161] - seconds[33]) / 128 * 1e3
