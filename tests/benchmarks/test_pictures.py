"""Pictures are well-formed SVG and hold what was asked of them."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from benchmarks.harness.pictures import GAIN, LOSS, Mark, Panel, frontier, gain_map

SVG = "{http://www.w3.org/2000/svg}"


def words_of(picture: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(picture).iter(f"{SVG}text")]


def test_the_map_has_a_cell_for_every_length_and_link_coloured_by_its_sign() -> None:
    panel = Panel("a & b", lambda tokens, link: 1.5 if link > 1e9 else -tokens / 1000)
    picture = gain_map("title", [panel], prompts=(100, 200), links_bits_per_s=(1e8, 1e10), caption=("below",))
    words = words_of(picture)
    assert {"title", "a & b", "100 Mbit/s", "10 Gbit/s", "+1.5", "−0.10", "−0.20", "below"} <= set(words)
    fills = [element.get("fill") for element in ElementTree.fromstring(picture).iter(f"{SVG}rect")]
    assert (fills.count(GAIN), fills.count(LOSS)) == (2, 2)


def test_the_frontier_joins_the_marks_of_a_line() -> None:
    marks = [
        Mark("one", 1.0, 100.0, "red", "plain"),
        Mark("two", 2.0, 50.0, "red", "plain"),
        Mark("pair", 3, 40, "blue"),
    ]
    root = ElementTree.fromstring(frontier("title", marks, x_label="x", y_label="y", caption=()))
    assert len(list(root.iter(f"{SVG}circle"))) == 3
    (line,) = root.iter(f"{SVG}polyline")
    assert len((line.get("points") or "").split()) == 2
