"""The memory of the last requests: rows that change until they end, told once to whoever asks again."""

from __future__ import annotations

import gc
import weakref

from engine_fakes import daemon_ref, engine_info

from pdx.router.choice.policy import Candidate
from pdx.router.live.recorder import STEPS_MAX, TEXT_CHARS_MAX, Record, Recorder
from pdx.router.request.actions import (
    Answer,
    CallDecode,
    CallPrefill,
    DecodeAnswered,
    LineUp,
    PassOn,
    PrefillAnswered,
    StreamFinished,
    TurnedAway,
)

P = Candidate(info=engine_info("P", "prefill"), daemon=daemon_ref("a"))
D = Candidate(info=engine_info("D", "decode"), daemon=daemon_ref("b"))


class Course:
    """A journey as the recorder reads it."""

    def __init__(self) -> None:
        self.way, self.outcome, self.reason, self.unseeded = "seeded", "none", "", ""
        self.handoff_id = b"\x01" * 16
        self.prefill: Candidate | None = P
        self.decode: Candidate | None = D


def begun(recorder: Recorder, course: Course | None = None, **changed: str) -> Record:
    about = {"request_id": "r", "model": "m", "path": "/v1/completions", **changed}
    return recorder.begin(course or Course(), now=10.0, now_unix_s=1e9, **about)


def test_steps_are_what_was_heard_and_done() -> None:
    recorder = Recorder()
    record = begun(recorder)
    record.does(CallPrefill(engine=P, body=b"", timeout_s=1.0), 10.001)
    record.saw(PrefillAnswered(200, b""), 10.2)
    record.does(CallDecode(engine=D, body=b""), 10.201)
    record.saw(DecodeAnswered(200, b"", streaming=True), 10.25)
    record.does(PassOn(b""), 10.26)
    record.saw(StreamFinished(), 11.0)
    record.does(Answer(status=200, body=b""), 11.0)
    record.end(200, 11.0)
    (row,), _, more = recorder.since(0)
    assert [(step.what, step.at_us, step.engine) for step in row.steps] == [
        ("chosen", 1000, ""), ("prefill_sent", 1000, "P"), ("prefill_answered", 200_000, "P"),
        ("decode_sent", 201_000, "D"), ("decode_answered", 250_000, "D"), ("first_byte", 260_000, ""),
        ("finished", 1_000_000, ""),
    ]  # fmt: skip
    assert (row.prefill, row.decode, row.way, row.code, row.handoff) == ("P", "D", "seeded", 200, "01" * 16)
    assert not more
    assert {daemon: sides for daemon, (_, sides) in record.daemons.items()} == {"a": ["prefill"], "b": ["decode"]}


def test_who_waits_for_an_engine_is_seen_to_wait() -> None:
    recorder = Recorder()
    record = begun(recorder)
    for _ in range(3):
        record.does(LineUp("alone/m"), 10.5)
    record.does(CallDecode(engine=D, body=b""), 11.0)
    other = begun(recorder)
    other.does(LineUp("alone/m"), 10.5)
    other.saw(TurnedAway(why="queue_timeout", retry_after_s=1), 12.0)
    other.does(Answer(status=504, body=b""), 12.0)
    told = [[step.what for step in row.steps] for row in recorder.since(0)[0]]
    assert told == [["queued", "chosen", "decode_sent"], ["queued", "turned_away", "first_byte"]]


def test_errors_are_failures_of_the_side_that_made_them() -> None:
    recorder = Recorder()
    record = begun(recorder)
    record.saw(PrefillAnswered(500, b""), 11.0)
    record.saw(DecodeAnswered(503, b""), 12.0)
    assert [step.what for step in recorder.since(0)[0][0].steps] == ["prefill_failed", "decode_failed"]


def test_who_asks_again_gets_what_has_changed() -> None:
    recorder = Recorder()
    first, second = begun(recorder), begun(recorder)
    rows, cursor, _ = recorder.since(0)
    assert [row.serial for row in rows] == [first.serial, second.serial]
    assert recorder.since(cursor) == ([], cursor, False)
    first.end(200, 12.0)
    rows, following, _ = recorder.since(cursor)
    assert [(row.serial, row.code) for row in rows] == [(first.serial, 200)]
    assert recorder.since(following)[0] == []
    assert len(recorder.since(0)[0]) == 2


def test_more_than_fits_comes_in_parts_and_nothing_is_lost() -> None:
    recorder = Recorder()
    for _ in range(25):
        begun(recorder)
    seen, cursor, more = [], 0, True
    while more:
        rows, cursor, more = recorder.since(cursor, limit=10)
        seen += [row.serial for row in rows]
    assert seen == list(range(1, 26))


def test_only_the_last_are_kept_and_late_words_of_others_do_no_harm() -> None:
    recorder = Recorder(keeps=3)
    first = begun(recorder)
    for _ in range(3):
        begun(recorder)
    assert len(recorder) == 3
    first.does(CallDecode(engine=D, body=b""), 11.0)
    first.end(200, 12.0)
    assert [row.serial for row in recorder.since(0)[0]] == [2, 3, 4]
    for _ in range(STEPS_MAX * 2):
        first.does(CallDecode(engine=D, body=b""), 11.0)
    assert len(first.steps) == STEPS_MAX


def test_a_record_keeps_no_journey_that_has_ended() -> None:
    recorder, course = Recorder(), Course()
    record, gone = begun(recorder, course), weakref.ref(course)
    record.end(200, 11.0)
    record.end(500, 12.0)
    del course
    gc.collect()
    assert gone() is None, "it held the request's body"
    assert record.row().code == 200


def test_words_are_cut() -> None:
    course = Course()
    course.reason = course.outcome = "x" * 5000
    record = begun(Recorder(), course, path="/v1/" + "y" * 9000)
    row = record.row()
    assert max(map(len, (row.reason, row.outcome, row.path))) == TEXT_CHARS_MAX
