"""Answers whoever looks: engines from the directory, requests from the recorder, daemons by asking them.

Nobody looks, nobody is asked. Each daemon is asked once at a time and at most once in VIEW_S, however many look; one
that does not answer holds up nobody: its last view is shown, with its age.

Owned by the event loop.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from contextlib import suppress

import msgspec

from pdx import __version__
from pdx.errors import DaemonGone
from pdx.router.choice.policy import Side
from pdx.router.engines.directory import KnownEngine
from pdx.router.live.recorder import Record
from pdx.router.live.values import DaemonJournal, DaemonRow, EngineRow, Health, Journal, Live, PlacedMark, PlacedPages
from pdx.router.outside import Outside
from pdx.verbs import Course, DaemonView
from pdx.wire import Answer, Ask, DaemonRef

VIEW_S = 0.9  # pages ask once a second
WAIT_S = 0.25  # a page waits so long for daemons at the most; healthy ones take milliseconds
VIEW_DEADLINE_S = 3.0
JOURNAL_DEADLINE_S = 2.0
ERROR_CHARS_MAX = 200
REASONS_MAX = 32


class LiveFeed:
    """Close it: questions may be under way."""

    def __init__(self, outside: Outside) -> None:
        self._outside = outside
        self._run = secrets.token_hex(8)
        self._began_unix_s = time.time()
        self._seen: dict[str, _Seen] = {}

    async def live(self, run: str, cursor: int) -> Live:
        """`run` and `cursor`: of the last answer; of another run, all that is remembered is new."""
        now = time.monotonic()
        await self._look(now)
        requests, following, more = self._outside.recorder.since(cursor if run == self._run else 0)
        return Live(
            run=self._run,
            version=__version__,
            began_unix_s=self._began_unix_s,
            now_unix_s=time.time(),
            engines=self._engines(),
            daemons=self._daemons(time.monotonic()),
            requests=requests,
            next=following,
            more=more,
            keeps=self._outside.recorder.keeps,
            queued=len(self._outside.gate.queue),
            reasons=[reason[:ERROR_CHARS_MAX] for reason in self._outside.reasons()[:REASONS_MAX]],
        )

    async def journal(self, handoff_id: bytes) -> Journal | None:
        """A request, and what its daemons remember of its handoff; None if it is not remembered here."""
        record = self._outside.recorder.of_handoff(handoff_id) if handoff_id else None
        if record is None:
            return None
        told = await asyncio.gather(*(self._told(record, ref, sides) for ref, sides in record.daemons.values()))
        return Journal(request=record.row(), daemons=list(told))

    async def close(self) -> None:
        """Idempotent."""
        tasks = [seen.question for seen in self._seen.values() if seen.question is not None]
        self._seen.clear()
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    # --- daemons' views ---------------------------------------------------------------------------------------

    async def _look(self, now: float) -> None:
        alive = {seen.ref.daemon_id: seen.ref for seen in self._outside.directory.known_daemons()}
        for daemon in set(self._seen) - set(alive):
            gone = self._seen.pop(daemon)
            if gone.question is not None:
                gone.question.cancel()
        for daemon, ref in alive.items():
            seen = self._seen.setdefault(daemon, _Seen())
            if seen.question is None and now - seen.asked_at >= VIEW_S:
                seen.asked_at = now
                seen.question = asyncio.create_task(self._view(seen, ref))
        asked = [seen.question for seen in self._seen.values() if seen.question is not None]
        if asked:
            await asyncio.wait(asked, timeout=WAIT_S)

    async def _view(self, seen: _Seen, ref: DaemonRef) -> None:
        try:
            answer = await self._outside.registry.ask(ref, Ask(verb="view"), timeout_s=VIEW_DEADLINE_S)
            seen.take(answer, time.monotonic())
        except DaemonGone as error:
            seen.error = str(error)[:ERROR_CHARS_MAX]
        finally:
            seen.question = None

    def _daemons(self, now: float) -> list[DaemonRow]:
        rows = []
        for known in self._outside.directory.known_daemons():
            seen = self._seen.get(known.ref.daemon_id) or _Seen()
            row = DaemonRow(
                daemon=known.ref.daemon_id,
                lanes=[offer.endpoint for offer in known.ref.lanes],
                heard_s=round(now - known.heard_at, 3),
                view=seen.view,
                view_s=round(now - seen.view_at, 3) if seen.view is not None else 0.0,
                error=seen.error,
            )
            rows.append(row)
        return sorted(rows, key=lambda row: row.daemon)

    def _engines(self) -> list[EngineRow]:
        flight, line, standing = self._outside.in_flight, self._outside.in_line, self._outside.standing
        ejected = standing.ejected()

        def health(known: KnownEngine) -> Health:
            if known.health != "ready":
                return known.health
            engine_id = known.info.engine_id
            return "drained" if engine_id in standing.drained else "ejected" if engine_id in ejected else "ready"

        rows = [
            EngineRow(
                engine_id=known.info.engine_id,
                role=known.info.role,
                model=known.info.model,
                url=known.info.url,
                daemon=known.daemon.daemon_id,
                health=health(known),
                waiting=known.waiting,
                in_line=line[known.info.engine_id],
                in_flight=flight[known.info.engine_id],
            )
            for known in self._outside.directory.known_engines()
        ]
        return sorted(rows, key=lambda row: (row.role, row.engine_id))

    # --- one handoff ------------------------------------------------------------------------------------------

    async def _told(self, record: Record, ref: DaemonRef, sides: list[Side]) -> DaemonJournal:
        asked_at = time.monotonic()
        try:
            question = Ask(verb="course", handoff_id=record.handoff_id)
            answer = await self._outside.registry.ask(ref, question, timeout_s=JOURNAL_DEADLINE_S)
            if answer.error:
                raise DaemonGone(answer.error)
            course = msgspec.convert(answer.body, Course)
        except (DaemonGone, msgspec.ValidationError) as error:
            return DaemonJournal(daemon=ref.daemon_id, sides=sides, error=str(error)[:ERROR_CHARS_MAX])
        return placed(course, ref.daemon_id, sides, began_at=record.began_at, span=(asked_at, time.monotonic()))


class _Seen:
    """What a daemon has last said of itself."""

    def __init__(self) -> None:
        self.view: DaemonView | None = None
        self.view_at = 0.0
        self.error = ""
        self.asked_at = float("-inf")
        self.question: asyncio.Task[None] | None = None

    def take(self, answer: Answer, now: float) -> None:
        try:
            if answer.error:
                raise msgspec.ValidationError(answer.error)
            self.view, self.view_at, self.error = msgspec.convert(answer.body, DaemonView), now, ""
        except msgspec.ValidationError as error:  # another version's daemon is still a daemon
            self.error = str(error)[:ERROR_CHARS_MAX]


def placed(
    course: Course, daemon: str, sides: list[Side], *, began_at: float, span: tuple[float, float]
) -> DaemonJournal:
    """A daemon's course on the clock of the router, which asked and heard at `span`: see DaemonJournal."""
    middle_us, daemon_us = sum(span) / 2 * 1e6, course.now_ns / 1e3
    shift_us = middle_us - daemon_us - began_at * 1e6

    def at(ns: int) -> int:
        return round(ns / 1e3 + shift_us)

    return DaemonJournal(
        daemon=daemon,
        sides=sides,
        within_us=round((span[1] - span[0]) / 2 * 1e6),
        marks=[PlacedMark(mark.what, at(mark.at_ns), mark.note) for mark in course.marks],
        computed=[PlacedPages(at(event.at_ns), event.layer, event.pages) for event in course.computed],
        landed=[PlacedPages(at(event.at_ns), event.layer, event.pages) for event in course.landed],
        whole=course.whole,
    )
