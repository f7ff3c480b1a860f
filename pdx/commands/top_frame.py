"""One picture of a router for a terminal: engines, daemons, and the last requests with where their time went.

Pure, but for the age of a silence. Texts of clients and engines are shown, never obeyed: what a terminal would take for
a command is replaced.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pdx.commands.watched import Watched
from pdx.router.live.values import DaemonRow, EngineRow, Live, RequestRow
from pdx.verbs import DaemonView

Justify = Literal["left", "right"]
Piece = tuple[float, float, str]  # from, to, colour
ROWS_SHOWN = 20  # of each table, where the height is not known
TABLE_LINES = 3  # beside its rows: its title, its heads, and nothing
BAR_CELLS, TIME_CELLS = 14, 28
HEALTH_COLOURS = {
    "ready": "green",
    "alone": "yellow",
    "joining": "dim",
    "lost": "red",
    "drained": "yellow",
    "ejected": "red",
}
UNITS_S = ((86_400, "d"), (3600, "h"), (60, "min"))
NAMED = ("engine", "daemon", "request", "model", "")
PREFILL, WAIT, STREAM = "blue", "yellow", "green"


def frame(watched: Watched, *, width: int, height: int | None) -> RenderableType:
    """As wide as the terminal, and no higher: engines and daemons get up to a quarter each, requests the rest."""
    live = watched.now
    assert live is not None
    quarter = ROWS_SHOWN if height is None else max(1, height // 4 - TABLE_LINES)
    engines, daemons = live.engines[:quarter], live.daemons[:quarter]
    taken = 1 + 3 * TABLE_LINES + len(engines) + len(daemons)
    room = ROWS_SHOWN if height is None else max(1, height - taken)
    newest = [watched.requests[serial] for serial in sorted(watched.requests, reverse=True)[:room]]
    return Group(
        _head(watched, live),
        *_engines(engines, width, _title("engines", len(engines), len(live.engines))),
        *_daemons(daemons, width, _title("daemons", len(daemons), len(live.daemons))),
        *_requests(newest, live.now_unix_s, width, _title("requests", len(newest), len(watched.requests))),
    )


def _title(what: str, shown: int, there: int) -> str:
    return what if shown == there else f"{what}, {shown} of {there}"


def _head(watched: Watched, live: Live) -> Text:
    open_ = sum(not row.code for row in watched.requests.values())
    line = Text(
        f"pdx {live.version}  {watched.url}  up {_span(live.now_unix_s - live.began_unix_s)}  {open_} under way"
    )
    if watched.began_anew:
        line.append("  it has started anew", "yellow")
    if watched.lost_at is not None:
        line.append(f"  no answer for {_span(time.monotonic() - watched.lost_at)}", "bold red")
    return line


def _engines(rows: Sequence[EngineRow], width: int, title: str) -> Lines:
    most = max([1, *(row.in_flight + row.waiting for row in rows)])
    return _table(
        title, rows, width,
        (0, "engine", "left", lambda row: _said(row.engine_id)),
        (0, "role", "left", lambda row: Text(row.role)),
        (0, "health", "left", lambda row: Text(row.health, HEALTH_COLOURS[row.health])),
        (50, "flight", "right", lambda row: Text(str(row.in_flight))),
        (60, "line", "right", lambda row: Text(str(row.in_line))),
        (60, "waiting", "right", lambda row: Text(str(row.waiting))),
        (90, "load", "left", lambda row: _bar([(0, (row.in_flight + row.waiting) / most, PREFILL)], BAR_CELLS)),
        (110, "model", "left", lambda row: _said(row.model)),
        (130, "daemon", "left", lambda row: _said(row.daemon)),
    )  # fmt: skip


def _daemons(rows: Sequence[DaemonRow], width: int, title: str) -> Lines:
    return _table(
        title, rows, width,
        (0, "daemon", "left", lambda row: _said(row.daemon)),
        (70, "arena", "left", _arena_bar),
        (0, "leased", "right", lambda row: _of(row, lambda view: _bytes(view.leased_bytes))),
        (50, "cached", "right", lambda row: _of(row, lambda view: _bytes(view.cached_bytes))),
        (60, "of", "right", lambda row: _of(row, lambda view: _bytes(view.arena_bytes))),
        (90, "disk", "right", lambda row: _of(row, lambda view: _bytes(view.disk.used_bytes) if view.disk else "")),
        (80, "hits", "right", lambda row: _of(row, _hits)),
        (0, "handoffs", "right", lambda row: _of(row, lambda view: str(view.handoffs_under_way))),
        (100, "failed", "right", lambda row: _of(row, lambda view: str(view.handoffs_failed))),
        (50, "", "left", lambda row: _said(row.error[:60], "red")),
    )  # fmt: skip


def _requests(rows: Sequence[RequestRow], now_unix_s: float, width: int, title: str) -> Lines:
    return _table(
        title, rows, width,
        (60, "began", "left", lambda row: Text(datetime.fromtimestamp(row.began_unix_s).strftime("%H:%M:%S"))),
        (0, "request", "left", lambda row: _said(row.request_id)),
        (110, "model", "left", lambda row: _said(row.model)),
        (70, "way", "left", lambda row: Text(row.way)),
        (0, "ended", "left", lambda row: _ended(row, 24 if width >= 110 else 12)),
        (60, "first", "right", lambda row: Text(_ms(_first_us(row)))),
        (0, "in all", "right", lambda row: Text(_ms(_end_us(row, now_unix_s)))),
        (90, "prefill, decode, streaming", "left", lambda row: _bar(_pieces(row, now_unix_s), TIME_CELLS)),
    )  # fmt: skip


Column = tuple[int, str, Justify, Callable[..., Text]]  # from which width on, its head, how it lies, its cell
Lines = tuple[Text, Table]


def _table(title: str, rows: Iterable[object], width: int, *columns: Column) -> Lines:
    shown = [column for column in columns if width >= column[0]]
    table = Table(box=None, pad_edge=False, padding=(0, 2 if width >= 60 else 1, 0, 0), expand=True)
    for _, head, justify, _ in shown:
        # What others have named may be long: it gets what numbers leave.
        ratio = 1 if head in NAMED else None
        table.add_column(head, justify=justify, no_wrap=True, overflow="ellipsis", header_style="dim", ratio=ratio)
    for row in rows:
        table.add_row(*(cell(row) for _, _, _, cell in shown))
    return Text(f"\n{title}", "bold"), table


def _said(text: str, style: str = "") -> Text:
    """What others said. A terminal would obey an escape sequence in it."""
    return Text("".join(each if each.isprintable() else "·" for each in text), style)


def _bar(pieces: Sequence[Piece], cells: int) -> Text:
    """Pieces of the whole, left to right; one that is there has at least a cell."""
    text, at = Text(), 0
    for start, end, colour in pieces:
        first = min(max(at, int(start * cells)), cells - 1)
        last = min(cells, max(first + (end > start), round(end * cells)))
        text.append("·" * (first - at), "dim")
        text.append("█" * (last - first), colour)
        at = last
    return text.append("·" * (cells - at), "dim")


def _arena_bar(row: DaemonRow) -> Text:
    if row.view is None:
        return Text("")
    leased, cached = (part / row.view.arena_bytes for part in (row.view.leased_bytes, row.view.cached_bytes))
    return _bar([(0, leased, "blue"), (leased, leased + cached, "cyan")], BAR_CELLS)


def _of(row: DaemonRow, shown: Callable[[DaemonView], str]) -> Text:
    return Text(shown(row.view) if row.view is not None else "?", "dim" if row.error else "")


def _hits(view: DaemonView) -> str:
    """Of the blocks that requests without a handle asked for: found in the arena, and on the disk."""
    if not view.lookup_blocks:
        return "–"
    arena, disk = (hits / view.lookup_blocks for hits in (view.arena_hit_blocks, view.disk_hit_blocks))
    return f"{arena:.0%} + {disk:.0%}" if view.disk is not None else f"{arena:.0%}"


def _ended(row: RequestRow, chars: int) -> Text:
    if not row.code:
        return _said((row.reason or "under way")[:chars], "dim")
    words = f"{row.code} {row.reason}".strip()[:chars]
    return _said(words, "red" if row.code >= 500 else "yellow" if row.code >= 400 else "")


def _first_us(row: RequestRow) -> float | None:
    return next((step.at_us for step in row.steps if step.what == "first_byte"), None)


def _end_us(row: RequestRow, now_unix_s: float) -> float:
    if row.code and row.steps:
        return row.steps[-1].at_us
    return (now_unix_s - row.began_unix_s) * 1e6


def _pieces(row: RequestRow, now_unix_s: float) -> list[Piece]:
    """Where the time went, one thing after the other: beside decode, prefill counts until its answer."""
    end = max(1.0, _end_us(row, now_unix_s))
    marks = {step.what: step.at_us for step in row.steps}  # of several calls the last
    told, first = marks.get("prefill_answered"), marks.get("decode_answered")
    pieces: list[Piece] = []
    at = float(marks.get("prefill_sent", marks.get("decode_sent", 0)))
    if "prefill_sent" in marks:
        until = told if told is not None else marks.get("prefill_failed", marks.get("handoff_broke", end))
        pieces.append((at / end, until / end, PREFILL))
        at = until
    if "decode_sent" in marks:
        until = first if first is not None else end
        pieces.append((at / end, max(at, until) / end, WAIT))
        at = max(at, until)
    if first is not None:
        pieces.append((at / end, 1.0, STREAM))
    return pieces


def _ms(us: float | None) -> str:
    if us is None:
        return "–"
    return f"{us / 1e6:.1f} s" if us >= 1e7 else f"{us / 1e3:.0f} ms" if us >= 1e5 else f"{us / 1e3:.1f} ms"


def _span(s: float) -> str:
    unit_s, unit = next(((size, name) for size, name in UNITS_S if s >= 2 * size), (1, "s"))
    return f"{s / unit_s:.0f} {unit}"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
