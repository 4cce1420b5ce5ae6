"""docs/backup-and-restore.md, step by step, on real servers, with calls coming in."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING
from uuid import uuid4

import psycopg
import pytest
from prometheus_client import CollectorRegistry
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.daemon.harness import Daemon, serving, turn
from tests.deploy.guides import Guide
from tests.digits import Digits
from tests.faults.harness import Errors, sums, tracking
from tests.faults.servers import Calling, Recording, Stream, needing_password
from tests.helpers import PATIENCE, ledger, wait_until
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.sink import PostgresSink
from tracker_daemon.sink import LedgerRegressed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tracker_daemon.embedded import EmbeddedPostgres

pytestmark = pytest.mark.artefact("docs/backup-and-restore.md", "pg_dump", "pg_restore", "psql")


class Posts(Calling):
    """Posts calls to a daemon."""

    def __init__(self, daemon: Daemon, digits: Digits, name: str) -> None:
        super().__init__()
        self._daemon, self._digits, self._name = daemon, digits, name

    def call(self) -> None:
        """Post ten calls."""
        names = [f"{self._name}-{self.made // 310}-{number}" for number in range(10)]
        body = "".join(turn(name, tokens=self._digits.tokens(name)) for name in names)
        assert self._daemon.post(body).status == 202
        self.made += 10


@pytest.fixture
def names(postgres: EmbeddedPostgres) -> Iterator[dict[str, str]]:
    """Names of databases for those of the guide; what was made of them is dropped afterwards."""
    mark = uuid4().hex[:8]
    found = {name: f"{name}_{mark}" for name in ("chat_restored", "chat_before")}
    yield found
    with psycopg.connect(postgres.conninfo, autocommit=True) as connection:
        for name in found.values():
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


@contextmanager
def guide(
    postgres: EmbeddedPostgres, database: str, names: dict[str, str], folder: Path, journal: Path
) -> Iterator[Guide]:
    """The guide for *database*, for a superuser with a password."""
    place = folder / "guide"
    place.mkdir()
    own = str(conninfo_to_dict(database)["dbname"])
    for file, conninfo in {
        "database": database,
        "database.restored": make_conninfo(database, dbname=names["chat_restored"]),
    }.items():
        (place / file).write_text(f"{conninfo}\n")
    role, password = f"admin_{own}", f"password_of_{own}"
    places = {
        "host=db.example": f"host=127.0.0.1\nport={postgres.port}",
        "user=postgres": f"user={role}",
        "password=SECRET": f"password={password}",
        "dbname=chat\n": f"dbname={own}\n",
        "/etc/tracker-daemon/": f"{place}/",
        "/var/lib/tracker-daemon/journal": str(journal),
        **names,
        "ALTER DATABASE chat ": f"ALTER DATABASE {own} ",
        "'chat'": f"'{own}'",
        "RENAME TO chat;": f"RENAME TO {own};",
    }
    with psycopg.connect(postgres.conninfo, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE ROLE {} SUPERUSER").format(sql.Identifier(role)))
        with (
            needing_password(postgres, role, password),
            Guide("backup-and-restore.md", place, postgres.bin_directory, places) as found,
        ):
            yield found
            assert "pg_dump" in found.arguments
            assert password not in found.arguments


def test_restored_with_a_journal(
    postgres: EmbeddedPostgres, database: str, names: dict[str, str], tmp_path: Path
) -> None:
    """A dump under traffic, restored beside the old database, the daemon pointed there: the journal has what is missing."""
    digits, journal = Digits(), tmp_path / "journal"
    with (
        guide(postgres, database, names, tmp_path, journal) as steps,
        serving(database, "--journal", str(journal), "--flush-interval", "0.01") as daemon,
    ):
        with Posts(daemon, digits, "before") as posts:
            wait_until(lambda: sums(database), "calls in the table")
            posts.more()
            assert "tracker_ledger" in steps.step("pg_dump")
            posts.more()
        steps.step("createdb")
        restored = make_conninfo(database, dbname=names["chat_restored"])
        verdict = digits.read(sums(restored))
        assert verdict.doubled == []
        assert verdict.once
        assert verdict.missing, "the dump has less than what was made meanwhile"
        [(producer, _, sequence)] = ledger(restored)
        steps.step("mv")
        assert daemon.stop() == 0
        daemon.database = (tmp_path / "guide/database").read_text().strip()
        assert daemon.database == restored
        daemon.start()
        with Posts(daemon, digits, "after") as posts:
            posts.more()
        assert daemon.stop() == 0
        steps.skip("psql")
        steps.step("journalctl")
    assert re.search(r"event=journal_applied .*calls=\d", daemon.log), daemon.log
    after = digits.read(sums(restored))
    assert (after.missing, after.doubled) == ([], [])
    assert {each[0]: each[2] for each in ledger(restored)}[producer] > sequence


@pytest.mark.parametrize("journal", [True, False])
def test_names_changed_under_a_running_tracker(
    postgres: EmbeddedPostgres,
    database: str,
    names: dict[str, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    *,
    journal: bool,
) -> None:
    """The restored database takes the old one's name while calls come in: what it lacks is told; a journal applies it."""
    digits, errors, registry = Digits(), Errors(), CollectorRegistry()
    sink = Recording(PostgresSink(Connector(database), (None, "conversations")))
    directory = tmp_path / "journal"
    with guide(postgres, database, names, tmp_path, directory) as steps:
        with (
            tracking(sink, errors, registry, journal=directory if journal else None) as tracker,
            Stream(tracker, digits) as stream,
        ):
            wait_until(lambda: len(sink.acknowledged) > 5, "batches")
            steps.step("pg_dump")
            seen = len(sink.acknowledged)
            wait_until(lambda: len(sink.acknowledged) > seen + 5, "batches after the dump")
            steps.step("createdb")
            [(_, _, kept)] = ledger(make_conninfo(database, dbname=names["chat_restored"]))
            steps.skip("mv")
            steps.step("psql")
            errors.wait_for(lambda error: isinstance(error, LedgerRegressed))
            stream.more()
            tracker.flush(PATIENCE * 2)
        if journal:
            steps.step("journalctl")
        else:
            steps.skip("journalctl")
    [told] = [error for error in errors.seen if isinstance(error, LedgerRegressed)]
    assert (told.found, told.expected - told.found > 5) == (kept, True)
    verdict = digits.read(sums(database))
    assert verdict.doubled == []
    lines = [record.getMessage() for record in caplog.records]
    if journal:
        assert verdict.missing == []
        assert any("applied_again" in line for line in lines)
        assert (registry.get_sample_value("tracker_journal_replayed_calls_total") or 0) > 5
    else:
        lost = sink.forgotten(kept)
        assert len(lost) == told.expected - told.found
        assert sum("batches_missing" in line for line in lines) == 1
        made = {(thread, number) for tokens in lost for thread, total in tokens.items() for number in places_of(total)}
        assert sorted(verdict.missing) == sorted(made)


def places_of(tokens: int) -> list[int]:
    """Return the numbers of the calls whose tokens add up to *tokens*."""
    return [number for number in range(32) if tokens >> (2 * number) & 3]
