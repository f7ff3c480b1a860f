"""What only a disk tier can get wrong: rot, restarts, sick disks. (What every tier must do: test_tiers.)"""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path

import pytest
from tier_folder import CAP_BYTES, FOLDER_BYTES, OpenTier, block_files, taken_bytes

from pdx.buffer.selection import Selection
from pdx.errors import TierUnusable
from pdx.tiers.conformance import BLOCK_BYTES, User, block, buffers, key_of, payload_of
from pdx.tiers.disk import OPEN_READS_MAX, DiskTier
from pdx.tiers.folder import Folder
from pdx.tiers.health import READ_ERRORS_MAX, Health
from pdx.tiers.tier import Failed, Loaded, Missed, Read, StateChanged, Write, Written


def test_a_restart_finds_what_was_kept(open_tier: OpenTier) -> None:
    tier, _ = open_tier()
    user = User(tier)
    for number in range(10):
        user.write(key_of(number), meta=b"%d" % number)
    used_bytes = tier.stats().used_bytes
    tier.close(drain_s=1.0)
    again, files = open_tier()
    assert again.stats().used_bytes == used_bytes
    assert files.calls["read"] == 0, "opening reads no file"
    for number in range(10):
        end, payload = User(again).read(key_of(number))
        assert isinstance(end, Loaded)
        assert (end.meta, payload) == (b"%d" % number, payload_of(key_of(number)))


def test_a_restart_with_a_smaller_cap_keeps_the_youngest(open_tier: OpenTier, tmp_path: Path) -> None:
    tier, _ = open_tier()
    user = User(tier)
    for number in range(30):
        user.write(key_of(number))
        os.utime(block_files(tmp_path / "tier")[0])  # any: only that times differ by more than the clock's step
    tier.close(drain_s=1.0)
    for number, path in enumerate(sorted(block_files(tmp_path / "tier"), key=lambda path: path.stat().st_mtime_ns)):
        os.utime(path, ns=(number, number))
    smaller, _ = open_tier(cap_bytes=CAP_BYTES // 2 + FOLDER_BYTES)
    assert 0 < smaller.stats().blocks <= 30
    assert taken_bytes(tmp_path / "tier") <= CAP_BYTES // 2 + FOLDER_BYTES


def test_leftovers_and_torn_files_go_when_the_folder_is_opened(open_tier: OpenTier, tmp_path: Path) -> None:
    tier, _ = open_tier()
    User(tier).write(key_of(1))
    tier.close(drain_s=1.0)
    (path,) = block_files(tmp_path / "tier")
    (tmp_path / "tier" / "tmp" / "1-1").write_bytes(b"half a block")
    torn = path.with_name("0" * 62 + path.name[-2:])
    torn.write_bytes(b"")
    stranger = path.with_name("README")
    stranger.write_bytes(b"somebody else's")
    again, _ = open_tier()
    assert again.stats().blocks == 1
    assert list((tmp_path / "tier" / "tmp").iterdir()) == []
    assert (torn.exists(), stranger.exists()) == (False, True)


def test_one_folder_serves_one_daemon(open_tier: OpenTier, tmp_path: Path) -> None:
    open_tier()
    with pytest.raises(TierUnusable, match="in use by another pdxd"):
        DiskTier.open(tmp_path / "tier", cap_bytes=CAP_BYTES)


def test_a_folder_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TierUnusable, match="ENOTDIR"):
        DiskTier.open(tmp_path / "file" / "tier", cap_bytes=CAP_BYTES)
    with pytest.raises(TierUnusable, match="takes at least"):
        DiskTier.open(tmp_path / "tier", cap_bytes=FOLDER_BYTES)
    DiskTier.open(tmp_path / "tier", cap_bytes=CAP_BYTES).close(drain_s=0.0)


@pytest.mark.parametrize("secret", [None, b"s" * 32])
def test_any_flipped_byte_is_a_miss_and_deleted(open_tier: OpenTier, tmp_path: Path, secret: bytes | None) -> None:
    tier, _ = open_tier(secret=secret)
    user = User(tier)
    source = memoryview(random.Random(1).randbytes(5000))  # so that there is padding, too
    rng = random.Random(2)
    positions = [*range(0, 110, 5), 4095, 4096, 4096 + 4999, 4096 + 5000, 4096 + 8191, *rng.sample(range(12288), 20)]
    for position in positions:
        assert isinstance(user.write(key_of(1), pages=[source], meta=b"meta"), Written)
        (path,) = block_files(tmp_path / "tier")
        content = bytearray(path.read_bytes())
        content[position] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        end = user.end_of(user.ask(Read(key_of(1), [memoryview(bytearray(5000))])))
        assert isinstance(end, Missed), f"byte {position} was flipped, and nobody noticed"
        assert tier.contains([key_of(1)]) == [False]
        assert tier._writes.wait_idle(5.0)
        tier.take_events()
        assert block_files(tmp_path / "tier") == []
    assert tier.stats().bad_blocks == len(positions)
    assert tier.stats().state == "well", "rot is no reason to switch a disk off"


