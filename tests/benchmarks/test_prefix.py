"""What the benchmark of kept prefixes makes of what it saw: figures that a bar hangs on."""

from __future__ import annotations

import pytest

from benchmarks.harness.answers import Answer
from benchmarks.harness.counters import counted
from benchmarks.harness.report import Report
from benchmarks.harness.rig import Reply
from benchmarks.prefix import restart
from benchmarks.prefix.chat import ANSWER_TOKENS, BLOCK_BYTES, Turn, judge
from benchmarks.prefix.hits import Hits, blocks_of
from pdx.errors import PdxError

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
    assert counted(METRICS, "lmcache_mp_l1_read_chunks_total", 'model="b"') == 2


def test_a_counter_that_is_not_there_is_no_0_unless_it_comes_with_its_first_event() -> None:
    with pytest.raises(PdxError, match="lmcache_mp_l1_write_chunks_total"):
        counted(METRICS, "lmcache_mp_l1_write_chunks_total")
    with pytest.raises(PdxError, match='model="c"'):
        counted(METRICS, "lmcache_mp_l1_read_chunks_total", 'model="c"')
    assert counted(METRICS, "lmcache_mp_l1_write_chunks_total", late=True) == 0


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


CHAT = (Turn(600, 0, 5 * BLOCK_BYTES, 0, 600), Turn(1060, 6, 3 * BLOCK_BYTES, 0, 292))


@pytest.mark.parametrize(
    ("turn", "crosses", "holds"),
    [
        (CHAT[1], True, True),
        (Turn(1060, 6, 0, 0, 292), False, True),  # of one host
        (Turn(1060, 6, 0, 0, 292), True, False),  # nothing crossed
        (Turn(1060, 6, 3 * BLOCK_BYTES, 0, 0), True, False),  # prefill computed nothing
        (Turn(1060, 6, 0, 0, 0, paired=False), False, False),  # decode alone
    ],
)
def test_a_chat_that_decode_serves_alone_holds_no_bars(
    turn: Turn, crosses: bool, holds: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report("test")
    judge("pair", (CHAT[0], turn), report, crosses=crosses)
    assert report.all_hold is holds


def reply(token: str, *, status: int = 200) -> Reply:
    rivals = [{"1": -0.1, "2": -3.0}]
    return Reply(status, "", 1.0, logprobs={"tokens": [token], "top_logprobs": rivals} if status == 200 else {})


LOADED = {"lookup_hit_blocks": 22, "loads_ok": 2, "pages_verified": 660}


@pytest.mark.parametrize(
    ("replies", "grown", "holds"),
    [
        ([reply("1"), reply("1")], LOADED, True),
        ([reply("1"), reply("1")], LOADED | {"pages_verified": 0}, False),  # found, but no engine could load it
        ([reply("1"), reply("1")], LOADED | {"loads_ok": 1}, False),
        ([reply("1"), reply("1")], LOADED | {"loads_failed": 1}, False),
        ([reply("1"), reply("2")], LOADED, False),  # another answer
        ([reply("1"), reply("1", status=503)], LOADED, False),
    ],
)
def test_a_restart_holds_only_where_engines_loaded_and_answered_as_before(
    replies: list[Reply], grown: dict[str, int], holds: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report("test")
    first = [Answer(["1"], [{"1": -0.1, "2": -3.0}])] * 2
    restart.judge("restart", replies, first, grown, 660, report)
    assert report.all_hold is holds
