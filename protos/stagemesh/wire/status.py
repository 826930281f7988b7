"""Errors to gRPC statuses with google.rpc details, and back. The only place that maps them."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from stagemesh.wire import errors
from stagemesh.wire.errors import DOMAIN, StagemeshError

MAX_TEXT_BYTES = 1_000
"""Of a message and of a value of ErrorInfo. A status travels in trailers, of which gRPC takes 16 KiB and no more:
what quotes something that long would not arrive at all."""
_BY_CODE: dict[grpc.StatusCode, type[StagemeshError]] = {
    kind.code: kind
    for kind in (
        errors.InvalidArgumentError,
        errors.FailedPreconditionError,
        errors.UnimplementedError,
        errors.UnavailableError,
        errors.ResourceExhaustedError,
        errors.DeadlineExceededError,
        errors.CancelledError,
        errors.NotFoundError,
        errors.InternalError,
    )
}
_BY_REASON: dict[str, type[StagemeshError]] = {
    "STAGE_LOST": errors.StageLostError,
    "CHAIN_REFUSED": errors.ChainError,
}


def to_proto(error: StagemeshError) -> status_pb2.Status:
    """The google.rpc.Status of an error, with ErrorInfo and, where they apply, BadRequest and RetryInfo."""
    message = _clipped(error.message)
    metadata = {key: _clipped(value) for key, value in error.metadata.items()}
    if error.request_id:
        metadata["request_id"] = _clipped(error.request_id)
    if error.stage:
        metadata["stage"] = _clipped(error.stage)
    details: list[any_pb2.Any] = [
        _pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata))
    ]
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=message, reason=error.reason
        )
        details.append(_pack(error_details_pb2.BadRequest(field_violations=[violation])))
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        details.append(_pack(retry))
    code = code_pb2.Code.Value(error.code.name)
    return status_pb2.Status(code=code, message=message, details=details)


def to_grpc(error: StagemeshError) -> grpc.Status:
    """The status to end an RPC with: `await context.abort_with_status(to_grpc(error))`."""
    return rpc_status.to_status(to_proto(error))


def from_proto(status: status_pb2.Status, request_id: str = "") -> StagemeshError:
    """The error a google.rpc.Status stands for."""
    reason, stage, field = "", "", ""
    metadata: dict[str, str] = {}
    retry_after_s: float | None = None
    for detail in status.details:
        info, bad, retry = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
        )
        if detail.Unpack(info):
            reason, metadata = info.reason, dict(info.metadata)
            stage = metadata.pop("stage", "")
            request_id = metadata.pop("request_id", "") or request_id
        elif detail.Unpack(bad) and bad.field_violations:
            field = bad.field_violations[0].field
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    code = _code(status.code)
    kind = _BY_REASON.get(reason) or _BY_CODE.get(code, errors.InternalError)
    return kind(
        status.message,
        reason=reason,
        field=field,
        request_id=request_id,
        stage=stage,
        retry_after_s=retry_after_s,
        metadata=metadata,
    )


def from_rpc_error(error: grpc.RpcError, request_id: str = "") -> StagemeshError:
    """The error behind a failed call, with or without details."""
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # details that contradict the status: trust the status
        status = None
    if status is None:
        code = error.code()
        status = status_pb2.Status(code=code.value[0], message=error.details() or code.name)
    return from_proto(status, request_id)


def _clipped(text: str) -> str:
    """At most MAX_TEXT_BYTES of it, and nothing that UTF-8 cannot say."""
    data = text.encode(errors="replace")
    if len(data) <= MAX_TEXT_BYTES:
        return data.decode()
    return data[:MAX_TEXT_BYTES].decode(errors="ignore") + "…"


def _code(number: int) -> grpc.StatusCode:
    return next((code for code in grpc.StatusCode if code.value[0] == number), grpc.StatusCode.UNKNOWN)


def _pack(
    message: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo,
) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
