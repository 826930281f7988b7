"""What router and API workers say to each other: frames over a Unix socket pair.

A frame is its length (u32, of what follows), a kind (one byte) and the content. It is a private protocol of one
version between a router and the children it started; nothing else may speak it. Numbers are little-endian.
"""

from __future__ import annotations

import enum
import struct

import numpy as np

from stagemesh.router.api.backend import Column, End
from stagemesh.router.scheduler import Finish, Request, Sampling
from stagemesh.wire.columns import U32, pack

FINISHES = (Finish.STOP, Finish.LENGTH, Finish.ABORT)


class Kind(enum.IntEnum):
    """Of a frame; the first group goes to the worker, the second to the router."""

    DELTAS = 1
    """A step's tokens and ends: `pack_deltas`."""
    FAILED = 2
    """handle (u32), then a serialized google.rpc.Status."""
    SERVING = 3
    """One byte: whether the mesh takes requests."""
    ABORTED = 4
    """Number of the ABORT it answers (u32), then one byte: whether there was such a request."""
    PING = 5
    """Number (u32)."""
    STOP = 6
    """Leave in good order."""

    READY = 16
    """The worker listens."""
    CANNOT_START = 17
    """Why, as text."""
    SUBMIT = 18
    """`pack_submit`."""
    ABANDON = 19
    """handle (u32)."""
    REFUSED = 20
    """A request was refused in the worker; the gRPC status code's name."""
    ABORT = 21
    """Number (u32), then the request's id."""
    PONG = 22
    """Number of the ping (u32)."""


NUMBER = struct.Struct("<I")
HEADER = struct.Struct("<IB")
_END = np.dtype([("handle", "<u4"), ("num_cached", "<u4"), ("finish", "<u1")])
_SUBMIT = struct.Struct("<II?fIfQdd?iHHI")


def frame(kind: Kind, content: bytes = b"") -> bytes:
    """A frame as bytes."""
    return HEADER.pack(1 + len(content), kind) + content


def pack_deltas(handles: Column, token_ids: Column, ends: list[End]) -> bytes:
    """A step's rows as columns, then a record for each end."""
    columns = NUMBER.pack(len(handles)) + pack(handles, U32) + pack(token_ids, U32)
    if not ends:
        return columns
    records = [(end.handle, end.num_cached, FINISHES.index(end.finish)) for end in ends]
    return columns + np.array(records, _END).tobytes()


def unpack_deltas(content: bytes) -> tuple[Column, Column, list[End]]:
    """What `pack_deltas` packed."""
    (rows,) = NUMBER.unpack_from(content)
    columns = np.frombuffer(content, U32, 2 * rows, NUMBER.size)
    ends: list[End] = []
    if len(content) > NUMBER.size + columns.nbytes:
        records = np.frombuffer(content, _END, offset=NUMBER.size + columns.nbytes).tolist()
        ends = [End(handle, FINISHES[finish], num_cached) for handle, num_cached, finish in records]
    return columns[:rows], columns[rows:], ends


def pack_submit(handle: int, request: Request, arrived: float) -> bytes:
    """A checked request that came at `arrived`, in monotonic seconds: the clock is the host's, and so both sides
    mean the same. Its end tokens travel as "the model's" or "none"."""
    sampling = request.sampling
    request_id, trace = request.request_id.encode(), request.trace
    head = _SUBMIT.pack(
        handle,
        request.max_tokens,
        request.open_ended,
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.seed,
        arrived,
        request.deadline,
        bool(request.end_token_ids),
        request.priority,
        len(request_id),
        len(trace),
        len(request.prompt),
    )
    return head + request_id + trace + pack(request.prompt, U32)


def unpack_submit(content: bytes, end_token_ids: frozenset[int]) -> tuple[int, Request, float]:
    """What `pack_submit` packed: handle, request and time of arrival; `end_token_ids` are the model's."""
    (
        handle,
        max_tokens,
        open_ended,
        temperature,
        top_k,
        top_p,
        seed,
        arrived,
        deadline,
        has_end,
        priority,
        id_bytes,
        trace_bytes,
        num_prompt,
    ) = _SUBMIT.unpack_from(content)
    id_ends = _SUBMIT.size + id_bytes
    trace_ends = id_ends + trace_bytes
    request = Request(
        request_id=content[_SUBMIT.size : id_ends].decode(),
        prompt=np.frombuffer(content, U32, num_prompt, trace_ends),
        max_tokens=max_tokens,
        open_ended=open_ended,
        sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed),
        end_token_ids=end_token_ids if has_end else frozenset(),
        priority=priority,
        deadline=deadline,
        trace=content[id_ends:trace_ends],
    )
    return handle, request, arrived
