"""kill -9 at random moments of disk writes: nothing wrong is served, the cap holds, the accounts add up."""

from __future__ import annotations

import os
import random
import select
import signal
import traceback
from pathlib import Path

import pytest
from tier_folder import FOLDER_BYTES, taken_bytes

from pdx.tiers.conformance import User, buffers
from pdx.tiers.disk import DiskTier
from pdx.tiers.tier import Key, Loaded, Read, Write

PAGES, PAGE_BYTES = 4, 16 << 10
# Room for some 14 blocks: nearly every write deletes another block first.
CAP_BYTES = 2 * FOLDER_BYTES
KEYS = 40
ENDS_MAX, MOMENTS_S = 30, 0.001  # a kill comes behind so many writes that have ended, and within this long


def key_of(number: int) -> Key:
    return b"kill", number.to_bytes(32, "little")


def payload_of(number: int) -> bytes:
    return random.Random(number).randbytes(PAGES * PAGE_BYTES)


@pytest.mark.parametrize("kills", [40, pytest.param(200, marks=pytest.mark.prove)])
def test_kills_in_the_middle_of_writes(kills: int, tmp_path: Path) -> None:
    rng = random.Random(9)
    folder = tmp_path / "tier"
    payloads = [payload_of(number) for number in range(KEYS)]
    loaded = leftovers = 0
    for round_number in range(kills):
        ends = rng.randrange(ENDS_MAX)
        kill_a_writer(folder, payloads, seed=round_number, ends=ends, after_s=rng.uniform(0, MOMENTS_S))
        assert taken_bytes(folder) <= CAP_BYTES
        leftovers += len(list((folder / "tmp").iterdir()))
        loaded += check_all(folder, payloads)
    assert loaded > kills, "blocks survived"
    assert leftovers > 0, "no kill came in the middle of a write: this test has lost its point"


def check_all(folder: Path, payloads: list[bytes]) -> int:
    """Opens the tier as a new daemon would; all that it finds must be right. How many that are."""
    tier = DiskTier.open(folder, cap_bytes=CAP_BYTES)
    try:
        tier.check_integrity()
        assert list((folder / "tmp").iterdir()) == []
        user = User(tier)
        found = [number for number in range(KEYS) if tier.contains([key_of(number)])[0]]
        assert len(found) == tier.stats().blocks
        reads = {}
        for number in found:
            pages = [page[:PAGE_BYTES] for page in buffers()[:PAGES]]
            reads[user.ask(Read(key_of(number), pages))] = number, pages
        for ticket, (number, pages) in reads.items():
            assert isinstance(user.end_of(ticket), Loaded), "a kill of the process tears no published file"
            assert b"".join(pages) == payloads[number]
        tier.check_integrity()
        return len(found)
    finally:
        tier.close(drain_s=5.0)


def kill_a_writer(folder: Path, payloads: list[bytes], *, seed: int, ends: int, after_s: float) -> None:
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(told)
            write_for_ever(folder, payloads, random.Random(seed), tell)
        finally:
            traceback.print_exc()
            os._exit(1)
    os.close(tell)
    try:
        for _ in range(1 + ends):
            assert os.read(told, 1) == b"w", "the writer did not start, or has ended"
        select.select([told], [], [], after_s)  # a random moment; or the writer's end, which is not expected
    finally:
        os.close(told)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, "the writer ended by itself"


def write_for_ever(folder: Path, payloads: list[bytes], rng: random.Random, tell: int) -> None:
    tier = DiskTier.open(folder, cap_bytes=CAP_BYTES)
    user = User(tier)
    os.write(tell, b"w")
    ended = 0
    while True:
        user.pump(0.0)
        os.write(tell, b"w" * (len(user.ends) - ended))
        ended = len(user.ends)
        number = rng.randrange(KEYS)
        payload = memoryview(payloads[number])
        pages = buffers()[:PAGES]
        for index, page in enumerate(pages):
            page[:] = payload[index * PAGE_BYTES : (index + 1) * PAGE_BYTES]
        user.ask(Write(key_of(number), pages))
        if rng.random() < 0.1:
            tier.remove(key_of(rng.randrange(KEYS)))
        tier.check_integrity()
