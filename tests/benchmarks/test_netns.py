"""The two hosts of one machine: they come, the wire between them is as slow as was asked, and they go."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from benchmarks.harness import netns
from benchmarks.harness.netns import Wire, inside
from pdx.errors import ConfigError

needs_namespaces = pytest.mark.skipif(bool(netns.why_not()), reason=netns.why_not() or "there are namespaces")


def interfaces() -> set[str]:
    return set(os.listdir("/sys/class/net"))


def namespaces() -> set[str]:
    folder = Path("/run/netns")
    return set(os.listdir(folder)) if folder.exists() else set()


@needs_namespaces
def test_a_wire_carries_what_was_asked_and_the_management_network_reaches_both() -> None:
    with Wire() as wire:
        line_bits_per_s = wire.shape(20e6)
        assert line_bits_per_s > 160e6
        assert 2e6 < wire.goodput(seconds=0.3) < 23e6, "a busy machine may be slower, never faster"
        for host in (wire.source, wire.target):
            with (
                inside(host, lambda host=host: socket.create_server((host.management, 0))) as listener,  # type: ignore[misc]
                socket.create_connection(listener.getsockname(), 5) as connection,
            ):
                assert connection.getsockname()[0] == wire.outside


@needs_namespaces
def test_a_program_runs_inside() -> None:
    with Wire() as wire:
        shown = subprocess.run(
            [*wire.source.prefix, "ip", "-br", "addr"], capture_output=True, text=True, timeout=10, check=True
        )
        assert wire.source.wire in shown.stdout
        assert wire.target.wire not in shown.stdout


@needs_namespaces
def test_nothing_is_left_even_after_a_failure() -> None:
    before = interfaces(), namespaces()
    with pytest.raises(ConfigError, match="tbf"), Wire() as wire:
        wire.shape(0)
    assert (interfaces(), namespaces()) == before


@needs_namespaces
def test_a_failure_inside_is_raised_outside() -> None:
    with Wire() as wire, pytest.raises(ConnectionRefusedError):
        inside(wire.source, lambda: socket.create_connection((wire.target.wire, 9), 5))
