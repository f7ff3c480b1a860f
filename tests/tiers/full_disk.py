"""Run by test_disk_full on a small file system of its own: `full_disk.py FOLDER full|read-only|limited`."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
from pathlib import Path

from pdx.tiers.conformance import User, key_of, payload_of
from pdx.tiers.disk import DiskTier
from pdx.tiers.health import Health
from pdx.tiers.tier import Failed, Loaded, Written

CAP_BYTES = 1 << 30  # far more than the file system has
ERRNOS = {"full": errno.ENOSPC, "read-only": errno.EROFS, "limited": errno.EFBIG}


def main(folder: Path, how: str) -> None:
    now = [0.0]
    tier = DiskTier.open(folder / "tier", cap_bytes=CAP_BYTES)
    tier.health = Health(pause_s=10)
    tier._clock = lambda: now[0]
    user = User(tier)
    user.write(key_of(0))
    spoil(folder, how)
    count, used_bytes = 1, tier.stats().used_bytes
    while isinstance(end := user.write(key_of(count)), Written):
        count, used_bytes = count + 1, tier.stats().used_bytes
    assert isinstance(end, Failed), end
    assert end.errno == ERRNOS[how], end
    assert tier.stats().state == "paused", tier
    assert isinstance(user.write(key_of(count)), Failed)
    tier.check_integrity()
    assert tier.stats().used_bytes == used_bytes, "a failed write is charged for what is not there"
    assert list((folder / "tier/tmp").iterdir()) == [], "a failed write left something behind"
    for number in range(count):
        loaded, payload = user.read(key_of(number))
        assert isinstance(loaded, Loaded), loaded
        assert payload == payload_of(key_of(number))
    if how == "full":
        for number in range(count // 2):
            tier.remove(key_of(number))
        assert tier._writes.wait_idle(5.0)
        now[0] = 11.0
        tier.take_events()
        assert isinstance(user.write(key_of(count)), Written), "there is room again, and nobody noticed"
    tier.close(drain_s=5.0)
    again = DiskTier.open(folder / "tier", cap_bytes=CAP_BYTES)  # a daemon that starts now has at least what there is
    assert isinstance(User(again).read(key_of(count - 1))[0], Loaded)
    again.close(drain_s=5.0)
    print(f"{how}: {count} blocks, then {end.reason}")


def spoil(folder: Path, how: str) -> None:
    if how == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    elif how == "limited":
        resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, 16 << 10))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
