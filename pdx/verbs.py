"""What operators may ask a daemon to do with the blocks that it keeps, and what it answers. Values, no behaviour.

A prompt is named as the engine names it: the space of its blocks (keys.space_of), its tenant, the hashes of its full
blocks (see `chain`). So a daemon never sees a text, and who does not know a tenant's salt can't name its blocks.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pdx.keys import SPACE_BYTES, TENANT_BYTES, ContentFingerprint, LayoutFingerprint

PIN_S_MAX = 7 * 24 * 3600.0
NAME_CHARS_MAX = 128
MARK_CHARS_MAX = 200
HANDOFFS_SHOWN = 64  # of one daemon, in a view

Space = Annotated[bytes, Meta(min_length=SPACE_BYTES, max_length=SPACE_BYTES)]
Tenant = Annotated[bytes, Meta(max_length=TENANT_BYTES)]
BlockHash = Annotated[bytes, Meta(max_length=64)]
Name = Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)]
Seconds = Annotated[float, Meta(ge=0.0)]
PinSeconds = Annotated[float, Meta(gt=0.0, le=PIN_S_MAX)]
TierName = Literal["all", "arena", "disk"]
Lanes = Annotated[dict[str, int], Meta(max_length=16)]  # by scheme; "local" is within the daemon


class Shape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base: frozen, unknown fields refused."""


class Lookup(Shape, tag="lookup", frozen=True, kw_only=True):
    """How many of this prompt's blocks would a request that came now get, beside what its engine has itself?"""

    space: Space
    tenant: Tenant = b""
    block_hashes: list[BlockHash]


class Found(Shape, tag="found", frozen=True, kw_only=True):
    """Leading blocks. Those behind the first that is nowhere are of no use, and not counted.

    Answers of one incarnation and generation say the same: as long as it stays, nothing has come, left or been evicted.
    """

    blocks: int
    tokens: int  # in them; a request computes at least its last token all the same
    arena_blocks: int
    disk_blocks: int  # on the disk only; they come up if the arena has room for them
    generation: int


class Pin(Shape, tag="pin", frozen=True, kw_only=True):
    """Keep what there is of this prompt until its time is over. A name that is pinned already moves to this prompt."""

    name: Name
    ttl_s: PinSeconds
    space: Space
    tenant: Tenant = b""
    block_hashes: list[BlockHash]


class Pinned(Shape, tag="pinned", frozen=True, kw_only=True):
    """`blocks` are held in the arena; of them `coming_blocks` have yet to come from the disk, if there is room then."""

    name: str
    blocks: int
    coming_blocks: int = 0
    size_bytes: int = 0  # of the slots held: neighbours in them are held too
    ttl_s: float = 0.0
    used_bytes: int = 0  # by all pins together; slots that several hold count once
    budget_bytes: int = 0


class Unpin(Shape, tag="unpin", frozen=True, kw_only=True):
    """End a pin. Its blocks are cache again."""

    name: Name
    tenant: Tenant = b""


class Unpinned(Shape, tag="unpinned", frozen=True, kw_only=True):
    """`blocks`: 0 where nothing was pinned under this name, for example after an unpin."""

    name: str
    blocks: int


class Clear(Shape, tag="clear", frozen=True, kw_only=True):
    """Make blocks unreachable: those that all given fields take. With none given, everything.

    `block_hashes` are one prompt's: exactly one tenant must be named then, and its spaces.
    """

    model: str | None = None  # all of this model; refused where blocks are kept of which nobody knows the model
    spaces: list[Space] | None = None  # with a model: which are its, as others know; the daemon adds what it knows
    tenant: Tenant | None = None
    block_hashes: list[BlockHash] | None = None
    tier: TierName = "all"
    older_s: Seconds = 0.0  # kept there for at least so long
    dry_run: bool = False


class TierCleared(Shape, frozen=True, kw_only=True):
    """`blocks` are those that lookups found before. None of them is found from now on."""

    blocks: int = 0
    size_bytes: int = 0
    held: int = 0  # of `blocks`: their bytes stay until a lease ends, or until the rest of their slot goes
    filling: int = 0  # being computed or loaded: whoever waits for them gets them, no lookup will find them
    leaving: int = 0  # all files that are to be deleted and still exist; a daemon killed before finds them again


