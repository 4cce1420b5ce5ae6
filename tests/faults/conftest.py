"""Fixtures of the fault tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from tests.faults.harness import Errors
from tests.faults.proxy import FaultProxy

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def errors() -> Errors:
    """What the tracker's `on_error` collects."""
    return Errors()


@pytest.fixture
def admin(database: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection of the operator's, in autocommit."""
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


@pytest.fixture
def proxy(database: str) -> Iterator[FaultProxy]:
    """A proxy that fails what it is told to, in front of the test's database."""
    with FaultProxy(database) as proxy:
        yield proxy
