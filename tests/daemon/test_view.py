"""What a daemon tells the live page: its arena in parts, handoffs under way, and the course of one of them."""

from __future__ import annotations

import msgspec
import pytest
from daemon.fleet import PAGES, Daemon, Fleet, prompt_of, until

from pdx.daemon import trace
from pdx.daemon.trace import Tracer
from pdx.verbs import Course, DaemonView, Mark, PageEvent
from pdx.wire import Ask

ID = bytes(16)


def view_of(daemon: Daemon) -> DaemonView:
    answer = daemon.tool.ask(Ask(verb="view"))
    assert not answer.error
    return msgspec.convert(answer.body, DaemonView)


def course_of(daemon: Daemon, handoff_id: bytes) -> Course:
    return msgspec.convert(daemon.tool.ask(Ask(verb="course", handoff_id=handoff_id)).body, Course)


def whats(course: Course) -> list[str]:
    return [mark.what for mark in course.marks]


def test_a_handoff_is_seen_under_way_and_its_course_afterwards(fleet: Fleet) -> None:
    prefill, decode = fleet.engine(fleet.daemon(), "P"), fleet.engine(fleet.daemon(), "D")
    prompt, handle = prompt_of(64), fleet.handle(prefill, decode)
    opened = prefill.open_send(prompt, handle)
    decode.open_load(prompt, handle)
    prefill.fill(opened, prompt, [0, 1, 2, 3], range(1))
    unit = PAGES.unit_bytes
    until(lambda: view_of(decode.daemon).landed_pages == 4, "the first layer lands")
    sending, landing = view_of(prefill.daemon), view_of(decode.daemon)
    assert (sending.leased_bytes, sending.cached_bytes) == (4 * unit, 0)
    assert sending.arena_bytes >= 4 << 20
    assert sending.handoffs_under_way == 1
    (out,), (into,) = sending.handoffs, landing.handoffs
    assert (out.side, out.state, out.peer, out.pages) == ("send", "sending", decode.daemon.ref.daemon_id, 4)
    assert (into.side, into.state, into.peer, into.pages) == ("receive", "granted", prefill.daemon.ref.daemon_id, 4)
    assert out.handoff == into.handoff == opened.handoff_id.hex()
    assert out.pages_wanted == into.pages_wanted == 4 * PAGES.layers
    prefill.fill(opened, prompt, [0, 1, 2, 3], range(1, PAGES.layers))
    prefill.let_go(opened.handoff_id, "send")
    decode.let_go(opened.handoff_id, "load")
    until(lambda: not view_of(decode.daemon).handoffs and not view_of(prefill.daemon).handoffs, "it is over")
    kept = view_of(decode.daemon)
    assert (kept.leased_bytes, kept.cached_bytes, kept.cached_blocks) == (0, 4 * unit, 4)
    assert (kept.handoffs_ok, kept.handoffs_failed) == (1, 0)
    assert (kept.handoffs_by_lane, kept.lanes_lost) == ({"local": 0, "tcp": 0}, {"tcp": 0})
    assert view_of(prefill.daemon).handoffs_by_lane == {"local": 0, "tcp": 1}

    sent, received = (course_of(each.daemon, opened.handoff_id) for each in (prefill, decode))
    assert whats(sent) == ["open_send", "claimed", "granted", "lane", "commit", "send_ended"]
    assert {"reserve", "grant", "open_load", "commit", "receive_ended"} <= set(whats(received))
    assert [(event.layer, event.pages) for event in sent.computed] == [(layer, 4) for layer in range(PAGES.layers)]
    assert sorted(event.layer for event in received.landed) == list(range(PAGES.layers))
    times = [event.at_ns for event in received.landed]
    assert times == sorted(times)
    assert times[-1] <= received.now_ns
    assert course_of(decode.daemon, b"unknown").marks == []


def test_hits_by_tier_and_the_disk(fleet: Fleet) -> None:
    engine = fleet.engine(fleet.daemon(disk=str(fleet.key_file.parent / "disk"), disk_cap="16MiB"), "E")
    hashes = prompt_of(64).hashes
    assert engine.look_up(hashes) == 0
    engine.keep(hashes)
    until(lambda: engine.look_up(hashes) == 4, "they are kept")
    until(lambda: (disk := view_of(engine.daemon).disk) and disk.written_blocks == 4, "they are written")
    view = view_of(engine.daemon)
    assert view.disk is not None
    assert (view.disk.state, view.disk.blocks) == ("well", 4)
    assert 0 < view.disk.used_bytes <= view.disk.cap_bytes
    assert view.arena_hit_blocks == 4
    assert view.disk_hit_blocks == 0
    assert view.lookup_blocks % 4 == 0


def test_a_tracer_tells_timelines_what_it_was_told() -> None:
    tracer = Tracer()
    said = [
        {"what": "lane", "at_ns": 1, "endpoint": "tcp://x"},
        {"what": "filled", "at_ns": 2, "step": 7, "step_started_ns": 1, "layer": 0, "pages": 4, "block": 2},
        {"what": "put", "at_ns": 3, "layer": 0, "pages": 4, "block": 2},
        {"what": "sent", "at_ns": 4},
        {"what": "landed", "at_ns": 5, "layer": 0, "pages": 4, "block": 2},
    ]
    for event in said:
        tracer.note(ID, event["what"], event["at_ns"], **{k: v for k, v in event.items() if k not in ("what", "at_ns")})
    assert tracer.events(ID) == said
    course = tracer.course(ID, now_ns=9)
    assert course.marks == [Mark("lane", 1, "endpoint tcp://x")]
    assert (course.computed, course.landed) == ([PageEvent(2, 0, 4)], [PageEvent(5, 0, 4)])


def test_a_tracer_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "EVENTS_MAX", 10)
    monkeypatch.setattr(trace, "ROWS_MAX", 25)
    monkeypatch.setattr(trace, "HANDOFFS_MAX", 4)
    monkeypatch.setattr(trace, "MARKS_MAX", 20)
    tracer = Tracer()
    for number in range(4):
        for _ in range(50):
            tracer.note(bytes([number]), "landed", 1, layer=0, pages=1, block=0)
            tracer.note(bytes([number]), "wait", 1, ahead=3)
    assert [len(tracer.events(bytes([number]))) for number in range(4)] == [0, 0, 30, 30], "the oldest went"
    assert not tracer.course(bytes([3]), now_ns=0).whole
    for number in range(10, 16):
        tracer.note(bytes([number]), "wait", 1, ahead=3)
    assert [bool(tracer.events(bytes([number]))) for number in (3, 11, 12, 15)] == [False, False, True, True]


def test_notes_fit_into_their_field() -> None:
    tracer = Tracer()
    tracer.note(ID, "send_ended", 1, reason="x" * 10_000)
    body = msgspec.to_builtins(tracer.course(ID, now_ns=1))
    assert len(msgspec.convert(body, Course).marks[0].note) == 200
