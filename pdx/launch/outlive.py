"""Who of those that were started together may die, and what becomes of the others. For `serve` and `up` alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from pdx.launch.engine import EngineSpec
from pdx.launch.supervise import ChildDied, Supervisor

# What has died is started anew, later each time: of a daemon that was killed the arena stays as long as engines map it,
# and another may not fit beside it. What dies more often within AGAIN_S would go on dying.
PAUSES_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
AGAIN_S = 60.0


def serve_on(
    supervisor: Supervisor,
    engines: Sequence[EngineSpec],
    *,
    needed: str,
    restart: Mapping[str, Callable[[], None]] | None = None,
) -> None:
    """Until a signal (raises Interrupted), or the death of what nothing can go on without (raises ChildDied).

    Engines may die while one of the role `needed` is left. What `restart` names is started anew.
    """
    again = restart or {}
    alive = {spec.name: spec.role for spec in engines}
    deaths: dict[str, list[float]] = {}
    due: dict[str, float] = {}  # name -> when it is started anew
    while True:
        now = time.monotonic()
        for name in [name for name, at in due.items() if at <= now]:
            del due[name]
            again[name]()
        try:
            supervisor.wait(min(due.values()) - now if due else None)
        except ChildDied as died:
            was_engine = alive.pop(died.name, None) is not None
            now = time.monotonic()
            deaths[died.name] = lately = [at for at in deaths.get(died.name, []) if now - at < AGAIN_S] + [now]
            if died.name in again and len(lately) <= len(PAUSES_S):
                pause_s = PAUSES_S[len(lately) - 1]
                due[died.name] = now + pause_s
                what = f"it is started anew{f' in {pause_s:g} s' if pause_s else ''}, empty"
            elif was_engine and needed in alive.values():
                what = f"the others serve on: {', '.join(alive)}"
            else:
                raise
            supervisor.bury(died.name)
            supervisor.say(f"{str(died).partition(';')[0]}; {what}")
