"""Many random operations leave nothing behind: no byte, no file, no descriptor, no open ticket."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tier_folder import FOLDER_BYTES, block_files, taken_bytes

from pdx.buffer.s3fifo import S3Fifo
from pdx.tiers.disk import DiskTier
from pdx.tiers.folder import Folder
from pdx.tiers.memory import MemoryTier
from pdx.tiers.tier import Key, Loaded, Missed, Read, StateChanged, Tier, Write

AT_LENGTH = pytest.param(1_000_000, marks=[pytest.mark.prove, pytest.mark.timeout(1800)])
many = pytest.mark.parametrize("operations", [15_000, AT_LENGTH])
PAYLOADS = [random.Random(number).randbytes(3000) for number in range(300)]


def key_of(number: int) -> Key:
    return b"many", number.to_bytes(8, "little")


def operate(tier: Tier, rng: random.Random, count: int) -> int:
    """Random operations, most of them in flight together. Checks whatever is loaded; returns how many that were."""
    open_reads: dict[int, tuple[int, bytearray]] = {}
    open_tickets: set[int] = set()
    loaded = 0

    def take() -> None:
        nonlocal loaded
        for event in tier.take_events():
            if isinstance(event, StateChanged):
                continue
            open_tickets.remove(event.ticket)
            number, target = open_reads.pop(event.ticket, (0, bytearray()))
            if isinstance(event, Loaded):
                loaded += 1
                assert target == PAYLOADS[number]
                assert event.meta == key_of(number)[1]

    for _ in range(count):
        number, kind = rng.randrange(len(PAYLOADS)), rng.random()
        ticket = None
        if kind < 0.45:
            target = bytearray(3000)
            ticket = tier.submit(Read(key_of(number), [memoryview(target)]))
            if ticket is not None:
                open_reads[ticket] = number, target
        elif kind < 0.65:
            ticket = tier.submit(Write(key_of(number), [memoryview(PAYLOADS[number])], key_of(number)[1]))
        elif kind < 0.67:
            tier.remove(key_of(number))
        elif kind < 0.7 and open_tickets:
            tier.cancel(rng.choice(sorted(open_tickets)))
        elif kind < 0.95:
            tier.contains([key_of(rng.randrange(len(PAYLOADS))) for _ in range(3)])
        if ticket is not None:
            open_tickets.add(ticket)
        if len(open_tickets) > 40 or kind > 0.95:
            take()
    tier.close(drain_s=10.0)
    take()
    assert open_tickets == set()
    return loaded


@many
def test_in_memory(operations: int) -> None:
    tier = MemoryTier(cap_bytes=200 * 3008, policy=S3Fifo(lambda name: name))
    assert operate(tier, random.Random(11), operations) > operations / 10
    tier.check_integrity()


@many
def test_on_disk(operations: int, tmp_path: Path) -> None:
    cap_bytes = FOLDER_BYTES + (2 << 20)
    tier = DiskTier(Folder.open(tmp_path), cap_bytes=cap_bytes, policy=S3Fifo(lambda name: name))
    assert operate(tier, random.Random(12), operations) > operations / 100
    tier.check_integrity()
    stats = tier.stats()
    assert (stats.open_reads, stats.open_writes, stats.io_errors, stats.bad_blocks) == (0, 0, 0, 0)
    assert stats.evicted > 0
    assert len(block_files(tmp_path)) == stats.blocks
    assert list((tmp_path / "tmp").iterdir()) == []
    assert taken_bytes(tmp_path) <= stats.used_bytes <= cap_bytes


def test_a_missed_read_is_no_event_twice() -> None:
    tier = MemoryTier(cap_bytes=1000)
    ticket = tier.submit(Read(key_of(1), [memoryview(bytearray(5))]))
    assert tier.take_events() == [Missed(ticket or 0, "unknown")]
    assert tier.take_events() == []
    tier.close(drain_s=0.0)
