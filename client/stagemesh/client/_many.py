"""Many requests over one Session call, without I/O: what to start, what came of it, what to try again."""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from stagemesh.client._chunks import end_error, session_deltas, to_completion, to_last_chunk
from stagemesh.client._exchange import Exchange
from stagemesh.client._types import Chunk, Completion, FinishReason
from stagemesh.v1 import inference_pb2 as pb
from stagemesh.wire.errors import InvalidArgumentError, StagemeshError

DEFAULT_MAX_LIVE = 1_000
"""Below the waiting queue of a router with its defaults, so that an idle one refuses none."""
MAX_BATCH_BYTES = 1 << 20
"""Of the requests that go in one message, unless one alone is longer."""


class Many:
    """The requests of one `generate_many`, by the place of their prompt.

    A request that is refused or fails ends alone; its last chunk has the error.

    Args:
        exchanges: One for each prompt.
        max_live: Requests under way at once; the others start as these end.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, exchanges: Iterable[Exchange], *, max_live: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if max_live < 1:
            raise InvalidArgumentError(
                f"max_live: {max_live} requests at once; expected at least 1",
                reason="INVALID_VALUE",
                field="max_live",
            )
        self.exchanges = list(exchanges)
        self._max_live = max_live
        self._clock = clock
        self._unsent = deque(range(len(self.exchanges)))
        self._again: list[tuple[float, int]] = []
        self._live: dict[str, int] = {}
        _refuse_equal_ids(self.exchanges)

    @property
    def num_live(self) -> int:
        """Requests sent and not ended."""
        return len(self._live)

    @property
    def done(self) -> bool:
        """Whether every request has ended."""
        return not (self._live or self._unsent or self._again)

    def due(self) -> list[pb.GenerateRequest]:
        """The requests to send now; they are live from here on."""
        starts = []
        while self._again and self._again[0][0] <= self._clock() and len(self._live) < self._max_live:
            starts.append(self._begin(heapq.heappop(self._again)[1]))
        while self._unsent and len(self._live) < self._max_live:
            starts.append(self._begin(self._unsent.popleft()))
        return starts

    def remaining_s(self) -> float | None:
        """Seconds to the deadline, which is one for all."""
        return self.exchanges[0].remaining_s() if self.exchanges else None

    def pause_s(self) -> float:
        """Seconds until a request is due again."""
        return max(0.0, self._again[0][0] - self._clock()) if self._again else 0.0

    def accept(self, response: pb.SessionResponse) -> list[tuple[int, Chunk]]:
        """A message came; what it means, as (index, chunk)."""
        ends = {end.request_id: end for end in response.ends}
        chunks: list[tuple[int, Chunk]] = []
        for request_id, text, token_ids in session_deltas(response):
            index = self._live.get(request_id)
            if index is None:  # cancelled: this was on its way
                continue
            self.exchanges[index].started()
            if end := ends.pop(request_id, None):
                chunks += self._end(end, text, token_ids)
                continue
            chunk = Chunk(
                request_id=request_id, text=text, token_ids=token_ids, finish_reason=None, usage=None
            )
            self.exchanges[index].took(chunk)
            chunks.append((index, chunk))
        for end in ends.values():
            chunks += self._end(end)
        return chunks

    def lost(self, error: StagemeshError) -> list[tuple[int, Chunk]]:
        """The session broke: the end of each request that was live and is not tried again."""
        ends = [pb.SessionEnd(request_id=request_id) for request_id in self._live]
        return [chunk for end in ends for chunk in self._end(end, error=error.of_request(end.request_id))]

    def cancel(self, index: int) -> str | None:
        """Want no more of a request; returns its id if the router must be told."""
        self.exchanges[index].closed()
        for request_id, live in self._live.items():
            if live == index:
                del self._live[request_id]
                return request_id
        if index in self._unsent:
            self._unsent.remove(index)
        self._again = [again for again in self._again if again[1] != index]
        heapq.heapify(self._again)
        return None

    def closed(self) -> None:
        """The application wants no more of any."""
        for exchange in self.exchanges:
            exchange.closed()

    def _begin(self, index: int) -> pb.GenerateRequest:
        exchange = self.exchanges[index]
        self._live[exchange.request_id] = index
        return exchange.request

    def _end(
        self,
        end: pb.SessionEnd,
        text: str = "",
        token_ids: tuple[int, ...] = (),
        error: StagemeshError | None = None,
    ) -> list[tuple[int, Chunk]]:
        index = self._live.pop(end.request_id, None)
        if index is None:
            return []
        error = error or end_error(end)
        if error and (delay_s := self.exchanges[index].retry_delay_s(error)) is not None:
            heapq.heappush(self._again, (self._clock() + delay_s, index))
            return []
        chunk = to_last_chunk(end, text, token_ids, error)
        self.exchanges[index].took(chunk)
        return [(index, chunk)]


def batches(starts: Iterable[pb.GenerateRequest]) -> Iterator[list[pb.GenerateRequest]]:
    """The requests in messages a router takes, however long the prompts; it begins with the first while the next
    are on their way."""
    batch: list[pb.GenerateRequest] = []
    num_bytes = 0
    for start in starts:
        size = start.ByteSize()
        if batch and num_bytes + size > MAX_BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
        batch.append(start)
        num_bytes += size
    if batch:
        yield batch


def collect(
    exchanges: Iterable[Exchange], chunks: Iterable[tuple[int, Chunk]]
) -> list[Completion | StagemeshError]:
    """All chunks of many requests as whole answers, in the order of their prompts."""
    found: list[list[Chunk]] = [[] for _ in exchanges]
    for index, chunk in chunks:
        found[index].append(chunk)
    return [_answer(exchange, mine) for exchange, mine in zip(exchanges, found, strict=True)]


def _answer(exchange: Exchange, chunks: list[Chunk]) -> Completion | StagemeshError:
    if chunks and chunks[-1].finish_reason is FinishReason.ERROR and chunks[-1].error:
        return chunks[-1].error
    return to_completion(exchange.request_id, chunks)


def _refuse_equal_ids(exchanges: list[Exchange]) -> None:
    seen: set[str] = set()
    for exchange in exchanges:
        if exchange.request_id in seen:
            raise InvalidArgumentError(
                f"request_id '{exchange.request_id}' is given twice; each of many requests needs its own",
                reason="INVALID_VALUE",
                field="request_id",
            )
        seen.add(exchange.request_id)