class Cleared(Shape, tag="cleared", frozen=True, kw_only=True):
    arena: TierCleared
    disk: TierCleared
    pins_ended: int = 0  # those of which nothing is left
    dry_run: bool = False


class SpaceInfo(Shape, frozen=True, kw_only=True):
    """A space that an engine of this daemon has, or had: with a disk, in earlier lives too."""

    content: ContentFingerprint
    layout: LayoutFingerprint
    attached: int = 0  # its engines that are there now
    urls: list[str] = msgspec.field(default_factory=list)  # of those that serve HTTP


class Spaces(Shape, frozen=True, kw_only=True):
    spaces: list[SpaceInfo]


class Mark(Shape, frozen=True, array_like=True):
    """Something that happened once in a handoff. Times are the daemon's monotonic nanoseconds."""

    what: Annotated[str, Meta(max_length=32)]
    at_ns: int
    note: Annotated[str, Meta(max_length=MARK_CHARS_MAX)] = ""


class PageEvent(Shape, frozen=True, array_like=True):
    """`pages` of one layer, at once."""

    at_ns: int
    layer: int
    pages: int


class Course(Shape, frozen=True, kw_only=True):
    """What one daemon remembers of a handoff, if anything. `computed`: saved here by prefill's engine."""

    now_ns: int  # the daemon's clock when it answered
    marks: Annotated[list[Mark], Meta(max_length=256)] = []
    computed: Annotated[list[PageEvent], Meta(max_length=8192)] = []
    landed: Annotated[list[PageEvent], Meta(max_length=8192)] = []
    whole: bool = True  # False: there were more than it remembers


class HandoffView(Shape, frozen=True, kw_only=True):
    """One half of a handoff that is under way. `pages` have left, or have landed, of `pages_wanted`."""

    handoff: Annotated[str, Meta(max_length=64)]  # in hex, as clients get it in x-pdx-handoff
    side: Literal["send", "receive"]
    state: Annotated[str, Meta(max_length=32)]
    peer: Annotated[str, Meta(max_length=64)]  # the other daemon; its own name if both halves are here
    blocks: int
    pages: int
    pages_wanted: int  # 0: not known yet
    age_s: float
    is_spare: bool = False  # without engines: an answer on its way back, or blocks that a router has brought


class DiskView(Shape, frozen=True, kw_only=True):
    """The tier below the arena. Counts since the daemon started."""

    state: Annotated[str, Meta(max_length=32)]
    blocks: int
    used_bytes: int
    cap_bytes: int
    waiting_writes: int
    loaded_blocks: int
    written_blocks: int
    io_errors: int
    lost_blocks: int = 0  # that left the arena and were nowhere else


class DaemonView(Shape, frozen=True, kw_only=True):
    """A daemon at a glance: gauges, then counts since it started. Cheap to make: nothing is looked at slot by slot."""

    arena_bytes: int
    leased_bytes: int  # held by engines, handoffs and pins, or being filled or given up
    cached_bytes: int  # may be evicted
    cached_blocks: int  # that lookups find
    pinned_bytes: int
    waiting: int  # handoffs that wait for room
    handoffs_under_way: int
    handoffs: Annotated[list[HandoffView], Meta(max_length=HANDOFFS_SHOWN)] = []  # the oldest of them
    disk: DiskView | None = None
    lookup_blocks: int = 0  # that requests without a handle asked for; of them found
    arena_hit_blocks: int = 0
    disk_hit_blocks: int = 0
    evicted_blocks: int = 0
    handoffs_ok: int = 0  # halves that have ended well
    handoffs_failed: int = 0
    sent_bytes: int = 0
    landed_pages: int = 0
    handoffs_by_lane: Lanes = {}  # that began here, by the lane that they took
    lanes_lost: Lanes = {}
    # What should stay 0, or seldom grow.
    commit_mismatches: int = 0  # handoffs whose checksums did not agree at the end
    blocks_spoilt: int = 0  # that engines found wrong when they loaded them
    loads_failed: int = 0  # by engines, wholly or in part
    leases_expired: int = 0
    bad_frames: int = 0  # messages of clients, peers and routers that were none


Steer = Lookup | Pin | Unpin | Clear
Result = Found | Pinned | Unpinned | Cleared
