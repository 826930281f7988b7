"""Sampling on the last stage: counter-based noise and the choice of a token."""
