"""Fixtures: one cluster of three for the run, a stream of its own for each test."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

import anyio
import pytest

from tests.helpers import Trackers
from tests.stream.cluster import Cluster
from tracker_daemon.stream import operations
from tracker_daemon.stream.address import address
from tracker_daemon.stream.facts import Limits

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three servers."""
    folder: Path = tmp_path_factory.mktemp("nats")
    with Cluster(folder, sync="2m") as found:
        make_stream(found.url("first"), 1)  # from here on they have a leader
        yield found


def make_stream(url: str, partitions: int, **limits: int) -> list[str]:
    """Make a stream; return what was made."""
    settings = {"max_bytes": 64 << 20, **limits}
    return anyio.run(operations.create, address(url), partitions, Limits(**settings))


@pytest.fixture
def trackers() -> Iterator[Trackers]:
    """Makes trackers, and closes what a test leaves open."""
    made = Trackers()
    yield made
    made.close()


@pytest.fixture
def stream(cluster: Cluster) -> str:
    """The URL of a new stream of two partitions."""
    url = cluster.url(f"s{uuid4().hex[:10]}")
    make_stream(url, 2)
    return url
