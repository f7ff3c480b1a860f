"""One handoff as a timeline: when each prompt chunk was computed, when its pages were on the wire, what was exposed.

Pure: it reads the events that daemons recorded (daemon.trace) and draws them for a terminal, as SVG, and for Perfetto.
Events of two daemons may be merged only if both ran on one host, where all clocks are one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

Event = dict[str, Any]

_SVG_WIDTH = 960


@dataclass(frozen=True)
class ChunkSpan:
    """One prompt chunk (one forward step that completed pages)."""

    compute_from_ns: int
    compute_to_ns: int
    wire_from_ns: int  # first put; 0 if its pages never left
    wire_to_ns: int  # last page landed
    pages: int
    landed_ns: tuple[int, ...] = ()  # each layer's pages


@dataclass(frozen=True)
class Timeline:
    """What one handoff did. Times are nanoseconds of the host's monotonic clock."""

    chunks: tuple[ChunkSpan, ...]
    pages_landed: int
    pages_landed_while_computing: int
    exposed_ns: int  # from the last layer computed to the last page landed
    loaded_ns: int  # when the decode engine had verified its last page; 0 if it never did
    lane: str

    @property
    def started_ns(self) -> int:
        return self.chunks[0].compute_from_ns

    @property
    def computed_ns(self) -> int:
        return self.chunks[-1].compute_to_ns

    @property
    def ended_ns(self) -> int:
        return max(max(c.compute_to_ns, c.wire_to_ns) for c in self.chunks)

    @property
    def hidden_fraction(self) -> float:
        """The part of the pages that had landed before the last layer was computed."""
        return self.pages_landed_while_computing / self.pages_landed if self.pages_landed else 1.0


def read_events(events: Iterable[Event]) -> Timeline | None:
    """The timeline of one handoff from its events, in any order; None if no page was ever filled."""
    ordered = sorted(events, key=lambda event: event["at_ns"])
    filled = [event for event in ordered if event["what"] == "filled"]
    if not filled:
        return None
    landed = [event for event in ordered if event["what"] == "landed"]
    step_of_block = {event["block"]: event["step"] for event in filled}
    computed_ns = filled[-1]["at_ns"]
    chunks = []
    for step in sorted({event["step"] for event in filled}):
        own = [event for event in filled if event["step"] == step]
        puts = [e["at_ns"] for e in ordered if e["what"] == "put" and step_of_block.get(e["block"]) == step]
        lands = [e["at_ns"] for e in landed if step_of_block.get(e["block"]) == step]
        chunks.append(
            ChunkSpan(
                compute_from_ns=own[0]["step_started_ns"],
                compute_to_ns=own[-1]["at_ns"],
                wire_from_ns=min(puts, default=0),
                wire_to_ns=max(lands, default=0),
                pages=sum(event["pages"] for event in own),
                landed_ns=tuple(lands),
            )
        )
    last_landed_ns = landed[-1]["at_ns"] if landed else 0
    lanes = [event["endpoint"].partition("://")[0] for event in ordered if event["what"] == "lane"]
    loads = [event["at_ns"] for event in ordered if event["what"] == "loaded"]
    return Timeline(
        chunks=tuple(chunks),
        pages_landed=sum(event["pages"] for event in landed),
        pages_landed_while_computing=sum(event["pages"] for event in landed if event["at_ns"] <= computed_ns),
        exposed_ns=max(0, last_landed_ns - computed_ns),
        loaded_ns=max(loads, default=0),
        lane=lanes[0] if lanes else "same daemon",
    )


