"""One engine in this process, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from local_server import LocalAdapter, make_service

from litecache.serving.service import ModelService


@pytest.fixture(scope="session")
def adapter() -> Iterator[LocalAdapter]:
    made = LocalAdapter()
    yield made
    made.close()


@pytest.fixture
def service(adapter: LocalAdapter) -> Iterator[ModelService]:
    """A service of its own over the shared engine, whose blocks are all free at the end."""
    made = make_service(adapter)
    yield made
    adapter.check()
    made.stop_threads()
