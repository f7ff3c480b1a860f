"""Who of those that were started together may die, and what becomes of the others. For `serve` and `up` alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from pdx.launch.engine import EngineSpec
from pdx.launch.supervise import ChildDied, Supervisor

AGAIN_S = 60.0  # what dies again within this time of its new start would go on dying


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
    alive = {spec.name: spec.role for spec in engines}
    started_at: dict[str, float] = {}
    while True:
        try:
            supervisor.wait()
        except ChildDied as died:
            start = (restart or {}).get(died.name)
            was_engine = alive.pop(died.name, None) is not None
            now = time.monotonic()
            if start is not None and now - started_at.get(died.name, -AGAIN_S) >= AGAIN_S:
                what = "it is started anew, empty"
            elif was_engine and needed in alive.values():
                what = f"the others serve on: {', '.join(alive)}"
            else:
                raise
            supervisor.bury(died.name)
            supervisor.say(f"{str(died).partition(';')[0]}; {what}")
            if start is not None:
                started_at[died.name] = now
                start()
