"""The offset of a stage's clock from messages that are late by unknown times."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stagemesh.router.lane.clock import WINDOW_NS, ClockOffset

DELAYS = st.lists(st.integers(1, 10_000_000), min_size=1, max_size=20)


@given(offset=st.integers(-(10**15), 10**15), came=DELAYS, went=DELAYS)
def test_the_estimate_is_right_within_its_error(offset: int, came: list[int], went: list[int]) -> None:
    clock, now = ClockOffset(), 10**12
    for delay in came:
        clock.came(now + offset, now + delay)
        now += 1_000_000
    assert clock.error_ns is None, "one direction alone says nothing"
    for delay in went:
        clock.went(now, now + delay + offset)
        now += 1_000_000
    assert clock.error_ns is not None
    assert abs(clock.offset_ns - offset) <= clock.error_ns + 1
    assert clock.error_ns <= (min(came) + min(went)) // 2


def test_a_clock_that_drifts_is_followed() -> None:
    clock = ClockOffset()
    for second in range(300):
        now = second * 1_000_000_000
        drift = second * 20_000  # 20 µs a second
        clock.came(now + drift, now + 50_000)
        clock.went(now, now + drift + 50_000)
    assert clock.error_ns is not None
    assert abs(clock.offset_ns - 299 * 20_000) < 2 * WINDOW_NS // 10**9 * 20_000


def test_a_quiet_direction_keeps_the_last_estimate() -> None:
    clock = ClockOffset()
    clock.went(0, 1_000)
    clock.came(500, 1_500)
    known = clock.offset_ns
    for window in range(1, 6):
        clock.came(window * 2 * WINDOW_NS, window * 2 * WINDOW_NS + 9_000_000)
    assert clock.offset_ns == known
