"""When a pair pays, from constants that are easy to follow."""

from __future__ import annotations

import pytest

from benchmarks.harness.gain import Measured, between

FAST, SLOW = 1e12, 1e5  # bytes/s

# A second a thousand tokens on both cores, two on one; 10 KB of KV a token.
MEASURED = Measured(
    plain_first_s={1000: 1.0, 2000: 2.0}, plain_second_gap_s=0.1, pair_first_s={1000: 2.0, 2000: 4.0},
    pair_second_gap_s={1000: 0.2, 2000: 0.2}, pair_pause_s_per_token=1e-5, kv_bytes_per_token=1e4, layers=10,
    chunk_tokens=2000,
)  # fmt: skip


def test_between_measured_points_and_beyond_them() -> None:
    assert between({1000: 1.0, 2000: 3.0}, 1500) == pytest.approx(2.0)
    assert between({1000: 1.0, 2000: 3.0}, 2500) == pytest.approx(4.0)
    assert between({1000: 1.0, 2000: 3.0}, 500) == pytest.approx(0.0)
    assert between({1000: 1.0}, 7) == 1.0


def test_a_fast_link_exposes_the_last_layer_and_a_slow_one_what_it_is_behind() -> None:
    assert MEASURED.exposed_s(1000, 1e7) == pytest.approx(1000 * 1e4 / 10 / 1e7)
    assert MEASURED.exposed_s(1000, SLOW) == pytest.approx(1000 * 1e4 / SLOW - 2.0)


def test_an_idle_machine_always_loses() -> None:
    assert MEASURED.gain_s(1000, FAST, streams=0) == pytest.approx(1.0 + 0.1 - 2.0 - 0.2, abs=1e-3)


def test_who_decodes_meanwhile_gains_the_prefill_less_the_pause() -> None:
    idle, busy = (MEASURED.gain_s(2000, FAST, streams=streams) for streams in (0, 4))
    assert busy - idle == pytest.approx(4 * (2.0 - 2000 * 1e-5))
    assert MEASURED.gain_s(2000, SLOW, streams=4) < 0
