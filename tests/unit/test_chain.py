"""Which stages make a lane; every refusal has both sides' values."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagemesh.router.lane.chain import Member, check_chain
from stagemesh.v1 import stage_pb2
from stagemesh.wire import protocol
from stagemesh.wire.errors import ChainError

FINGERPRINT = "f" * 64
CONTEXT = 128


def member(index: int, begin: int, end: int, **fields: Any) -> Member:
    values: dict[str, Any] = {
        "protocol_major": protocol.MAJOR,
        "protocol_minor": protocol.MINOR,
        "model_fingerprint": FINGERPRINT,
        "num_layers": 12,
        "dtype": "float32",
        "block_size": 16,
        "max_context": CONTEXT,
    }
    description = stage_pb2.DescribeResponse(layer_begin=begin, layer_end=end, **values | fields)
    return Member(index, f"host:{index}", description)


def chain(*bounds: tuple[int, int]) -> list[Member]:
    return [member(index, *bound) for index, bound in enumerate(bounds)]


def refusal(members: list[Member]) -> ChainError:
    with pytest.raises(ChainError) as refused:
        check_chain(members, FINGERPRINT, CONTEXT)
    error = refused.value
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "CHAIN_REFUSED")
    assert error.stage in {one.name for one in members}
    assert error.stage in error.message
    return error


@given(st.sets(st.integers(1, 11)))
def test_a_chain_that_covers_every_layer_once(cuts: set[int]) -> None:
    edges = [0, *sorted(cuts), 12]
    check_chain(chain(*pairwise(edges)), FINGERPRINT, CONTEXT)


@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 12)).filter(lambda one: one[0] < one[1]), min_size=1
    )
)
def test_any_other_chain_is_refused(bounds: list[tuple[int, int]]) -> None:
    covered = [layer for begin, end in bounds for layer in range(begin, end)]
    if covered == list(range(12)):
        check_chain(chain(*bounds), FINGERPRINT, CONTEXT)
    else:
        refusal(chain(*bounds))


@pytest.mark.parametrize(
    ("bounds", "words", "stage"),
    [
        ([(0, 4), (5, 12)], "layers 4:5 are on no stage: stage 1 (host:1) begins at layer 5", 1),
        ([(0, 6), (4, 12)], "layers 4:6 are on two stages: stage 1 (host:1) has 4:12", 1),
        ([(0, 6), (0, 6)], "layers 0:6 are on two stages", 1),
        ([(2, 12)], "layers 0:2 are on no stage: stage 0", 0),
        ([(0, 4), (4, 10)], "layers 10:12 are on no stage: stage 1 (host:1) is the last", 1),
        ([(6, 12), (0, 6)], "layers 0:6 are on no stage: stage 0", 0),
    ],
    ids=["hole", "overlap", "twice", "no begin", "no end", "wrong order"],
)
def test_layers(bounds: list[tuple[int, int]], words: str, stage: int) -> None:
    error = refusal(chain(*bounds))
    assert words in error.message
    assert error.stage == f"stage {stage} (host:{stage})"
    assert error.metadata == {"differs": "layers"}


@pytest.mark.parametrize(
    ("fields", "differs", "words"),
    [
        ({"model_fingerprint": "a" * 64}, "model_fingerprint", ("aaaaaaaaaaaa", "ffffffffffff")),
        ({"protocol_major": 2}, "protocol", ("2.0", "1.0")),
        ({"protocol_minor": protocol.MINOR + 2}, "protocol", ("1.2", "1.0")),
        ({"dtype": "bfloat16"}, "dtype", ("bfloat16", "float32")),
        ({"block_size": 32}, "block_size", ("32", "16")),
        ({"max_context": 64}, "max_context", ("64", "128")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_stages_must_share(fields: dict[str, Any], differs: str, words: tuple[str, str]) -> None:
    error = refusal([member(0, 0, 6), member(1, 6, 12, **fields)])
    assert error.stage == "stage 1 (host:1)"
    assert error.metadata == {"differs": differs}
    assert all(word in error.message for word in words)


def test_what_may_differ() -> None:
    other = member(1, 6, 12, num_blocks=7, max_slots=3, max_context=CONTEXT + 1, version="0.2")
    check_chain([member(0, 0, 6, num_blocks=99), other], FINGERPRINT, CONTEXT)


def test_one_minor_version_apart_works_together() -> None:
    check_chain([member(0, 0, 12, protocol_minor=protocol.MINOR + 1)], FINGERPRINT, CONTEXT)
