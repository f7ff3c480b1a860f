"""Asks daemons, all at once and with one deadline. A daemon that does not answer is an answer too, with its error.

Owned by the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import msgspec

from pdx.admin import DaemonReport
from pdx.errors import DaemonGone
from pdx.router.engines.directory import Directory
from pdx.router.engines.registry import Registry
from pdx.verbs import Result, SpaceInfo, Spaces, Steer
from pdx.wire import Answer, Ask, DaemonRef

ASK_S = 5.0  # they answer in milliseconds
OPEN_MAX = 64  # questions to one daemon at once: kinds of blocks of one model


class Daemons:
    """Those that have announced themselves to this router."""

    def __init__(self, directory: Directory, registry: Registry) -> None:
        self._directory = directory
        self._registry = registry

    async def asked(self, question: Ask) -> list[DaemonReport]:
        """The same of all, whose answers are numbers."""
        silent, refs = self._silent(), self._directory.daemons()
        answers = await asyncio.gather(*(self._ask(ref, question) for ref in refs))
        heard = [
            DaemonReport(daemon=ref.daemon_id, body=answer.body, error=answer.error)
            for ref, answer in zip(refs, answers, strict=True)
        ]
        return [*heard, *silent]

    async def spaces(self) -> tuple[dict[str, list[SpaceInfo]], list[DaemonReport]]:
        """What each daemon has met, and reports of those that did not say."""
        infos, silent = {}, []
        for report in await self.asked(Ask(verb="spaces")):
            if report.error:
                silent.append(report)
            else:
                infos[report.daemon] = msgspec.convert(report.body, Spaces).spaces
        return infos, silent

    async def steered(self, verbs: Mapping[str, Sequence[Steer]]) -> list[DaemonReport]:
        """Verbs by daemon id; of a daemon that has left meanwhile the report says so."""
        return list(await asyncio.gather(*(self._steer(daemon, each) for daemon, each in verbs.items())))

    async def steered_alike(self, verb: Steer) -> list[DaemonReport]:
        """The same of all."""
        silent = self._silent()
        asked = await self.steered({ref.daemon_id: [verb] for ref in self._directory.daemons()})
        return [*asked, *silent]

    def _silent(self) -> list[DaemonReport]:
        """They may be back, with all that they keep."""
        error = "this daemon has fallen silent, and was not asked"
        return [DaemonReport(daemon=daemon, error=error) for daemon in self._directory.silent_daemons()]

    async def _steer(self, daemon: str, verbs: Sequence[Steer]) -> DaemonReport:
        ref = next((ref for ref in self._directory.daemons() if ref.daemon_id == daemon), None)
        if ref is None:
            return DaemonReport(daemon=daemon, error="this daemon has left")
        answers: list[Answer] = []
        for at in range(0, len(verbs), OPEN_MAX):
            answers += await asyncio.gather(*(self._ask(ref, Ask(verb=verb)) for verb in verbs[at : at + OPEN_MAX]))
        results = [msgspec.convert(answer.body, Result) for answer in answers if not answer.error]
        return DaemonReport(daemon=daemon, results=results, error=next((a.error for a in answers if a.error), ""))

    async def _ask(self, ref: DaemonRef, question: Ask) -> Answer:
        try:
            return await self._registry.ask(ref, question, timeout_s=ASK_S)
        except DaemonGone as error:
            return Answer(error=str(error))
