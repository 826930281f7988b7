"""Links of a rank's own: activations to the next stage and tokens on the ring, from device to device.

A link is one small communicator for each pair of ranks, so that a stage comes and goes without the others.
The rank of the receiving side that a sender serves is r mod its group's size; each receiver gets everything.
Sends run on streams of their own, ordered by events behind what they send; the ring has communicators of its own, so that
tokens never queue behind activations (rules 8 to 12 in docs/architecture.md). Receives run on the compute stream,
which has nothing to do before they are there: a receive that spins beside a step's kernels keeps a multiprocessor
from them, and a kernel that is loaded then waits for it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stagemesh.stage.cuda.device import Device, Event, Stream
from stagemesh.stage.engine.batch import Batch
from stagemesh.stage.engine.interface import NoLinks
from stagemesh.stage.link_name import link_name
from stagemesh.stage.memory import LINK_DEPTH
from stagemesh.v1 import stage_pb2
from stagemesh.wire.errors import StageLostError

log = logging.getLogger(__name__)

ACTIVATIONS = stage_pb2.LINK_KIND_ACTIVATIONS
RING = stage_pb2.LINK_KIND_RING
SENDER, RECEIVER = 0, 1
"""Ranks within the communicator of a link."""
DUMMY = 1024
"""Numbers exchanged both ways before a link is open: NCCL connects lazily."""
ABORT_TIMEOUT_S = 15.0
ABORT_HANGS = 4
"""Exit code of a worker that cannot break off a link; the leader replaces the group."""


class DeviceLinks(NoLinks):
    """No links but those through the leader: every answer is no, so that the engine asks for no tensor."""

    def open(self, lane: stage_pb2.OpenLaneRequest, depth: int) -> None:
        """A new epoch with buffers of that depth."""

    def send_buffer(self, count: int) -> torch.Tensor:
        """[count, hidden] to write activations to, on the compute stream."""
        raise NotImplementedError("activations go through the leader: sends_hidden is False")

    def send_hidden(self, hidden: torch.Tensor, done: Event) -> int:
        """Send what was written to the buffer before `done`; returns its bytes."""
        raise NotImplementedError("activations go through the leader: sends_hidden is False")

    def receive_hidden(self, into: torch.Tensor) -> None:
        """Receive activations on the compute stream."""
        raise NotImplementedError("activations come through the leader: receives_hidden is False")

    def send_ring(self, index: int, tokens: torch.Tensor) -> None:
        """Send int32 tokens [S], if this stage sends on the ring."""

    def expect_ring(self, batch: Batch) -> None:
        """The step was launched here: its tokens will come round."""

    def await_ring(self, batch: Batch) -> None:
        """Receive the tokens that the step takes."""


@dataclass(slots=True)
class _Link:
    """One end of a link: a communicator for each peer rank."""

    comms: list[Any]
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Enqueue and abort share it: an abort frees the communicator under a send (rule 12)."""
    broken: bool = False
    error: Exception | None = None
    """Why NCCL takes nothing more."""

    def each(self, enqueue: Callable[[Any], None]) -> None:
        """Enqueue on every communicator; nothing on a link that was broken off.

        An error is kept and not raised: the step is launched to its end, or the other ranks of the stage would wait in sums
        that this one never joins (rule 4).
        """
        with self.lock:
            if self.broken or self.error:
                return
            try:
                for comm in self.comms:
                    enqueue(comm)
            except Exception as error:  # noqa: BLE001 - cupy knows not every status of NCCL by name
                self.error = error

    def check(self) -> None:
        """Raises what NCCL found meanwhile. Not where the launch thread is inside NCCL: it will find out itself."""
        if self.lock.acquire(timeout=0.1):
            try:
                for comm in [] if self.broken else self.comms:
                    comm.check_async_error()
            finally:
                self.lock.release()

    def abort(self) -> None:
        # Without the lock only where the launch thread is stuck inside NCCL with it.
        locked = self.lock.acquire(timeout=1.0)
        try:
            if not self.broken:
                self.broken = True
                for comm in self.comms:
                    comm.abort()
        finally:
            if locked:
                self.lock.release()


