"""Every exception pdx raises, by whose fault it is. The whole tree stands on this page.

Foreign errors (OSError, zmq.ZMQError, msgspec errors) are translated where they enter, with `from`.
"""


class PdxError(Exception):
    """Base of all errors raised by pdx on purpose."""


class ConfigError(PdxError):
    """The operator's configuration cannot work. The message names the key and the fix; start nothing."""


class Refused(PdxError):
    """A layout, fingerprint, model or request pdx does not support today. Never guess: stop or recompute."""


class MemoryShort(ConfigError):
    """The arena asked for does not fit in this machine's memory or cgroup. Choose a smaller --arena."""


class WireError(PdxError):
    """The other side sent bytes that are no message of ours. Drop them, count a strike against the peer."""


class TooLarge(PdxError):
    """A message has no room in a frame: who sent it would lose the connection. Serve its request without pdx."""


class VersionMismatch(WireError):
    """The other side speaks another wire version. Upgrade one of the two; nothing was decoded."""


class HandleError(PdxError):
    """A transfer handle is forged, expired, replayed or meant for somebody else. Serve without it."""


class DaemonGone(PdxError):
    """pdxd does not answer or has died. Unmap, serve without a cache, attach again with backoff."""


class DeviceShort(PdxError):
    """The accelerator has no memory for what a copy needs besides its pages. This copy fails, later ones may not."""


class DeviceLost(PdxError):
    """The accelerator reported an error that no later call survives. The engine is lost too; nothing copied counts."""


class IllegalTransition(PdxError):
    """Our own bug: an event that a state table does not allow. The state has not changed."""


class IntegrityError(PdxError):
    """Our own bug: the accounting of slots, leases or index does not add up."""


class TransportError(PdxError):
    """Base of what a lane can report."""


class PeerGone(TransportError):
    """The peer vanished or the connection broke. Every put under way has failed; connect again later."""


class ClosedTransport(TransportError):
    """This side closed the transport or channel before the call. Fix the caller."""


class UnknownTransport(TransportError):
    """No lane of that URL scheme. The message lists those that there are."""


class TierError(PdxError):
    """Base of what a tier can report."""


class TierUnusable(TierError):
    """This folder can't be a tier: not writable, too small, or in use. The message says why."""


class TierBroken(TierUnusable):
    """The medium fails, is full or read-only, which no setting is to blame for. Serve without it."""

    def __init__(self, message: str, errno: int) -> None:
        super().__init__(message)
        self.errno = errno


class ClosedTier(TierError):
    """This side closed the tier before the call. Fix the caller."""


class BadBlock(TierError):
    """What the medium gave back is not what was written. A miss: delete it and recompute."""
