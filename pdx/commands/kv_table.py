"""A report for people, or for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator

import msgspec

from pdx.admin import DaemonReport, Report
from pdx.verbs import Cleared, Found, Pinned, Result, TierCleared, Unpinned


def as_json(report: Report) -> str:
    return json.dumps(msgspec.to_builtins(report), indent=2)


def as_table(report: Report) -> str:
    """One line a result; numbers of `stats` as JSON, which is what they are read by."""
    if not report.daemons:  # of a router: on one's own host nobody answers without one
        return "no daemon has announced an engine"
    head = [f"{report.model}, a prompt of {report.prompt_tokens} tokens"] if report.prompt_tokens is not None else []
    return "\n".join([*head, *(line for daemon in report.daemons for line in _lines(daemon))])


def _lines(report: DaemonReport) -> Iterator[str]:
    if report.body:
        yield f"{report.daemon}  {json.dumps(report.body, indent=2)}"
    for result in report.results:
        yield f"{report.daemon}  {_sentence(result)}"


def _sentence(result: Result) -> str:
    match result:
        case Found():
            return (
                f"{result.tokens} tokens in {result.blocks} blocks: {result.arena_blocks} in memory, "
                f"{result.disk_blocks} on disk only; generation {result.generation}"
            )
        case Pinned():
            coming = f", {result.coming_blocks} still coming from disk" if result.coming_blocks else ""
            return (
                f"{result.name}: {result.blocks} blocks pinned for {result.ttl_s:g} s{coming}; "
                f"{result.used_bytes} of {result.budget_bytes} bytes"
            )
        case Unpinned():
            return f"{result.name}: {result.blocks} blocks unpinned"
        case Cleared():
            done = "would clear" if result.dry_run else "cleared"
            pins = f"; {result.pins_ended} pins ended" if result.pins_ended else ""
            return f"{done} {_tier(result.arena)} in memory, {_tier(result.disk)} on disk{pins}"


def _tier(cleared: TierCleared) -> str:
    notes = [
        f"{count} {what}"
        for count, what in ((cleared.held, "held"), (cleared.filling, "being filled"), (cleared.leaving, "to delete"))
        if count
    ]
    return f"{cleared.blocks} blocks ({', '.join([f'{cleared.size_bytes} bytes', *notes])})"
