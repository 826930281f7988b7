"""What a client assumes when it is told nothing.

The addresses are the router's, whose settings cannot be read without pydantic; a test holds the two equal.
"""

from __future__ import annotations

from typing import Final

DEFAULT_ADDRESS: Final = "127.0.0.1:50051"
DEFAULT_ADMIN_ADDRESS: Final = "127.0.0.1:50052"
DEFAULT_TIMEOUT_S: Final = 600.0
