"""What a daemon is called: by its place, which stays, and by chance."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from pdx.daemon.name import daemon_name
from pdx.members import host_of


def test_each_life_has_a_name_of_its_own_and_a_host_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu7.example.com")
    names = {daemon_name(Path("/run/user/1000/pdx")) for _ in range(100)}
    assert len(names) == 100
    assert {host_of(name) for name in names} == {"gpu7:pdx"}


@pytest.mark.parametrize(
    ("hostname", "folder", "host"),
    [
        ("prefill-7d9f8c6b5d-x2x4z" * 3, "pdx", "5d-x2x4zprefill-7d9f8c6b5d-x2x4z"),
        ("a", "pdx-of-somebody", "a:-of-somebody"),
        ("ü/b", "c d", "--b:c-d"),
        ("", "", ":"),
    ],
)
def test_it_is_short_and_has_no_signs(monkeypatch: pytest.MonkeyPatch, hostname: str, folder: str, host: str) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: hostname)
    name = daemon_name(Path(folder))
    assert host in name
    assert len(name) <= 64, "views take no longer ones"
    assert name.count("/") == 1


def test_other_names_are_their_own_hosts() -> None:
    assert host_of("d0") == "d0"