def test_cut_and_exchanged_files_are_misses(open_tier: OpenTier, tmp_path: Path) -> None:
    tier, _ = open_tier()
    user = User(tier)
    for number in range(4):
        user.write(key_of(number))
    first, second, third, fourth = block_files(tmp_path / "tier")
    shutil.copyfile(first, second)
    third.write_bytes(third.read_bytes()[:-4096])
    fourth.unlink()
    results = [user.read(key_of(number)) for number in range(4)]
    loaded = [payload for end, payload in results if isinstance(end, Loaded)]
    assert len(loaded) == 1
    assert loaded[0] in [payload_of(key_of(number)) for number in range(4)]
    assert tier.stats().bad_blocks == 2
    assert sum(tier.contains([key_of(number) for number in range(4)])) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
def test_a_disk_that_takes_no_writes_still_serves_reads(
    open_tier: OpenTier, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    tier, files = open_tier(health=Health(pause_s=30), clock=lambda: now[0])
    user = User(tier)
    user.write(key_of(1))
    files.errors["write"] = number
    end = user.write(key_of(2))
    assert isinstance(end, Failed)
    assert end.errno == number
    assert tier.stats().state == "paused"
    assert errno.errorcode[number] in caplog.text
    calls = files.calls["write"]
    assert isinstance(user.write(key_of(3)), Failed)
    assert files.calls["write"] == calls, "a disk that takes no writes is not asked"
    assert isinstance(user.read(key_of(1))[0], Loaded)
    del files.errors["write"]
    now[0] = 31.0
    assert isinstance(user.write(key_of(2)), Written)
    assert tier.stats().state == "well"
    assert tier.stats().io_errors == 1


def test_a_file_that_could_not_be_made_is_not_left_behind(open_tier: OpenTier, tmp_path: Path) -> None:
    """Nor could it be deleted where nothing can be written: it would stay charged, and its block be written no more."""
    now = [0.0]
    tier, _ = open_tier(health=Health(pause_s=30), clock=lambda: now[0])
    user = User(tier)
    used_bytes = tier.stats().used_bytes
    folder, away = tmp_path / "tier/tmp", tmp_path / "away"
    folder.rename(away)
    folder.touch()
    end = user.write(key_of(1))
    assert isinstance(end, Failed)
    assert end.errno == errno.ENOTDIR
    assert tier.stats().used_bytes == used_bytes
    folder.unlink()
    away.rename(folder)
    now[0] = 31.0
    assert isinstance(user.write(key_of(1)), Written)


def test_a_victim_that_cannot_be_deleted_keeps_its_place(open_tier: OpenTier, tmp_path: Path) -> None:
    """Else the cap would be passed: no byte is written before its room is there."""
    tier, files = open_tier()
    user = User(tier)
    count = 0
    while not tier.stats().evicted:
        user.write(key_of(count))
        count += 1
    files.errors["remove"] = errno.EROFS
    before = tier.contains([key_of(number) for number in range(count)])
    assert isinstance(user.write(key_of(count)), Failed)
    assert tier.contains([key_of(number) for number in range(count)]) == before
    assert files.calls["write"] == count
    tier.check_integrity()
    assert taken_bytes(tmp_path / "tier") <= CAP_BYTES


def test_a_dying_disk_is_switched_off(open_tier: OpenTier, caplog: pytest.LogCaptureFixture) -> None:
    tier, files = open_tier()
    user = User(tier)
    for number in range(READ_ERRORS_MAX + 1):
        user.write(key_of(number))
    files.errors["read"] = errno.EIO
    for number in range(READ_ERRORS_MAX):
        assert isinstance(user.read(key_of(number))[0], Missed)
    assert tier.stats().state == "off"
    assert "EIO" in caplog.text
    assert tier.contains([key_of(READ_ERRORS_MAX)]) == [False]
    calls = files.calls["read"]
    assert isinstance(user.read(key_of(READ_ERRORS_MAX))[0], Missed)
    assert isinstance(user.write(key_of(100)), Failed)
    assert files.calls["read"] == calls
    tier.sweep(Selection())
    assert tier.survey(Selection()).leaving, "a clear is not over: its next life would find what it has not deleted"
    tier.close(drain_s=5.0)
    assert open_tier()[0].stats().blocks == 0, "it has tried to delete them as it ended"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM])
