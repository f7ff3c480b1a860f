"""What a process may have, as the machine it runs on is."""

from __future__ import annotations

import resource

import pytest

from pdx import limits


@pytest.mark.parametrize(
    ("descriptors", "connections"), [(256, 512), (1024, 512), (4096, 1024), (1 << 20, 2048)], ids=str
)
def test_connections_leave_descriptors_for_others(
    descriptors: int, connections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (descriptors, descriptors))
    assert limits.within_descriptors(2048, least=512) == connections


def test_what_is_asked_for_is_never_exceeded() -> None:
    assert limits.within_descriptors(1, least=512) == 1
