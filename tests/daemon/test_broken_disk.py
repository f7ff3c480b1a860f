"""A daemon whose disk is broken serves without it, and says so; one whose disk is set wrongly does not start."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from one_host import Host
from test_tiering import keep_filled, look_up

from pdx.config import load
from pdx.daemon.main import _open_disk
from pdx.errors import TierUnusable

KEY = b"k" * 32


def test_a_broken_disk_does_not_take_the_daemon_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> list[str]:
        raise OSError(errno.EIO, "Input/output error")

    settings = load({"disk": str(tmp_path / "disk")}, environ={})
    with monkeypatch.context() as patched:
        patched.setattr(os, "listdir", broken)
        tier = _open_disk(settings, KEY)
    assert tier is not None
    assert "is off" in caplog.text and "EIO" in caplog.text
    host = Host(tier=tier)
    keep_filled(host)
    host.tick()
    assert len(look_up(host)) == 3
    disk = host.handoffs.disk()
    assert disk is not None and (disk["state"], disk["errno"]) == ("off", errno.EIO)
    assert host.counters["disk_off"] == 1
    assert (disk["waiting_writes"], disk["blocks"]) == (0, 0)
    tier.close(drain_s=0.0)


@pytest.mark.parametrize(("disk", "cap", "complaint"), [("file/disk", "1GiB", "ENOTDIR"), ("d", "4KiB", "at least")])
def test_a_wrong_setting_is_told(tmp_path: Path, disk: str, cap: str, complaint: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TierUnusable, match=complaint):
        _open_disk(load({"disk": str(tmp_path / disk), "disk_cap": cap}, environ={}), KEY)
