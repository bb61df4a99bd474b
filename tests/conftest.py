"""What every test shares: fixed seeds, derandomised hypothesis, no network."""

import os
import random
import re
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

# transformers must never ask a hub for a file that a test wrote itself.
os.environ["HF_HUB_OFFLINE"] = "1"
# Processes that tests start share two cores with other tests.
os.environ["OMP_NUM_THREADS"] = "1"

hypothesis.settings.register_profile("fourfold", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("fourfold")


torch.set_num_threads(1)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A file whose every test is deselected by its mark is not imported: some of what such files import
    takes seconds."""
    terms = config.option.markexpr.split(" and ")
    if collection_path.suffix != ".py" or not all(term.startswith("not ") for term in terms):
        return None
    mark = re.search(
        r"^pytestmark = pytest\.mark\.(\w+)$", collection_path.read_text("utf-8"), re.M
    )
    return True if mark and f"not {mark[1]}" in terms else None


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """A test's random numbers depend on the test alone, not on what ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
