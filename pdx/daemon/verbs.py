"""What a daemon answers when asked, by a tool of its host or by a router. The live state answers, no copy of it."""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import to_builtins

from pdx.daemon.view import view
from pdx.errors import PdxError, Refused
from pdx.verbs import Clear, Pin, Unpin
from pdx.wire import Answer, Ask

if TYPE_CHECKING:
    from pdx.daemon.service import Service

CHANGES = (Pin, Unpin, Clear)

log = logging.getLogger("pdxd")


def answer(question: Ask, *, service: Service) -> Answer:
    """An error is an answer, with the question's number like every other.

    Raises what else than a refusal a verb meets while it changes what is kept: as with whatever engines say, nothing
    here is to be trusted then. Who only looks ends no daemon.
    """
    try:
        return Answer(number=question.number, body=_body(question, service))
    except Refused as error:
        return Answer(number=question.number, error=str(error))
    except Exception as error:
        if isinstance(question.verb, CHANGES):
            raise
        if isinstance(error, PdxError):
            return Answer(number=question.number, error=str(error))
        log.exception("a question could not be answered")
        return Answer(number=question.number, error=f"this daemon can't answer that, see its log: {error!r}")


def _body(question: Ask, service: Service) -> dict[str, Any]:
    match question.verb:
        case "stats":
            return _stats(service)
        case "health":
            return _health(service)
        case "trace":
            return {"events": service.tracer.events(question.handoff_id)}
        case "view":
            return _plain(view(service, time.monotonic()))
        case "course":
            return _plain(service.tracer.course(question.handoff_id, now_ns=time.monotonic_ns()))
        case "check":
            return _check(service)
        case "spaces":
            return _plain(service.handoffs.spaces.describe(service.sessions.engines.values()))
        case what:
            return _plain(service.handoffs.steer(what, time.monotonic()))


def _plain(result: msgspec.Struct) -> dict[str, Any]:
    body: dict[str, Any] = to_builtins(result)
    return body


def _stats(service: Service) -> dict[str, Any]:
    return {
        "daemon": service.me.daemon_id,
        "counters": dict(service.counters),
        "store": service.store.stats(),
        **service.handoffs.kept(time.monotonic()),
        "handoffs": service.handoffs.describe(),
        "reservations_waiting": service.handoffs.reservations_waiting,
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
    return {
        "daemon": service.me.daemon_id,
        "pid": os.getpid(),
        "incarnation": service.me.incarnation,
        "control": service.me.control,
        "lanes": service.handoffs.lanes(time.monotonic()),
    }


def _check(service: Service) -> dict[str, Any]:
    """Raises IntegrityError."""
    service.store.check_integrity()
    return {"store": repr(service.store)}
