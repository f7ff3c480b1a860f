"""The option that names the model for tests on real engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.model import MODEL_DIR


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--model", type=Path, default=MODEL_DIR, help="model folder for tests/e2e (default: the demo's)")
