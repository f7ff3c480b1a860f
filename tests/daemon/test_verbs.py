"""What becomes of a question that a daemon can't answer: who looks hears it, who changes something ends the daemon."""

from __future__ import annotations

from typing import Any, cast

import pytest

from pdx.daemon.service import Service
from pdx.daemon.verbs import answer
from pdx.errors import IllegalTransition, IntegrityError, Refused
from pdx.keys import SPACE_BYTES
from pdx.verbs import Clear, Lookup, Pin, Unpin
from pdx.wire import Ask

SPACE = bytes(SPACE_BYTES)
LOOKS = ["stats", "spaces", "view", "check", Lookup(space=SPACE, block_hashes=[])]
CHANGES = [Pin(name="n", ttl_s=1.0, space=SPACE, block_hashes=[]), Unpin(name="n"), Clear()]


class Broken:
    """A service of which nothing can be had."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        raise self._error


def asked(verb: Any, error: Exception) -> str:
    reply = answer(Ask(verb=verb, number=7), service=cast(Service, Broken(error)))
    assert (reply.number, reply.body) == (7, {})
    return reply.error


@pytest.mark.parametrize("verb", LOOKS)
def test_who_only_looks_ends_no_daemon(verb: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert "see its log: KeyError('slot')" in asked(verb, KeyError("slot"))
    (record,) = caplog.records
    assert record.exc_info is not None
    assert asked(verb, IntegrityError("units do not add up")) == "units do not add up"


@pytest.mark.parametrize("verb", CHANGES)
def test_what_breaks_half_done_is_not_served_on(verb: Any) -> None:
    assert asked(verb, Refused("over the budget")) == "over the budget"
    for error in (KeyError("slot"), IllegalTransition("release of a lease that has ended")):
        with pytest.raises(type(error)):
            asked(verb, error)
