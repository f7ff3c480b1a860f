"""What chaos keeps: counted by kind, whole on disk, and taken up again where it stopped."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from benchmarks.chaos.call import Heard
from benchmarks.chaos.ledger import FINDINGS_MAX, SLOWEST_MAX, Ledger, State, table, way_of
from benchmarks.chaos.plan import Fault, Wish
from benchmarks.chaos.verdict import Verdict

WISH = Wish(1, 0, 4, streamed=True, unseedable=False, usage_asked=False)


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    ledger = Ledger(State(7), tmp_path / "state.json")
    for _ in range(3):
        ledger.end(WISH, Verdict("right"), Heard(seconds=ledger.next_wish()))
    ledger.end(WISH, Verdict("error", "502: gone"), Heard(status=502))
    ledger.fault(Fault(4, "kill", "P0", "sent", 1.0), "any")
    ledger.keep()
    again = msgspec.json.decode((tmp_path / "state.json").read_bytes(), type=State)
    assert again == ledger.state
    assert (again.seed, again.wishes_begun, again.faults_done) == (7, 3, [4])
    assert (again.outcomes, again.errors) == ({"right": 3, "error": 1}, {"502: gone": 1})
    assert list(tmp_path.iterdir()) == [tmp_path / "state.json"]


def test_two_states_share_nothing() -> None:
    Ledger(State(1)).end(WISH, Verdict("right"), Heard())
    assert State(2).outcomes == {}


def test_what_must_not_be_is_found_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger(State(7))
    for _ in range(FINDINGS_MAX + 1):
        ledger.end(WISH, Verdict("wrong", "'b' is not how 'a' begins"), Heard())
    assert ledger.violations == {"late": 0, "unclean": 0, "wrong": FINDINGS_MAX + 1}
    assert len(ledger.state.findings) == FINDINGS_MAX
    assert "FOUND  wrong: 'b' is not how 'a' begins" in capsys.readouterr().out


def test_the_slowest_are_kept_in_order() -> None:
    ledger = Ledger(State(7))
    for seconds in range(SLOWEST_MAX + 5):
        ledger.end(WISH, Verdict("right"), Heard(seconds=seconds))
    assert [seconds for seconds, _ in ledger.state.slowest] == list(range(SLOWEST_MAX + 4, 4, -1))


def test_ways_and_tables() -> None:
    assert way_of({"x-pdx-way": "seeded"}) == "seeded"
    assert way_of({"x-pdx-way": "alone", "x-pdx-reason": "no_pair"}) == "alone: no_pair"
    assert way_of({}) == "alone"
    assert table({"kill P0 sent": 2, "kill P0 any": 1, "cut wire any": 3}) == {
        "cut wire": {"any": 3}, "kill P0": {"any": 1, "sent": 2},
    }  # fmt: skip
