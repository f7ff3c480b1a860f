"""What a disk tier takes over from its earlier lives, and leaves to the next.

What can't be deleted then stays charged, and is tried again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from pdx.layout import ALIGN_BYTES
from pdx.tiers import sealed
from pdx.tiers.folder import Files, errno_name
from pdx.tiers.ledger import Ledger

log = logging.getLogger(__name__)


def adopt(files: Files, ledger: Ledger, *, now: float) -> list[str]:
    """Into the ledger, oldest first, so that the youngest are evicted last. Returns doomed names that are still there.

    Raises OSError if nothing can be read.
    """
    now_ns, undeleted = time.time_ns(), []
    for file in sorted(files.scan(), key=lambda file: (file.written_at_ns, file.name)):
        if not sealed.is_name(file.name):
            continue  # none of ours
        since = now - max(0.0, (now_ns - file.written_at_ns) * 1e-9)
        ledger.adopt(file.name, file.allocated_bytes + files.unit_bytes, since=since)
        is_torn = file.size_bytes < 2 * ALIGN_BYTES or file.size_bytes % ALIGN_BYTES  # by a crash of the machine
        if file.is_doomed and ledger.condemn(file.name):  # there may be many: not while somebody waits for the start
            undeleted.append(file.name)
        if is_torn and ledger.condemn(file.name):
            undeleted += _delete(files, ledger, file.name)
    for name in ledger.surplus():
        undeleted += _delete(files, ledger, name)
    return undeleted


def bequeath(files: Files, names: Sequence[str]) -> None:
    """What is still to be deleted as the tier ends is found no more."""
    try:
        files.leave(names)
    except OSError as error:
        reason = errno_name(error.errno)
        if names:
            log.warning("%d cleared blocks of %r may be found again by its next life: %s", len(names), files, reason)


def _delete(files: Files, ledger: Ledger, name: str) -> list[str]:
    """The name, if it can't be deleted now."""
    try:
        files.remove(name)
    except OSError as error:
        log.warning("a file of the disk tier can't be deleted: %s: %s", name, errno_name(error.errno))
        return [name]
    ledger.delete(name)
    return []