def test_what_the_process_lacks_is_not_the_disks_fault(open_tier: OpenTier, number: int) -> None:
    tier, files = open_tier()
    user = User(tier)
    user.write(key_of(1))
    files.errors["read"] = number
    for _ in range(READ_ERRORS_MAX):
        assert isinstance(user.read(key_of(1))[0], Missed)
    del files.errors["read"]
    assert tier.stats().state == "well"
    assert isinstance(user.read(key_of(1))[0], Loaded)


def test_a_slow_disk_refuses_and_can_be_left_alone(open_tier: OpenTier) -> None:
    """Nothing here waits for it: the queue fills, submit says None, cancelled requests end at once."""
    tier, files = open_tier(readers=1)
    user = User(tier)
    user.write(key_of(1))
    files.gate.clear()
    tickets = []
    while (ticket := tier.submit(Read(key_of(1), buffers()))) is not None:
        tickets.append(ticket)
    assert len(tickets) == OPEN_READS_MAX
    assert files.waiting.acquire(timeout=5.0)
    for ticket in tickets:
        tier.cancel(ticket)
    ended = [event.ticket for event in tier.take_events() if isinstance(event, Failed)]
    assert ended == tickets[1:], "all but the one under way"
    files.gate.set()
    assert isinstance(user.end_of(tickets[0]), Loaded)


def test_a_hanging_disk_is_switched_off_and_its_buffers_stay_taken(
    open_tier: OpenTier, caplog: pytest.LogCaptureFixture
) -> None:
    tier, files = open_tier(readers=1, stall_s=0.02)
    user = User(tier)
    user.write(key_of(1))
    files.gate.clear()
    first, second = (tier.submit(Read(key_of(1), buffers())) for _ in range(2))
    assert files.waiting.acquire(timeout=5.0)
    events = []
    while not any(isinstance(event, StateChanged) for event in events):
        files.gate.wait(0.005)
        events += tier.take_events()
    assert [event.ticket for event in events if isinstance(event, Failed)] == [second]
    assert tier.contains([key_of(1)]) == [False]
    assert "has not come back" in caplog.text
    assert tier.stats().open_reads == 1
    files.gate.set()
    assert first is not None
    assert isinstance(user.end_of(first), Loaded)


def test_a_write_refuses_to_fill_a_tier_whose_blocks_are_all_in_use(open_tier: OpenTier) -> None:
    tier, files = open_tier(cap_bytes=2 * FOLDER_BYTES, readers=2)
    user = User(tier)
    count = 0
    while not tier.stats().evicted:
        user.write(key_of(count))
        count += 1
    files.gate.clear()
    kept = [number for number in range(count) if tier.contains([key_of(number)])[0]]
    reads = [tier.submit(Read(key_of(number), buffers())) for number in kept]
    ticket = tier.submit(Write(key_of(count), block(key_of(count))))
    (end,) = tier.take_events()
    assert end == Failed(ticket or 0, "all that could make room is in use")
    files.gate.set()
    for read in reads:
        assert isinstance(user.end_of(read or 0), Loaded)


def test_aligned_buffers_go_straight_to_the_disk(open_tier: OpenTier, tmp_path: Path) -> None:
    tier, _ = open_tier()
    user = User(tier)
    user.write(key_of(1))
    user.read(key_of(1))
    assert tier.stats().unaligned == 0
    odd = memoryview(bytearray(BLOCK_BYTES + 1))[1:]
    assert isinstance(user.write(key_of(2), pages=[odd]), Written)
    probe = Folder.open(tmp_path / "probe")
    assert tier.stats().unaligned == int(probe.is_direct)
    probe.close()


def test_a_chain_that_is_used_goes_after_others_and_from_its_end(open_tier: OpenTier) -> None:
    """Reading it, the head first, is no use by itself."""
    tier, _ = open_tier(cap_bytes=2 * FOLDER_BYTES)
    user = User(tier)
    chain = [key_of(number) for number in range(4)]
    for key in chain:
        user.write(key)
        user.read(key)
    tier.used([*chain, key_of(99)])
    count, kept = 4, 4
    while kept:
        user.write(key_of(count := count + 1))
        found = tier.contains(chain)
        assert found == sorted(found, reverse=True)
        assert sum(found) == 4 or count >= 8
        kept = sum(found)
    tier.check_integrity()
