"""The one exception tree of stagemesh.

    StagemeshError
    ├── InvalidArgumentError      a bad field of a request          INVALID_ARGUMENT
    ├── FailedPreconditionError   the mesh is not made for this     FAILED_PRECONDITION
    │   └── ChainError            stages that do not fit together
    ├── UnimplementedError        a known option, not built         UNIMPLEMENTED
    ├── UnavailableError          no lane now; try again            UNAVAILABLE
    │   └── StageLostError        a stage went away
    ├── ResourceExhaustedError    a queue or limit is full          RESOURCE_EXHAUSTED
    ├── DeadlineExceededError                                       DEADLINE_EXCEEDED
    ├── CancelledError                                              CANCELLED
    ├── NotFoundError             no such request                   NOT_FOUND
    ├── InternalError             a bug                             INTERNAL
    └── StartupError              a process cannot start; never on the wire
        ├── ConfigError           a flag, variable or mesh.yaml key
        └── ModelError            a model file that cannot be served

`stagemesh.wire.status` maps it to and from gRPC, and nothing else does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import grpc

DOMAIN = "stagemesh"


class StagemeshError(Exception):
    """Base of every error stagemesh raises on purpose.

    Args:
        message: One line: which value, what was expected, what to do.
        reason: UPPER_SNAKE_CASE; the key of docs/errors.md and of google.rpc.ErrorInfo.
        field: Path of the request field at fault.
        request_id: The request that failed.
        stage: Name or address of the stage at fault.
        retry_after_s: Seconds after which trying again can help.
        metadata: Further values, for ErrorInfo.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        field: str = "",
        request_id: str = "",
        stage: str = "",
        retry_after_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.code.name
        self.field = field
        self.request_id = request_id
        self.stage = stage
        self.retry_after_s = retry_after_s
        self.metadata = dict(metadata or {})

    def of_request(self, request_id: str) -> Self:
        """The same error for one of the requests it ends: each carries its own id."""
        return type(self)(
            self.message,
            reason=self.reason,
            field=self.field,
            request_id=request_id,
            stage=self.stage,
            retry_after_s=self.retry_after_s,
            metadata=self.metadata,
        )

    def __str__(self) -> str:
        return f"{self.message} (request {self.request_id})" if self.request_id else self.message


class InvalidArgumentError(StagemeshError):
    """A field of the request is out of range or does not parse."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class FailedPreconditionError(StagemeshError):
    """The request is well formed, but this mesh cannot serve it as it stands."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class ChainError(FailedPreconditionError):
    """The stages do not make a lane: a hole, an overlap, another model, dtype, block size or protocol."""


class UnimplementedError(StagemeshError):
    """A known option that is not built; never ignored silently."""

    code = grpc.StatusCode.UNIMPLEMENTED


class UnavailableError(StagemeshError):
    """No lane can take the request now."""

    code = grpc.StatusCode.UNAVAILABLE
    retryable = True


class StageLostError(UnavailableError):
    """A stage of the lane went away while it served the request; `stage` names it."""


class ResourceExhaustedError(StagemeshError):
    """A bounded queue or a limit is full."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    retryable = True


class DeadlineExceededError(StagemeshError):
    """The deadline passed first."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class CancelledError(StagemeshError):
    """The call was cancelled."""

    code = grpc.StatusCode.CANCELLED


class NotFoundError(StagemeshError):
    """Nothing goes by that name."""

    code = grpc.StatusCode.NOT_FOUND


class InternalError(StagemeshError):
    """A bug in stagemesh."""

    code = grpc.StatusCode.INTERNAL


class StartupError(StagemeshError):
    """A process cannot start; the command prints the one line and exits."""


class ConfigError(StartupError):
    """A flag, an environment variable or a key of mesh.yaml is wrong; the message names it."""


class ModelError(StartupError):
    """A model file is missing, damaged or of a kind that is not supported."""
