"""The checkpoint inside the package."""

from pathlib import Path

import pytest

from fourfold.weights.locate import built_in


@pytest.fixture(scope="session")
def nano() -> Path:
    return built_in()
