"""Brings a prompt's blocks from the host that has them to the one that is about to compute it, where that is sooner.

It is so when the holder has too much to do (its requests go elsewhere then) and the link is faster than computing. The
holder's daemon is told to put its blocks into the other's arena, and the request waits for them, since an engine looks
for a prompt's blocks once, when it comes: until the daemon says that it has them, or for twice the time that was
predicted. Requests that want the same blocks at the same place wait together.

Owned by the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pdx.keys import tenant_of
from pdx.router.choice.forecast import Bring
from pdx.router.choice.knowledge import Knowledge
from pdx.router.choice.prompt import Prompt
from pdx.wire import DaemonRef, Share

UNDER_WAY_MAX = 256
WAIT_OVER_PREDICTED = 2.0
WAIT_MORE_S = 0.1  # until the daemon has said so: its turns come every 0.05 s


class Sharing:
    """`counted` hears how each wait ended: "came", "late", or "full" where none began."""

    def __init__(
        self,
        knowledge: Knowledge,
        tell: Callable[[DaemonRef, Share], None],
        counted: Callable[[str], None] = lambda outcome: None,
    ) -> None:
        self._knowledge = knowledge
        self._tell = tell
        self._waiting: dict[tuple[str, int], _Wait] = {}  # by target daemon and last block
        self._counted = counted

    async def bring(self, bring: Bring, prompt: Prompt, *, salt: str) -> None:
        """Returns when the blocks have come, or when waiting is over."""
        space, daemon, blocks = bring.target.space, bring.target.daemon, prompt.blocks
        assert blocks is not None  # some of them are known somewhere
        names = blocks.names(space)[: bring.blocks]
        key = daemon.daemon_id, names[-1]
        wait = self._waiting.get(key)
        if wait is None:
            if len(self._waiting) >= UNDER_WAY_MAX:
                self._counted("full")
                return
            wait = self._waiting[key] = _Wait(names, asyncio.get_running_loop().create_future())
            hashes = list(blocks.hashes(space)[: bring.blocks])
            wish = Share(
                to=daemon, engine=bring.target.engine_id, space=space, tenant=tenant_of(salt), block_hashes=hashes
            )
            self._tell(bring.source.daemon, wish)
        wait.waiters += 1
        try:
            async with asyncio.timeout(bring.seconds * WAIT_OVER_PREDICTED + WAIT_MORE_S):
                await asyncio.shield(wait.came)
            self._counted("came")
        except TimeoutError:
            self._counted("late")
        finally:
            wait.waiters -= 1
            if not wait.waiters and self._waiting.get(key) is wait:
                del self._waiting[key]

    def heard(self, daemon_id: str, now: float) -> None:
        """This daemon has said something about what it keeps."""
        for (waited_for, _), wait in self._waiting.items():
            if waited_for == daemon_id and not wait.came.done():
                found = self._knowledge.found(wait.names, now).get(daemon_id)
                if found is not None and found.blocks == len(wait.names):
                    wait.came.set_result(None)

    def __repr__(self) -> str:
        return f"<Sharing {len(self._waiting)} under way>"


class _Wait:
    def __init__(self, names: tuple[int, ...], came: asyncio.Future[None]) -> None:
        self.names = names
        self.came = came
        self.waiters = 0