def terminal_bars(timeline: Timeline, *, columns: int = 72) -> list[str]:
    """Two lines a prompt chunk: computing above, on the wire below, on one time axis."""
    span_ns = max(1, timeline.ended_ns - timeline.started_ns)

    def bar(from_ns: int, to_ns: int, mark: str) -> str:
        start = (from_ns - timeline.started_ns) * columns // span_ns
        end = max(start + 1, (to_ns - timeline.started_ns) * columns // span_ns)
        return " " * start + mark * (end - start)

    lines = []
    for number, chunk in enumerate(timeline.chunks, 1):
        compute_ms = (chunk.compute_to_ns - chunk.compute_from_ns) / 1e6
        computing = bar(chunk.compute_from_ns, chunk.compute_to_ns, "█")
        lines.append(f"chunk {number:<2} compute {computing} {compute_ms:.0f} ms")
        if chunk.wire_from_ns and chunk.wire_to_ns:
            lines.append(f"         wire    {bar(chunk.wire_from_ns, chunk.wire_to_ns, '▒')} {chunk.pages} pages")
    return lines


def svg(timeline: Timeline, *, title: str) -> str:
    """The same picture as a self-contained SVG document; a tick for every layer that landed."""
    left, top, row, bottom_rows = 140, 40, 22, 3
    span_ns = max(1, timeline.ended_ns - timeline.started_ns)
    scale = (_SVG_WIDTH - left - 30) / span_ns
    height = top + (len(timeline.chunks) * 2 + bottom_rows) * row

    def x(at_ns: int) -> float:
        return left + (at_ns - timeline.started_ns) * scale

    def rect(from_ns: int, width_px: float, y: int, colour: str) -> str:
        return f'<rect x="{x(from_ns):.1f}" y="{y}" width="{max(1.0, width_px):.1f}" height="16" fill="{colour}"/>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_SVG_WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{_SVG_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="22" font-size="15">{escape(title)}</text>',
    ]
    for number, chunk in enumerate(timeline.chunks):
        y = top + number * 2 * row
        parts.append(f'<text x="10" y="{y + 12}">chunk {number + 1}: computing</text>')
        parts.append(rect(chunk.compute_from_ns, (chunk.compute_to_ns - chunk.compute_from_ns) * scale, y, "#4477aa"))
        parts.append(f'<text x="10" y="{y + row + 12}" fill="#777">layers landed</text>')
        parts += [rect(at_ns, 2.0, y + row, "#cc5522") for at_ns in chunk.landed_ns]
    bottom = top + len(timeline.chunks) * 2 * row
    end = x(timeline.computed_ns)
    parts.append(
        f'<line x1="{end:.1f}" x2="{end:.1f}" y1="{top - 6}" y2="{bottom}" stroke="#222" stroke-dasharray="4 3"/>'
        f'<text x="{end:.1f}" y="{bottom + 14}" text-anchor="end">last layer computed, {span_ns / 1e9:.2f} s</text>'
        f'<text x="{left}" y="{bottom + 14}">0 s</text>'
        f'<text x="{left}" y="{bottom + 40}">{timeline.hidden_fraction:.1%} of {timeline.pages_landed} pages had '
        f"landed by then; {timeline.exposed_ns / 1e6:.1f} ms exposed; lane {escape(timeline.lane)}</text>"
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def perfetto(handoffs: Sequence[tuple[str, Iterable[Event]]]) -> str:
    """Chrome trace JSON (load it at ui.perfetto.dev): one process per handoff, one track per kind of work."""
    out: list[dict[str, Any]] = []
    for number, (name, events) in enumerate(handoffs, 1):
        out.append({"ph": "M", "name": "process_name", "pid": number, "args": {"name": name}})
        timeline = read_events(events := list(events))
        for chunk in timeline.chunks if timeline else ():
            out.append(_slice(number, "compute", f"{chunk.pages} pages", chunk.compute_from_ns, chunk.compute_to_ns))
            if chunk.wire_from_ns and chunk.wire_to_ns:
                out.append(_slice(number, "wire", f"{chunk.pages} pages", chunk.wire_from_ns, chunk.wire_to_ns))
        for event in events:
            label = event["what"] if "layer" not in event else f"{event['what']} layer {event['layer']}"
            mark = {"ph": "i", "s": "t", "name": label, "pid": number, "tid": event["what"]}
            out.append({**mark, "ts": event["at_ns"] / 1e3})
    return json.dumps({"traceEvents": out, "displayTimeUnit": "ms"})


def _slice(process: int, track: str, name: str, from_ns: int, to_ns: int) -> dict[str, Any]:
    return {
        "ph": "X", "name": f"{track}: {name}", "pid": process, "tid": track,
        "ts": from_ns / 1e3, "dur": max(0, to_ns - from_ns) / 1e3,
    }  # fmt: skip
