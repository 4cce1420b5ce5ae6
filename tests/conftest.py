"""Fixtures: one real Postgres for the run, an empty schema for each test."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import anyio
import psycopg
import pytest
from prometheus_client import CollectorRegistry
from psycopg import sql

from tracker_daemon.embedded import EmbeddedPostgres
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.schema import migrate

if TYPE_CHECKING:
    from collections.abc import Iterator

# A shell starts what runs in its background with SIGINT ignored, and so would every test of Ctrl-C be.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def server_folder() -> Iterator[Path]:
    """A folder that the server's user can reach, removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="tracker-tests-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres(server_folder: Path) -> Iterator[EmbeddedPostgres]:
    """One Postgres for the run. fsync is off: these tests kill processes, not machines."""
    settings = {"fsync": "off", "max_connections": "200", "deadlock_timeout": "200ms"}
    with EmbeddedPostgres(server_folder / "pg", settings=settings, port=0) as server:
        yield server


def _database(postgres: EmbeddedPostgres, template: str) -> Iterator[str]:
    name = f"t_{uuid4().hex[:12]}"
    statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template))
    with psycopg.connect(postgres.conninfo, autocommit=True) as connection:
        connection.execute(statement)
    yield psycopg.conninfo.make_conninfo(postgres.conninfo, dbname=name)
    with psycopg.connect(postgres.conninfo, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def empty_database(postgres: EmbeddedPostgres) -> Iterator[str]:
    """The conninfo of a new, empty database, dropped afterwards."""
    yield from _database(postgres, "template1")


async def _migrate(conninfo: str, schema: str | None = None, table: str = "conversations") -> list[str]:
    async with await Connector(conninfo).connect() as connection:
        return await migrate(connection, schema, table)


def run_migrate(conninfo: str, schema: str | None = None, table: str = "conversations") -> list[str]:
    """Create the tables; return the steps applied."""
    return anyio.run(_migrate, conninfo, schema, table)


@pytest.fixture(scope="session")
def template(postgres: EmbeddedPostgres) -> str:
    """The name of a database with the tables, of which the tests get copies."""
    with psycopg.connect(postgres.conninfo, autocommit=True) as connection:
        connection.execute("CREATE DATABASE tracker_template")
    run_migrate(psycopg.conninfo.make_conninfo(postgres.conninfo, dbname="tracker_template"))
    return "tracker_template"


@pytest.fixture
def database(postgres: EmbeddedPostgres, template: str) -> Iterator[str]:
    """The conninfo of a new database with the tables, dropped afterwards."""
    yield from _database(postgres, template)


@pytest.fixture
def registry() -> CollectorRegistry:
    """A Prometheus registry of the test's own."""
    return CollectorRegistry()


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine reaches a test."""
    for name in list(os.environ):
        if name.startswith(("PG", "TRACKER_")):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _kept_log() -> Iterator[None]:
    """What a command run in this process has set of the log is not the next test's."""
    loggers = [logging.getLogger(name) for name in (None, "tracker_daemon", "psycopg.pool", "uvicorn")]
    before = [(logger, logger.level, logger.handlers[:], logger.propagate) for logger in loggers]
    yield
    logging.disable(logging.NOTSET)
    for logger, level, handlers, propagate in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers
        logger.propagate = propagate
