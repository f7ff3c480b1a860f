"""What a daemon takes an engine for, in whatever order its processes come."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from itertools import permutations

import msgspec
import pytest
from one_host import PAGES, engine

from pdx.daemon.sessions import Sessions
from pdx.errors import Refused
from pdx.members import EngineInfo
from pdx.wire import Attach


@pytest.fixture
def connection() -> Iterator[socket.socket]:
    with socket.socket() as one:
        yield one


def of_two_ranks() -> EngineInfo:
    info = engine("P").info
    return msgspec.structs.replace(info, layout=msgspec.structs.replace(info.layout, ranks=2))


@pytest.mark.parametrize("order", list(permutations(("scheduler", 0, 1))))
def test_what_only_the_scheduler_knows_counts(order: tuple[str | int, ...], connection: socket.socket) -> None:
    """vLLM may switch prefix caching off when its workers are there already; updates of weights it tells of alone."""
    sessions, info = Sessions(incarnation=1), of_two_ranks()
    known = msgspec.structs.replace(info.at("abcd"), shares_blocks=False)
    for who in order:
        if isinstance(who, int):
            sessions.attach(Attach(kind="worker", engine=info, pages=PAGES, rank=who), connection)
        else:
            sessions.attach(Attach(kind="scheduler", engine=known), connection)
    assert sessions.engines["P"].complete
    assert sessions.engines["P"].info == known


def test_ranks_that_differ_are_refused(connection: socket.socket) -> None:
    sessions, info = Sessions(incarnation=1), of_two_ranks()
    sessions.attach(Attach(kind="worker", engine=info, pages=PAGES, rank=0), connection)
    other = msgspec.structs.replace(info, content=msgspec.structs.replace(info.content, dtype="other"))
    with pytest.raises(Refused, match="differ in model or layout"):
        sessions.attach(Attach(kind="worker", engine=other, pages=PAGES, rank=1), connection)
