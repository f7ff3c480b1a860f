"""What the benchmark of kept prefixes makes of what it saw: figures that a bar hangs on."""

from __future__ import annotations

import pytest

from benchmarks.harness.counters import counted
from benchmarks.prefix.chat import ANSWER_TOKENS, BLOCK_BYTES, Turn
from benchmarks.prefix.hits import Hits, blocks_of

METRICS = """\
# HELP lmcache_mp_l1_read_chunks_total chunks
# TYPE lmcache_mp_l1_read_chunks_total counter
lmcache_mp_l1_read_chunks_total{model="a",x="1"} 5.0
lmcache_mp_l1_read_chunks_total{model="b",x="1"} 2.0
lmcache_mp_l1_read_chunks_total_created{model="b"} 1.7e9
other_total 9.0
"""


def test_a_counter_is_the_sum_over_its_labels_and_over_nothing_else() -> None:
    assert counted(METRICS, "lmcache_mp_l1_read_chunks_total") == 7
    assert counted(METRICS, "other_total") == 9
    assert counted(METRICS, "lmcache_mp_l1_write_chunks_total") == 0
    assert counted(METRICS, "lmcache_mp_l1_read_chunks_total", 'model="b"') == 2


def test_a_hit_costs_what_it_takes_longer_than_the_engine_s_own_cache_in_the_same_round() -> None:
    hits = Hits(own={512: [1.0, 2.0, 9.0]}, memory={512: [1.5, 2.25, 9.5]}, disk={512: [1.75, 3.25, 9.75]})
    assert hits.memory_s(512) == 0.5  # not the difference of the medians, 0.25
    assert hits.disk_s(512) == 0.25


@pytest.mark.parametrize(("tokens", "blocks"), [(127, 0), (128, 1), (512, 4), (3500, 27)])
def test_a_hit_brings_full_blocks(tokens: int, blocks: int) -> None:
    assert blocks_of(tokens) == blocks


def test_a_turn_is_allowed_the_blocks_that_were_not_whole_before() -> None:
    turn = Turn(prompt_tokens=1160, whole_before=7, to_decode=0, to_prefill=0, computed=264)
    assert ANSWER_TOKENS == 200
    assert turn.new_bytes == (11 - 7) * BLOCK_BYTES  # 1,360 tokens lie in 11 blocks
    assert turn.new_tokens == 1160 - 7 * 128
