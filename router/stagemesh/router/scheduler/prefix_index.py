"""Which KV block holds which prefix.

A block is known by the digest of its tokens and of the block before it, so that equal digests mean equal
prefixes from the first token on. Only full blocks are known.
"""

from __future__ import annotations

from collections.abc import KeysView
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

DIGEST_BYTES = 16
Tokens = npt.NDArray[np.uint32]


def block_keys(parent: bytes, tokens: Tokens, block_size: int) -> list[bytes]:
    """The key of each full block of `tokens`, which follow the block with key `parent` (b"" for none)."""
    keys, data, size = [], tokens.tobytes(), block_size * tokens.itemsize
    for begin in range(0, len(data) - size + 1, size):
        # A first block has no parent, so what it hashes is shorter than that of any other.
        parent = blake2b(parent + data[begin : begin + size], digest_size=DIGEST_BYTES).digest()
        keys.append(parent)
    return keys


class PrefixIndex:
    """Keys of blocks to the blocks, and back."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def blocks(self) -> KeysView[int]:
        """Every block whose prefix is known."""
        return self._key_of.keys()

    def match(self, tokens: Tokens, keys: list[bytes]) -> list[int]:
        """Blocks that hold the longest known prefix. It ends before the last token, which is always computed: it
        gives the first logits, and a shared block is never written.

        Args:
            tokens: Of a prompt.
            keys: Of its first blocks, from an earlier look; those that this one had to work out are added.
        """
        blocks: list[int] = []
        for index in range((len(tokens) - 1) // self._block_size):
            if index == len(keys):
                begin = index * self._block_size
                unknown = tokens[begin : begin + self._block_size]
                keys += block_keys(keys[-1] if keys else b"", unknown, self._block_size)
            block = self._block_of.get(keys[index])
            if block is None:
                break
            blocks.append(block)
        return blocks

    def publish(self, keys: list[bytes], blocks: list[int]) -> None:
        """From the next step on others may share the blocks. The first to publish a prefix keeps it."""
        for key, block in zip(keys, blocks, strict=True):
            if key not in self._block_of and block not in self._key_of:
                self._block_of[key] = block
                self._key_of[block] = key

    def forget(self, block: int) -> None:
        """The block will hold something else."""
        del self._block_of[self._key_of.pop(block)]
