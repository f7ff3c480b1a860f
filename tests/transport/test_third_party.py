"""A lane in a package outside pdx: found by its entry point, held to the same suite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from lane_pairs import EXAMPLE, KEY, OpenPair
from lanes_here import install_example

from pdx.errors import UnknownTransport
from pdx.transport.api import CONTRACT
from pdx.transport.conformance import check_all
from pdx.transport.registry import known_schemes, open_lane


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_example(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@contextmanager
def example_pair() -> Iterator[OpenPair]:
    url = "cma://127.0.0.1:0"
    pair = OpenPair(partial(open_lane, key=KEY, name="test"), near=url, far=url)
    try:
        yield pair
    finally:
        pair.abort()


def test_the_example_is_a_lane(installed: None) -> None:
    assert "cma" in known_schemes()
    check_all(example_pair)


def test_one_of_another_contract_is_refused(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import cma_lane  # type: ignore[import-not-found]

    monkeypatch.setattr(cma_lane.CmaLane, "contract", CONTRACT - 1)
    with pytest.raises(UnknownTransport, match=f"contract {CONTRACT - 1}, and this pdx has {CONTRACT}"):
        open_lane("cma://127.0.0.1:0", key=KEY, name="test")


def test_it_is_small() -> None:
    assert (EXAMPLE / "cma_lane.py").read_text().count("\n") <= 300


def test_not_installed_it_is_unknown() -> None:
    with pytest.raises(UnknownTransport, match="known: "):
        open_lane("cma://127.0.0.1:0", key=None, name="test")
