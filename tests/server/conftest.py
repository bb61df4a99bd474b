"""A site that tests of one module may share where they leave nothing behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.http import Site, site


@pytest.fixture
def web() -> Iterator[Site]:
    with site() as found:
        yield found
