"""What is exposed of a transfer, and what may be."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.harness.exposure import HIDDEN_SLACK_S, SLOW_LINK_FACTOR, read_exposure

PAGE_BYTES = 1000
LAYERS, STEPS, PAGES = 3, 2, 2  # pages of a layer and step
LAYER_NS = 10_000_000


def handoff(*, wire_ns: int) -> list[dict[str, Any]]:
    """Every layer's pages are put when they are filled and land so much later."""
    events = []
    for step in range(STEPS):
        for layer in range(LAYERS):
            filled_ns = (step * LAYERS + layer + 1) * LAYER_NS
            events.append({
                "what": "filled", "at_ns": filled_ns, "step": step, "step_started_ns": step * LAYERS * LAYER_NS,
                "layer": layer, "pages": PAGES, "block": step * PAGES,
            })  # fmt: skip
            events.append({"what": "put", "at_ns": filled_ns, "layer": layer, "pages": PAGES, "block": step * PAGES})
            events.append({"what": "landed", "at_ns": filled_ns + wire_ns, "layer": layer, "pages": PAGES})
    return events


def test_what_came_after_the_last_layer_is_exposed() -> None:
    exposure = read_exposure(reversed(handoff(wire_ns=4_000_000)), page_bytes=PAGE_BYTES)
    assert exposure is not None
    assert exposure.exposed_s == pytest.approx(0.004)
    assert exposure.compute_s == pytest.approx(0.06)
    assert exposure.total_bytes == STEPS * LAYERS * PAGES * PAGE_BYTES
    assert exposure.last_slabs_bytes == PAGES * PAGE_BYTES
    assert exposure.production_bytes_per_s == pytest.approx(exposure.total_bytes / 0.06)


def test_a_fast_link_may_expose_its_last_slabs_and_a_slow_one_what_computing_can_not_cover() -> None:
    exposure = read_exposure(handoff(wire_ns=0), page_bytes=PAGE_BYTES)
    assert exposure is not None
    link = exposure.production_bytes_per_s / 0.5
    assert exposure.allowed_s(0.5, link) == pytest.approx(PAGES * PAGE_BYTES / link + HIDDEN_SLACK_S)
    link = exposure.production_bytes_per_s / 1.5
    assert exposure.allowed_s(1.5, link) == pytest.approx(SLOW_LINK_FACTOR * 0.5 * exposure.compute_s)


def test_a_handoff_that_is_not_whole_has_no_exposure() -> None:
    events = handoff(wire_ns=0)
    events.remove(next(event for event in events if event["what"] == "landed"))
    assert read_exposure(events, page_bytes=PAGE_BYTES) is None
    assert read_exposure([], page_bytes=PAGE_BYTES) is None
