"""What a daemon answers when asked: stats, health, trace, check. Read-only; the live state answers, no copy of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pdx.errors import IntegrityError
from pdx.wire import Answer, Ask

if TYPE_CHECKING:
    from pdx.daemon.service import Service


def answer(question: Ask, *, service: Service) -> Answer:
    match question.verb:
        case "stats":
            return Answer(body=_stats(service))
        case "health":
            return Answer(body=_health(service))
        case "trace":
            return Answer(body={"events": service.tracer.events(question.handoff_id)})
        case "check":
            return _check(service)


def _stats(service: Service) -> dict[str, Any]:
    return {
        "daemon": service.me.daemon_id,
        "counters": dict(service.counters),
        "store": service.store.stats(),
        "handoffs": service.mover.describe(),
        "reservations_waiting": service.mover.reservations_waiting,
        "engines": {
            name: {
                "role": e.info.role,
                "model": e.info.model,
                "complete": e.complete,
                "running": e.running,
                "waiting": e.waiting,
            }
            for name, e in service.sessions.engines.items()
        },
    }


def _health(service: Service) -> dict[str, Any]:
    return {"daemon": service.me.daemon_id, "control": service.me.control, "lanes": service.me.lanes}


def _check(service: Service) -> Answer:
    try:
        service.store.check_integrity()
    except IntegrityError as error:
        return Answer(error=str(error))
    return Answer(body={"store": repr(service.store)})
