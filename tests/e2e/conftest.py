"""The option that names the model for tests on real engines: `pytest tests/e2e --model FOLDER`."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.model import MODEL_DIR, ModelUnavailable, build


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--model", type=Path, default=MODEL_DIR, help="model folder for tests/e2e (default: the demo's)")


@pytest.fixture(scope="session")
def model(request: pytest.FixtureRequest) -> Path:
    """The model's folder; the demo's is built if its package is installed. pytest knows the option only if asked for
    this folder by name, hence a default here too."""
    try:
        return build(request.config.getoption("--model", MODEL_DIR))
    except ModelUnavailable as error:
        pytest.skip(f"no model: {error}")