_NO_LINK = _Link([])


class NcclLinks(DeviceLinks):
    """Over cupy's NCCL.

    Args:
        device: Of the rank.
        stream: Its compute stream.
        rank: In its group.
        size: Of its group.
        hidden: Width of activations.
        dtype: Of activations.
        max_tokens: Positions of a step at most.
        slot_tokens: int32 [slots], where tokens from the ring go.
        max_samples: Sampled rows of a step at most.
    """

    def __init__(
        self,
        device: Device,
        stream: Stream,
        *,
        rank: int,
        size: int,
        hidden: int,
        dtype: torch.dtype,
        max_tokens: int,
        max_samples: int,
        slot_tokens: torch.Tensor,
    ) -> None:
        from cupy.cuda import nccl

        self._nccl = nccl
        self._types = {
            torch.bfloat16: nccl.NCCL_BFLOAT16,
            torch.float16: nccl.NCCL_FLOAT16,
            torch.float32: nccl.NCCL_FLOAT32,
            torch.int32: nccl.NCCL_INT32,
        }
        self._device = device
        self._compute = stream
        self._send = device.stream(high_priority=True)
        self._ring = device.stream(high_priority=True)
        self._opening = device.stream(high_priority=True)
        self._rank, self._size = rank, size
        self._hidden, self._dtype = hidden, dtype
        self._max_tokens, self._max_samples = max_tokens, max_samples
        self._slot_tokens = slot_tokens
        self._links: dict[tuple[int, bool], _Link] = {}
        self._depth = 0
        self._num_sent = 0
        self._num_expected = 0
        self._expected: deque[tuple[int, torch.Tensor]] = deque()
        """(step, int64 [S] slots) whose tokens have not been received."""
        self._unanswered = 0
        self._buffers: dict[str, torch.Tensor] = {}
        self._sent: dict[str, list[Event | None]] = {}
        self._abort_lock = threading.Lock()
        self._aborts: list[threading.Thread] = []
        self._opens = threading.Condition()
        self._joining = 0
        self._turns: list[tuple[bool, bool]] = []
        self._epoch = 0
        # Its kernel is loaded now: while a receive waits on the device, loading one could wait for it (rule 9).
        with torch.inference_mode():
            first = torch.zeros(1, dtype=torch.int64, device=device.torch_device)
            slot_tokens.index_copy_(0, first, slot_tokens[:1].clone())

    def open(self, lane: stage_pb2.OpenLaneRequest, depth: int) -> None:
        self._epoch = lane.epoch
        self._unanswered = lane.depth
        self._expected.clear()
        self._num_expected = 0
        self._depth = depth
        self._sent = {"hidden": [None] * min(depth, LINK_DEPTH), "tokens": [None] * depth}
        self._num_sent = 0
        if lane.num_stages == 1:
            return
        device, samples = self._device.torch_device, self._max_samples
        if lane.stage_index < lane.num_stages - 1:
            self._keep(
                "hidden", len(self._sent["hidden"]), self._max_tokens * self._hidden, self._dtype, device
            )
        else:
            self._keep("tokens", depth, samples, torch.int32, device)
        if lane.stage_index == 0:
            self._keep("ring", 1, samples, torch.int32, device)
            # One more than steps may be staged: a step's copy is queued behind what marks its end.
            self._keep("slots", depth + 1, samples, torch.int64, device)
            if "pinned" not in self._buffers or self._buffers["pinned"].shape[0] < depth + 1:
                self._buffers["pinned"] = self._device.pinned((depth + 1) * samples, torch.int64).view(
                    depth + 1, samples
                )

    def prepare(self, kind: int) -> bytes:
        return bytes(number & 0xFF for number in self._nccl.get_unique_id())

    def connect(self, request: stage_pb2.ConnectLinkRequest) -> None:
        epoch = self._epoch
        ids = list(request.nccl_unique_ids)
        mine = (
            [one for rank, one in enumerate(ids) if rank % self._size == self._rank]
            if request.sender
            else [ids[self._rank]]
        )
        turn = (request.kind == RING, request.sender)
        with self._opens:
            self._joining += 1
        try:
            self._device.bind(self._opening)
            place = SENDER if request.sender else RECEIVER
            link = _Link([self._join(one, place) for one in mine])
        finally:
            with self._opens:
                self._joining -= 1
                self._opens.notify_all()
        self._take_turn(turn, link)
        if epoch != self._epoch:
            link.abort()
            raise StageLostError("the epoch was raised while a link opened", reason="EPOCH_RAISED")
        self._links[request.kind, request.sender] = link
        self._refresh()

    def abort(self) -> None:
        """Break off every link at once, outgoing ones first by a moment.

        NCCL's abort returns when whatever is queued on the communicator has run, and that may stand behind a wait in
        another link: each link has a thread of its own. May be called by two threads; both wait for all.
        """
        if self._joining or self._turns:
            log.error("a link still hangs in opening; the worker ends and is started again")
            os._exit(ABORT_HANGS)
        with self._abort_lock:
            links = [self._links[key] for key in sorted(self._links, key=lambda key: not key[1])]
            self._links.clear()
            self._refresh()
            for link in links:
                thread = threading.Thread(target=self._abort_one, args=(link,), name="abort", daemon=True)
                thread.start()
                self._aborts.append(thread)
            aborts = list(self._aborts)
        deadline = time.monotonic() + ABORT_TIMEOUT_S
        for thread in aborts:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                log.error("a link cannot be broken off; the worker ends and is started again")
                os._exit(ABORT_HANGS)
        with self._abort_lock:
            self._aborts = [thread for thread in self._aborts if thread.is_alive()]

    def _abort_one(self, link: _Link) -> None:
        torch.cuda.set_device(self._device.torch_device)
        link.abort()

    def check(self) -> str:
        for (kind, _), link in list(self._links.items()):
            try:
                link.check()
            except Exception as error:  # noqa: BLE001 - cupy knows not every status of NCCL by name
                return f"the {link_name(kind)} link failed: {error!r}"
        return self.failure()

    def failure(self) -> str:
        for (kind, _), link in list(self._links.items()):
            if link.error:
                return f"the {link_name(kind)} link failed: NCCL takes nothing more: {link.error!r}"
        return ""

    def send_buffer(self, count: int) -> torch.Tensor:
        index = self._num_sent % len(self._sent["hidden"])
        self._wait_sent("hidden", index)
        return self._buffers["hidden"][index, : count * self._hidden].view(count, self._hidden)

    def send_hidden(self, hidden: torch.Tensor, done: Event) -> int:
        self._send.wait_event(done)
        num_peers = self._put(ACTIVATIONS, hidden, self._send)
        self._mark_sent("hidden", self._num_sent % len(self._sent["hidden"]), self._send)
        self._num_sent += 1
        return hidden.nbytes * num_peers

    def receive_hidden(self, into: torch.Tensor) -> None:
        self._get(ACTIVATIONS, into, self._compute)

    def send_ring(self, index: int, tokens: torch.Tensor) -> None:
        if not self.sends_ring or not tokens.shape[0]:
            return
        self._wait_sent("tokens", index)
        out = self._buffers["tokens"][index, : tokens.shape[0]]
        out.copy_(tokens, non_blocking=True)
        copied = self._device.event()
        copied.record()
        self._ring.wait_event(copied)
        self._put(RING, out, self._ring)
        self._mark_sent("tokens", index, self._ring)

    def expect_ring(self, batch: Batch) -> None:
        """Keep where the step's tokens will go."""
        count = len(batch.sampled_slots)
        if not self.receives_ring or not count:
            return
        index = self._num_expected % (self._depth + 1)
        self._num_expected += 1
        pinned, slots = self._buffers["pinned"][index], self._buffers["slots"][index, :count]
        pinned.numpy()[:count] = batch.sampled_slots
        slots.copy_(pinned[:count], non_blocking=True)
        self._expected.append((batch.number, slots))

    def await_ring(self, batch: Batch) -> None:
        """Receive tokens in order of steps, as far as this step needs them.

        Those of steps that were answered before this one was sent are received too, whoever wants them: nothing waits
        for them, and no more than the lane's depth pile up in the link.
        """
        due = max(batch.newest_input, batch.number - self._unanswered)
        while self._expected and self._expected[0][0] <= due:
            _, slots = self._expected.popleft()
            tokens = self._buffers["ring"][0, : slots.shape[0]]
            self._get(RING, tokens, self._compute)
            self._slot_tokens.index_copy_(0, slots, tokens)

    def _refresh(self) -> None:
        self.sends_hidden = (ACTIVATIONS, True) in self._links
        self.receives_hidden = (ACTIVATIONS, False) in self._links
        self.sends_ring = (RING, True) in self._links
        self.receives_ring = (RING, False) in self._links

    def _keep(self, name: str, depth: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        if name not in self._buffers or self._buffers[name].shape[0] < depth:
            self._buffers.pop(name, None)
            self._buffers[name] = torch.zeros(depth, size, dtype=dtype, device=device)

    def _wait_sent(self, name: str, index: int) -> None:
        sent = self._sent[name][index]
        if sent is not None:
            self._compute.wait_event(sent)

    def _mark_sent(self, name: str, index: int, stream: Stream) -> None:
        event = self._device.event()
        event.record(stream)
        self._sent[name][index] = event

    # A link that an abort has taken away meanwhile does nothing, as one that is broken off: the step's result is nobody's.

    def _put(self, kind: int, tensor: torch.Tensor, stream: Stream) -> int:
        """To each peer; returns how many there are."""
        link, dtype = self._links.get((kind, True), _NO_LINK), self._types[tensor.dtype]
        link.each(
            lambda comm: comm.send(tensor.data_ptr(), tensor.numel(), dtype, RECEIVER, stream.cuda_stream)
        )
        return len(link.comms)

    def _get(self, kind: int, tensor: torch.Tensor, stream: Stream) -> None:
        link, dtype = self._links.get((kind, False), _NO_LINK), self._types[tensor.dtype]
        link.each(
            lambda comm: comm.recv(tensor.data_ptr(), tensor.numel(), dtype, SENDER, stream.cuda_stream)
        )

    def _join(self, unique_id: bytes, place: int) -> Any:
        """Returns when the other end has come too."""
        try:
            return self._nccl.NcclCommunicator(2, unique_id, place)
        except TypeError:  # before cupy 14 an id was a tuple of signed chars
            signed = tuple(number - 256 if number > 127 else number for number in unique_id)
            return self._nccl.NcclCommunicator(2, signed, place)

    def _take_turn(self, turn: tuple[bool, bool], link: _Link) -> None:
        """Exchange dummies when no communicator of this rank is being joined, one link after the other.

        A receive that waits on the device can hold up whatever allocates or loads, a join above all (rule 9). The
        turns, what comes in before what goes out and the ring last, follow the lane, so no cycle of waits forms.
        """
        with self._opens:
            self._turns.append(turn)
            self._opens.wait_for(lambda: not self._joining and min(self._turns) == turn)
        try:
            self._exchange(link, turn[1])
        finally:
            with self._opens:
                self._turns.remove(turn)
                self._opens.notify_all()

    def _exchange(self, link: _Link, sender: bool) -> None:
        """Dummy data there and back, so that NCCL has connected before the first step."""
        dummies = torch.zeros(2, DUMMY, dtype=torch.int32, device=self._device.torch_device)
        stream = self._opening.cuda_stream
        for comm in link.comms:
            moves: Sequence[tuple[Any, int]] = (
                ((comm.send, RECEIVER), (comm.recv, RECEIVER))
                if sender
                else ((comm.recv, SENDER), (comm.send, SENDER))
            )
            for buffer, (move, peer) in zip(dummies, moves, strict=True):
                move(buffer.data_ptr(), DUMMY, self._types[torch.int32], peer, stream)
        self._opening.synchronize()
