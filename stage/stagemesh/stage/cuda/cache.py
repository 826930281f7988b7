"""KV memory and block tables on the device."""

from __future__ import annotations

import torch


class DeviceCache:
    """Paged keys and values of a rank's layers, and the table of every slot.

    Args:
        device: Where.
        num_layers: Layers of this stage.
        num_blocks: KV blocks; one more is kept as scratch for padding.
        block_size: Tokens of a block.
        num_kv_heads: Of this rank.
        head_dim: Width of a head.
        dtype: Of keys and values.
        max_slots: Slots of a lane at most.
        max_blocks: Blocks of a slot at most.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        max_slots: int,
        max_blocks: int,
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        shape = (num_layers, 2, num_blocks + 1, block_size, num_kv_heads, head_dim)
        # Zeros, once: attention masks what nobody wrote, but a NaN there it would not.
        self.pages = torch.zeros(shape, dtype=dtype, device=device)
        self.cells = self.pages.flatten(2, 3)
        # A scratch slot after those of the lane.
        self.tables = torch.zeros(max_slots + 1, max_blocks, dtype=torch.int32, device=device)
        self.slot_tokens = torch.zeros(max_slots + 1, dtype=torch.int32, device=device)

    @property
    def num_bytes(self) -> int:
        """Of keys and values."""
        return self.pages.nbytes

    @property
    def scratch_cell(self) -> int:
        """Where padding writes."""
        return self.num_blocks * self.block_size

    @property
    def scratch_slot(self) -> int:
        """Whose token padding samples."""
        return self.slot_tokens.shape[0] - 1
