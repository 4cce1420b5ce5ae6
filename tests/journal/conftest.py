"""Fixtures of the journal's tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.faults.harness import Errors
from tests.faults.servers import folder_for_servers
from tests.helpers import Trackers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def errors() -> Errors:
    """What the tracker's `on_error` collects."""
    return Errors()


@pytest.fixture
def trackers() -> Iterator[Trackers]:
    """Make trackers that are closed at the end."""
    made = Trackers()
    yield made
    made.close()


@pytest.fixture
def servers() -> Iterator[Path]:
    """A folder for servers."""
    with folder_for_servers() as made:
        yield made
