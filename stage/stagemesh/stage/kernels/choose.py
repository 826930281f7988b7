"""The choice of a token a row by the Gumbel-max trick (sampling/sampler.py), on the device and in two passes.

A row's candidates compete as int64 keys: the score's bits, made to order as integers, above the bitwise
inverse of the token id, so that the greatest key is the best score and among equals the lowest id. Keys of
ranks that share a vocabulary compete the same way, by one all-reduce.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 2048

_GAMMA = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64))
_MIX_2 = tl.constexpr(0x94D049BB133111EB - (1 << 64))
_LOWEST = tl.constexpr(-(1 << 63))


@triton.jit
def _mix(x):
    # SplitMix64's finalizer, as in sampling/noise.py: shifts are made logical with a mask.
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _score_part(
    logits, temperatures, seeds, positions, keys, vocab_begin, vocab_size, num_parts, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    at = part * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocab_size
    score = tl.load(logits + row * vocab_size + at, mask=inside, other=float("-inf")).to(tl.float32)
    ids = (at + vocab_begin).to(tl.int64)
    temperature = tl.load(temperatures + row)
    if temperature > 0:
        seed = tl.load(seeds + row)
        position = tl.load(positions + row).to(tl.int64)
        bits = _mix(_mix(seed + _GAMMA * (position + 1)) + _GAMMA * (ids + 1))
        uniform = (((bits >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float64) + 0.5) * 1.1102230246251565e-16
        noise = -tl.log(-tl.log(uniform))
        score = tl.div_rn(score, temperature + tl.zeros_like(score)) + noise.to(tl.float32)
    score = tl.where(score == score, score, float("-inf")) + 0.0
    whole = score.to(tl.int32, bitcast=True)
    ordered = whole ^ ((whole >> 31) & 0x7FFFFFFF)
    key = (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - ids)
    key = tl.where(inside, key, _LOWEST)
    tl.store(keys + row * num_parts + part, tl.max(key, axis=0))


@triton.jit
def _best_part(parts, keys, num_parts, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    key = tl.load(parts + row * num_parts + at, mask=at < num_parts, other=_LOWEST)
    tl.store(keys + row, tl.max(key, axis=0))


@triton.jit
def _take(keys, slots, tokens, slot_tokens, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    key = tl.load(keys + at, mask=inside, other=0)
    token = (0xFFFFFFFF - (key & 0xFFFFFFFF)).to(tl.int32)
    tl.store(tokens + at, token, mask=inside)
    slot = tl.load(slots + at, mask=inside, other=0)
    tl.store(slot_tokens + slot, token, mask=inside)


def num_parts(vocab_size: int) -> int:
    """Parts that `best_keys` scores a row in."""
    return int(triton.cdiv(vocab_size, BLOCK))


def best_keys(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    vocab_begin: int,
    parts: torch.Tensor,
    keys: torch.Tensor,
) -> None:
    """keys[s] = the key of the best token of row s in this rank's vocabulary.

    Args:
        logits: [S, vocab part], contiguous.
        temperatures: float32 [S]; 0 is greedy.
        seeds: int64 [S], the bits of each request's seed.
        positions: int32 [S], position of the token to sample.
        vocab_begin: Where the part begins in the whole vocabulary.
        parts: int64 [at least S * num_parts], scratch.
        keys: int64 [S].
    """
    rows, vocab_size = logits.shape
    count = num_parts(vocab_size)
    _score_part[(rows, count)](
        logits,
        temperatures,
        seeds,
        positions,
        parts,
        vocab_begin,
        vocab_size,
        count,
        BLOCK=BLOCK,
        num_warps=4,
    )
    _best_part[(rows,)](parts, keys, count, BLOCK=triton.next_power_of_2(count), num_warps=1)


def take_tokens(
    keys: torch.Tensor, slots: torch.Tensor, tokens: torch.Tensor, slot_tokens: torch.Tensor
) -> None:
    """tokens[s] = slot_tokens[slots[s]] = the token of keys[s]; int32 but the keys."""
    count = keys.shape[0]
    _take[(triton.cdiv(count, 128),)](keys, slots, tokens, slot_tokens, count, BLOCK=128, num_warps=1)
