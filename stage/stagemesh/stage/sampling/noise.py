"""Random numbers that depend on nothing but (request seed, position, token id).

The mixing function is SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators,
OOPSLA 2014) applied to a counter, so that a request draws the same numbers on any layout, in any batch
and on a retry. Torch has no unsigned 64-bit arithmetic: products wrap in int64, which is the same
modulo 2**64, and right shifts are made logical with a mask.
"""

from __future__ import annotations

import torch

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer, elementwise on int64."""
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)


def gumbel(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float32 [S, V].

    Args:
        seeds: int64 [S], the bits of each request's seed.
        positions: int64 [S], position of the token to sample.
        token_ids: int64 [V] or [S, V], ids in the whole vocabulary (a rank passes its shard's).
    """
    keys = mix(seeds + _signed(_GAMMA) * (positions + 1))
    bits = mix(keys.unsqueeze(-1) + _signed(_GAMMA) * (token_ids + 1))
    # 53 random bits, centred in their cell: strictly between 0 and 1, so both logarithms are finite.
    uniform = (_shift_right(bits, 11).to(torch.float64) + 0.5) * 2.0**-53
    return uniform.log_().neg_().log_().neg_().to(torch.float32)
