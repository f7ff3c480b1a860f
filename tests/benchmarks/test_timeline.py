"""Timelines: what was hidden, what was exposed, and pictures that say so."""

from __future__ import annotations

import json
from xml.etree import ElementTree

from benchmarks import timeline

MS = 1_000_000
LAYERS = 4


def events(*, wire_delay_ms: int) -> list[timeline.Event]:
    """Three steps of 40 ms; each layer takes 10 ms and lands `wire_delay_ms` later."""
    found: list[timeline.Event] = [{"what": "lane", "at_ns": 0, "endpoint": "tcp://127.0.0.1:1"}]
    for step in range(3):
        for layer in range(LAYERS):
            at_ns = (step * LAYERS + layer + 1) * 10 * MS
            started_ns = step * LAYERS * 10 * MS
            page = {"layer": layer, "pages": 2, "block": step * 2}
            found.append({"what": "filled", "at_ns": at_ns, "step": step, "step_started_ns": started_ns, **page})
            found.append({"what": "put", "at_ns": at_ns + MS // 10, **page})
            found.append({"what": "landed", "at_ns": at_ns + wire_delay_ms * MS, **page})
    return found


def test_only_the_last_layer_is_exposed_on_a_fast_link() -> None:
    view = timeline.read_events(reversed(events(wire_delay_ms=3)))
    assert view is not None
    assert [chunk.pages for chunk in view.chunks] == [8, 8, 8]
    assert [(c.compute_from_ns // MS, c.compute_to_ns // MS) for c in view.chunks] == [(0, 40), (40, 80), (80, 120)]
    assert view.exposed_ns == 3 * MS
    assert view.hidden_fraction == 22 / 24
    assert view.lane == "tcp"


def test_a_slow_link_is_told_as_it_is() -> None:
    view = timeline.read_events(events(wire_delay_ms=200))
    assert view is not None
    assert view.exposed_ns == 200 * MS
    assert view.hidden_fraction == 0.0


def test_nothing_filled_is_no_timeline() -> None:
    assert timeline.read_events([{"what": "open_send", "at_ns": 1}]) is None


def test_pictures() -> None:
    view = timeline.read_events(events(wire_delay_ms=3))
    assert view is not None
    bars = timeline.terminal_bars(view, columns=40)
    assert len(bars) == 6
    assert max(len(line) for line in bars) < 80
    drawn = timeline.svg(view, title="<a & b>")
    rectangles = [node for node in ElementTree.fromstring(drawn).iter() if node.tag.endswith("rect")]
    assert len(rectangles) == 1 + 3 + 3 * LAYERS  # background, chunks, a tick for every layer that landed
    assert "91.7% of 24 pages had landed" in drawn
    trace = json.loads(timeline.perfetto([("document", events(wire_delay_ms=3))]))
    assert {event["ph"] for event in trace["traceEvents"]} == {"M", "X", "i"}
