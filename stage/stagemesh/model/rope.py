"""Rotary position embedding: its scaling kinds and the frequencies they give."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRopeScaling:
    """Positions divided by a factor."""

    factor: float
    """How many times longer the context is than the one trained with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3RopeScaling:
    """Llama 3.1's: long wavelengths are stretched, short ones kept, a ramp between."""

    factor: float
    """Stretch of the long wavelengths."""
    low_freq_factor: float
    """Wavelengths above original_max_position / low_freq_factor tokens are stretched in full."""
    high_freq_factor: float
    """Wavelengths below original_max_position / high_freq_factor tokens are kept."""
    original_max_position: int
    """Context the model was first trained with, in tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorRopeScaling:
    """A divisor per frequency: GGUF's rope_freqs.weight, which is how it stores Llama 3.1's scaling."""

    factors: tuple[float, ...]
    """head_dim / 2 divisors."""


RopeScaling = LinearRopeScaling | Llama3RopeScaling | FactorRopeScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding of the half-rotation (Hugging Face) layout."""

    theta: float = 10000.0
    """Base of the wavelengths."""
    scaling: RopeScaling | None = None
    """None: frequencies as trained."""

    def inverse_frequencies(self, head_dim: int) -> NDArray[np.float32]:
        """Radians per position, [head_dim / 2], scaled. Element i turns dimensions i and i + head_dim / 2.

        In float32 like transformers, so that angles at long positions agree with it.
        """
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        powers: NDArray[np.float32] = np.power(np.full_like(exponents, self.theta), exponents)
        frequencies = np.reciprocal(powers)
        match self.scaling:
            case LinearRopeScaling(factor=factor):
                return np.divide(frequencies, np.float32(factor), dtype=np.float32)
            case FactorRopeScaling(factors=factors):
                return np.divide(frequencies, np.asarray(factors, dtype=np.float32))
            case Llama3RopeScaling() as scaling:
                return _llama3(frequencies, scaling)
            case None:
                return frequencies


def _llama3(frequencies: NDArray[np.float32], scaling: Llama3RopeScaling) -> NDArray[np.float32]:
    wavelengths = np.float32(2 * math.pi) / frequencies
    turns = np.float32(scaling.original_max_position) / wavelengths
    width = scaling.high_freq_factor - scaling.low_freq_factor
    kept = np.clip((turns - scaling.low_freq_factor) / np.float32(width), 0.0, 1.0)
    scaled: NDArray[np.float32] = (1.0 - kept) * frequencies / np.float32(scaling.factor) + kept * frequencies
    return scaled.astype(np.float32)
