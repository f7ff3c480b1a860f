"""What a selection takes of a tier, and at how many names it has to look for that."""

from __future__ import annotations

import errno

import pytest
from tier_folder import OpenTier

from pdx.buffer.evict import Lru
from pdx.buffer.selection import Selection
from pdx.keys import SPACE_BYTES, TENANT_BYTES
from pdx.tiers.conformance import User, buffers, key_of
from pdx.tiers.deletions import AGAIN_S
from pdx.tiers.ledger import Ledger
from pdx.tiers.sealed import labels_of, name_of
from pdx.tiers.sweep import survey, sweep
from pdx.tiers.tier import Write, Written

SPACES = b"a" * SPACE_BYTES, b"b" * SPACE_BYTES
TENANTS = b"", b"t" * TENANT_BYTES
BLOCKS = [b"%d" % number for number in range(50)]


class Watched(Ledger):
    """Notes at which names somebody looks."""

    def __init__(self) -> None:
        super().__init__(cap_bytes=1000, policy=Lru(), group_of=labels_of)
        self.looks: list[str] = []

    def finds(self, name: str) -> bool:
        self.looks.append(name)
        return super().finds(name)


@pytest.fixture
def ledger() -> Watched:
    ledger = Watched()
    for space in SPACES:
        for tenant in TENANTS:
            for block in BLOCKS:
                ledger.adopt(name_of((space + tenant, block)), 1)
    return ledger


@pytest.mark.parametrize(
    ("which", "blocks"),
    [
        (Selection(), 200),
        (Selection(spaces=frozenset(SPACES[:1])), 100),
        (Selection(tenant=TENANTS[1]), 100),
        (Selection(spaces=frozenset(SPACES), tenant=TENANTS[0]), 100),
        (Selection(spaces=frozenset(SPACES[:1]), tenant=TENANTS[0], block_hashes=frozenset(BLOCKS[:3])), 3),
        (Selection(spaces=frozenset(SPACES), tenant=TENANTS[1], block_hashes=frozenset(BLOCKS[:3])), 6),
        (Selection(spaces=frozenset({b"c" * SPACE_BYTES})), 0),
        (Selection(spaces=frozenset()), 0),
        (Selection(other_than=frozenset(SPACES[:1]), tenant=TENANTS[0]), 50),
        (Selection(other_than=frozenset(SPACES)), 0),
    ],
)
def test_only_what_is_meant_is_looked_at(ledger: Watched, which: Selection, blocks: int) -> None:
    assert survey(ledger, which, now=0.0).blocks == blocks
    assert len(ledger.looks) == blocks
    condemned: list[str] = []
    assert sweep(ledger, which, now=0.0, condemn=condemned.append).blocks == len(condemned) == blocks
    assert condemned == ledger.looks[:blocks]


def test_what_leaves_is_counted_until_it_has_left(ledger: Watched) -> None:
    doomed: list[str] = []
    of_prompt = Selection(spaces=frozenset(SPACES[:1]), tenant=TENANTS[0], block_hashes=frozenset(BLOCKS[:3]))
    read = name_of((SPACES[0], BLOCKS[0]))
    ledger.begin_read(read)

    def condemn(name: str) -> None:
        if ledger.condemn(name):
            doomed.append(name)

    assert sweep(ledger, of_prompt, now=0.0, condemn=condemn).leaving == 3
    assert sweep(ledger, of_prompt, now=0.0, condemn=condemn).blocks == 0
    assert (len(doomed), read in doomed, ledger.end_read(read)) == (2, False, True)
    for name in [*doomed, read]:
        ledger.check_integrity()
        ledger.delete(name)
    assert survey(ledger, of_prompt, now=0.0).leaving == 0
    assert sum(map(len, ledger.groups.values())) == 197


def test_a_write_waits_for_few_deletions(open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a large clear a million files wait to be deleted: they are counted, and the write comes first."""
    monkeypatch.setattr("pdx.tiers.deletions.AT_ONCE", 2)
    monkeypatch.setattr("pdx.tiers.deletions.AGAIN_S", 9999.0)  # who waits for his turn waits for nothing else
    tier, files = open_tier(writers=1)
    user = User(tier)
    for number in range(10):
        assert isinstance(user.write(key_of(number)), Written)
    files.gate.clear()
    assert tier.sweep(Selection()).leaving == 10
    ticket = user.ask(Write(key_of(10), buffers()))
    files.gate.set()
    assert isinstance(user.end_of(ticket), Written)
    assert tier.survey(Selection()).leaving >= 6, "two before it, and two behind it at the most"
    for _ in range(10):
        assert tier._writes.wait_idle(5.0)
        tier.take_events()
    assert not tier.survey(Selection()).leaving
    assert files.calls["remove"] == 10
    tier.check_integrity()


def test_a_disk_that_deletes_nothing_is_asked_for_one_file_now_and_then(
    open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else each cleared file would be tried, and told, twice a minute: for as long as the disk is read-only."""
    monkeypatch.setattr("pdx.tiers.deletions.AT_ONCE", 4)
    now = [0.0]
    tier, files = open_tier(writers=1, clock=lambda: now[0])
    user = User(tier)
    for number in range(40):
        assert isinstance(user.write(key_of(number)), Written)

    def settle() -> None:
        for _ in range(45):
            assert tier._writes.wait_idle(5.0)
            tier.take_events()

    files.errors["remove"] = errno.EROFS
    tier.sweep(Selection())
    settle()
    calls = files.calls["remove"]
    assert calls < 10
    assert [record.getMessage().split()[0] for record in caplog.records] == ["40"]
    caplog.clear()
    for attempt in range(3):
        now[0] += AGAIN_S
        settle()
        assert files.calls["remove"] == calls + attempt + 1
    assert len(caplog.records) == 3
    del files.errors["remove"]
    now[0] += AGAIN_S
    settle()
    assert not tier.survey(Selection()).leaving
    tier.check_integrity()
