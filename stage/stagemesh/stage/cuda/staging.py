"""Pinned host memory D deep: what the host writes for a step must stay until the device has read it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from stagemesh.stage.cuda.device import Device, Event
from stagemesh.wire.errors import StageLostError

POLL_S = 50e-6


@dataclass(slots=True)
class StagingSlot:
    """One step's host memory and events."""

    columns: torch.Tensor
    """int32, pinned."""
    numbers: npt.NDArray[np.int32]
    """The same memory."""
    plans: tuple[torch.Tensor, torch.Tensor]
    """uint8, pinned: where attention plans decode and prefill."""
    tokens: torch.Tensor
    """int32, pinned: sampled tokens on their way back."""
    begun: Event
    """The device started on the step: its inputs were there."""
    awaited: Event
    """It began to wait for them."""
    ended: Event
    """Everything the step leaves for the host is in host memory."""
    in_use: bool = False
    """From its step's launch until its result has been read."""
    hidden: torch.Tensor | None = None
    """uint8, pinned: activations that travel through the host, made when the first does."""


class Staging:
    """As many slots as steps may be unanswered, taken in turn.

    Args:
        device: Where the steps run.
        depth: Slots.
        columns: int32 numbers of a slot.
        plan_bytes: Of each of its two plans.
        samples: Tokens of a slot.
        timeout_s: How long `take` waits at most.
    """

    def __init__(
        self, device: Device, depth: int, *, columns: int, plan_bytes: int, samples: int, timeout_s: float
    ) -> None:
        self._device = device
        self._timeout_s = timeout_s
        self._next = 0
        self._slots = [self._make(columns, plan_bytes, samples) for _ in range(depth)]

    @property
    def depth(self) -> int:
        """Slots."""
        return len(self._slots)

    def take(self) -> tuple[int, StagingSlot]:
        """The next slot and its index.

        The router has had the answer of the step that used it last, so it is free; were it not, waiting here
        would be waiting for an earlier step. StageLostError past the deadline.
        """
        index, slot = self._next, self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        deadline = time.monotonic() + self._timeout_s
        while slot.in_use:
            if time.monotonic() > deadline:
                raise StageLostError(
                    f"a step is not done on the device after {self._timeout_s:g} s", reason="DEVICE_HANGS"
                )
            time.sleep(POLL_S)
        slot.in_use = True
        return index, slot

    def hidden_bytes(self, slot: StagingSlot, size: int) -> torch.Tensor:
        """Pinned bytes for the slot's activations."""
        if slot.hidden is None or slot.hidden.shape[0] < size:
            slot.hidden = self._device.pinned(size, torch.uint8)
        return slot.hidden[:size]

    def _make(self, columns: int, plan_bytes: int, samples: int) -> StagingSlot:
        memory = self._device.pinned(columns, torch.int32)
        return StagingSlot(
            columns=memory,
            numbers=memory.numpy(),
            plans=(
                self._device.pinned(plan_bytes, torch.uint8),
                self._device.pinned(plan_bytes, torch.uint8),
            ),
            tokens=self._device.pinned(samples, torch.int32),
            begun=self._device.event(),
            awaited=self._device.event(),
            ended=self._device.event(),
        )
