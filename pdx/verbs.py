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

Space = Annotated[bytes, Meta(min_length=SPACE_BYTES, max_length=SPACE_BYTES)]
Tenant = Annotated[bytes, Meta(max_length=TENANT_BYTES)]
BlockHash = Annotated[bytes, Meta(max_length=64)]
Name = Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)]
Seconds = Annotated[float, Meta(ge=0.0)]
PinSeconds = Annotated[float, Meta(gt=0.0, le=PIN_S_MAX)]
TierName = Literal["all", "arena", "disk"]


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
    """`blocks` are held in the arena; of them `coming_blocks` are still on their way from the disk."""

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

    model: str | None = None  # all spaces of this model that the daemon has met
    spaces: list[Space] | None = None
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
    """A space that an engine of this daemon has, or had while it ran."""

    content: ContentFingerprint
    layout: LayoutFingerprint
    attached: int = 0  # its engines that are there now
    urls: list[str] = msgspec.field(default_factory=list)  # of those that serve HTTP


class Spaces(Shape, frozen=True, kw_only=True):
    spaces: list[SpaceInfo]


Steer = Lookup | Pin | Unpin | Clear
Result = Found | Pinned | Unpinned | Cleared
