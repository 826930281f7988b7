"""Models in the local Hugging Face cache. Nothing here goes to the network."""

from __future__ import annotations

import re
from pathlib import Path

from stagemesh.wire.errors import ModelError


def is_hub_name(text: str) -> bool:
    """Whether it reads as ORG/NAME."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text) is not None and not text.endswith(
        ".gguf"
    )


def find_in_hub_cache(name: str) -> Path:
    """The folder of ORG/NAME's cached snapshot.

    Raises:
        ModelError: Not cached, or huggingface_hub is not installed; the message says how to fetch it.
    """
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError as error:
        raise ModelError(
            f"model {name} is not a path, and huggingface_hub is not installed to look it up: "
            f"pip install huggingface_hub && hf download {name}"
        ) from error
    try:
        config = try_to_load_from_cache(name, "config.json")
    except ValueError as error:
        raise ModelError(f"model {name} is neither a path nor a name of the hub: {error}") from error
    if not isinstance(config, str):
        raise ModelError(
            f"model {name} is neither a path nor in the local hub cache; fetch it: hf download {name}"
        )
    return Path(config).parent
