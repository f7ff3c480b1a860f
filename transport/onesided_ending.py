"""The end of one channel of a one-sided lane: a break can't take back what the network has, so that is waited for.

Until every write has ended nobody may reuse what it reads or what it writes to: hence the puts stay open, and the
connection too, whose end says to the peer that nothing comes any more. BYE is said only if all ended well. What has not
ended in time the fabric is asked to cut off; where it can't, the memory stays held. The loss is told at once, before
what has not ended yet: for as long as it is not, new handoffs take the channel, and fail.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence

from pdx.errors import PdxError
from pdx.transport.api import Event, PeerLost, PutFailed
from pdx.transport.fabric import Fabric, Transfer
from pdx.transport.link import Link
from pdx.transport.link_messages import Bye

logger = logging.getLogger(__name__)

# Longer than a NIC repeats a write into a dead host, and than the keep-alive of what goes over sockets.
PATIENCE_S = 15.0
# What can't be cut off is asked for again so often.
RETRY_S = 1.0


class Ending:
    """Owned by the reactor's thread: advance() until it is over, or end_now() once the fabric is closed."""

    def __init__(
        self,
        number: int,
        endpoint: str,
        reason: str,
        *,
        link: Link | None,
        fabric: Fabric,
        peer: str,
        emit: Callable[[Event], None],
        is_ours: bool,
        tickets: Sequence[int],
        under_way: Sequence[Transfer],
        is_in_doubt: bool,
        now: float,
    ) -> None:
        """`is_ours`: without PeerLost. `is_in_doubt`: a write failed, of which some may be under way."""
        self._loss = PeerLost(number, endpoint, reason)
        self._link = link
        self._fabric = fabric
        self._peer = peer
        self._emit = emit
        self._tickets = tickets
        self._under_way = list(under_way)
        self._failed: list[Transfer] = []
        self._is_in_doubt = is_in_doubt
        self._is_told = is_ours
        self._cut_at_s = now + PATIENCE_S
        self._is_held = False

    def advance(self, now: float) -> bool:
        """Collects what has ended. Whether all has, and the puts with it."""
        for transfer in list(self._under_way):
            try:
                if not self._fabric.is_done(transfer):
                    continue
            except PdxError as error:
                logger.debug("a write to %s failed: %s", self._loss.endpoint, error)
                self._failed.append(transfer)
            except Exception:  # whatever it is, this write is waited for no longer
                logger.exception("a write to %s can't be asked for", self._loss.endpoint)
                self._failed.append(transfer)
            self._under_way.remove(transfer)
        if now < self._cut_at_s and (self._under_way or self._is_held):
            self._tell_loss()
            return False
        if not self._has_broken():
            self._is_held = True
            self._cut_at_s = now + RETRY_S
            self._tell_loss()
            return False
        self._end(is_clean=not (self._under_way or self._failed or self._is_in_doubt))
        return True

    def end_now(self) -> None:
        """The fabric is closed: it touches no memory any more."""
        self._end(is_clean=False)

    def _has_broken(self) -> bool:
        if not self._peer:
            return True
        try:
            return self._fabric.drop_peer(self._peer, [*self._under_way, *self._failed])
        except Exception:
            logger.exception("the fabric does not let go of %s", self._loss.endpoint)
            self._is_in_doubt = True
            return not self._under_way

    def _end(self, *, is_clean: bool) -> None:
        if self._link is not None:
            if is_clean:
                with contextlib.suppress(OSError, PdxError):  # then it learns from the end of the connection
                    self._link.send(Bye())
            with contextlib.suppress(OSError):
                self._link.close()
        for ticket in self._tickets:
            self._emit(PutFailed(ticket, self._loss.reason))
        self._tell_loss()

    def _tell_loss(self) -> None:
        if not self._is_told:
            self._is_told = True
            self._emit(self._loss)
