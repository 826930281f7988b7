"""The Python client of a stagemesh mesh.

    from stagemesh.client import Client

    with Client("127.0.0.1:50051") as client:
        for chunk in client.generate("The capital of France is", max_tokens=16, temperature=0):
            print(chunk.text, end="", flush=True)

Every error is a StagemeshError; the tree is drawn in stagemesh.wire.errors.
"""

from stagemesh.client._async_client import AsyncClient
from stagemesh.client._async_stream import AsyncTokenStream
from stagemesh.client._client import Client
from stagemesh.client._many_stream import AsyncManyStream, ManyStream
from stagemesh.client._request import Message, Prompt, RequestOptions, RequestSpec
from stagemesh.client._stream import TokenStream
from stagemesh.client._types import Chunk, Completion, FinishReason, ModelInfo, Usage
from stagemesh.wire.errors import (
    CancelledError,
    ChainError,
    ConfigError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    ModelError,
    NotFoundError,
    ResourceExhaustedError,
    StageLostError,
    StagemeshError,
    StartupError,
    UnavailableError,
    UnimplementedError,
)

__all__ = [
    "AsyncClient",
    "AsyncManyStream",
    "AsyncTokenStream",
    "CancelledError",
    "ChainError",
    "Chunk",
    "Client",
    "Completion",
    "ConfigError",
    "DeadlineExceededError",
    "FailedPreconditionError",
    "FinishReason",
    "InternalError",
    "InvalidArgumentError",
    "ManyStream",
    "Message",
    "ModelError",
    "ModelInfo",
    "NotFoundError",
    "Prompt",
    "RequestOptions",
    "RequestSpec",
    "ResourceExhaustedError",
    "StageLostError",
    "StagemeshError",
    "StartupError",
    "TokenStream",
    "UnavailableError",
    "UnimplementedError",
    "Usage",
]
