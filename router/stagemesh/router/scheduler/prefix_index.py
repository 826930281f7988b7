"""Which KV block holds which prefix.

A block is known by the digest of its tokens and of the block before it, so that equal digests mean equal
prefixes from the first token on. Only full blocks are known.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import numpy.typing as npt

DIGEST_BYTES = 16
Tokens = npt.NDArray[np.uint32]


def block_key(parent: bytes, tokens: Tokens) -> bytes:
    """The key of a full block of `tokens` that follows the block with key `parent` (b"" for the first)."""
    return blake2b(tokens.tobytes(), digest_size=DIGEST_BYTES, key=parent).digest()


class PrefixIndex:
    """Keys of blocks to the blocks, and back."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._key_of

    def match(self, tokens: Tokens) -> tuple[list[int], list[bytes]]:
        """Blocks that hold the longest known prefix, and their keys. It ends before the last token, which is
        always computed: it gives the first logits, and a shared block is never written."""
        blocks: list[int] = []
        keys: list[bytes] = []
        parent = b""
        for begin in range(0, len(tokens) - self._block_size, self._block_size):
            parent = block_key(parent, tokens[begin : begin + self._block_size])
            block = self._block_of.get(parent)
            if block is None:
                break
            blocks.append(block)
            keys.append(parent)
        return blocks, keys

    def publish(self, key: bytes, block: int) -> None:
        """From the next step on others may share the block. The first to publish a prefix keeps it."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def forget(self, block: int) -> None:
        """The block will hold something else."""
        del self._block_of[self._key_of.pop(block)]
