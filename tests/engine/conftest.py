"""Lets these tests import the torch engine, which other folders use too; what vLLM's own scheduler is tested with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from memory_daemon import Clock, MemoryDaemon

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vllm_engine import write_model  # needs vLLM, which these tests may lack

    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def fresh_daemon() -> Iterator[None]:
    """The first engine of the test makes it: see `memory_connector.the_daemon`."""
    from memory_connector import MemoryConnector

    MemoryConnector.daemon = None
    yield
    MemoryConnector.daemon = None


@pytest.fixture
def clock() -> Clock:
    from memory_daemon import Clock  # needs torch, which these tests may lack

    return Clock()


@pytest.fixture
def daemon() -> MemoryDaemon:
    from memory_daemon import MemoryDaemon
    from torch_engine import LAYOUT

    return MemoryDaemon(LAYOUT, blocks=32)
