"""docs/upgrade.md, step by step: from all migrations but the last to all of them, under daemons that take calls."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import anyio
import psycopg
import pytest
from prometheus_client import CollectorRegistry

from tests.conftest import run_migrate
from tests.daemon.harness import serving
from tests.deploy.guides import Guide
from tests.deploy.test_backup import Posts
from tests.deploy.tools import ROOT
from tests.digits import Digits
from tests.faults.harness import Errors, sums, tracking
from tests.faults.servers import Stream
from tests.helpers import PATIENCE, query
from tracker_daemon.postgres import schema
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.leases import Leases
from tracker_daemon.postgres.statements import migrations

if TYPE_CHECKING:
    from pathlib import Path

    from tracker_daemon.embedded import EmbeddedPostgres

pytestmark = pytest.mark.artefact("docs/upgrade.md", "tracker-daemon")

*OLDER, LAST = migrations()
GUIDE = ROOT / "docs/upgrade.md"
OWNER = "/etc/tracker-daemon/owner"


def made_by(steps: list[Any], conninfo: str) -> str:
    """Apply these migrations alone; return the conninfo."""

    async def nothing(*_: Any) -> None:
        """Look for no fault: what this version wants further is what the older tables lack."""

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(schema, "migrations", lambda: iter(steps))
        patched.setattr(schema, "check", nothing)
        run_migrate(conninfo)
    return conninfo


@pytest.fixture
def older_database(empty_database: str) -> str:
    """The conninfo of a database with every migration but the last."""
    return made_by(OLDER, empty_database)


@pytest.fixture
def first_database(empty_database: str) -> str:
    """The conninfo of a database with the first migration alone."""
    return made_by(OLDER[:1], empty_database)


def columns(conninfo: str) -> dict[tuple[str, str], tuple[str, bool]]:
    """Return type of every column of the tables, and whether a row may be made without a value for it."""
    rows = query(
        conninfo,
        "SELECT table_name, column_name, data_type, is_nullable = 'YES' OR column_default IS NOT NULL"
        " OR is_identity = 'YES' OR is_generated = 'ALWAYS'"
        " FROM information_schema.columns WHERE table_schema = 'public'",
    )
    return {(table, column): (kind, free) for table, column, kind, free in rows}


def test_rolling_upgrade(postgres: EmbeddedPostgres, older_database: str, tmp_path: Path) -> None:
    """Calls and trackers' batches go on while the tables are upgraded, and while the daemons follow: each counts once."""
    digits, more_digits, errors, conninfo = Digits(), Digits(), Errors(), older_database
    (tmp_path / "database").write_text(conninfo)
    journal = str(tmp_path / "journal")
    with (
        Guide("upgrade.md", tmp_path, postgres.bin_directory, {OWNER: str(tmp_path / "database")}) as guide,
        serving(conninfo, "--journal", journal, ready=False) as first,
        # Of a registry and books of its own: `tracking` asserts at the end that nothing was lost or left.
        tracking(first.url, errors, CollectorRegistry()) as tracker,
        Stream(tracker, digits) as stream,
    ):
        settings = {"TRACKER_DATABASE_FILE": str(tmp_path / "database"), "TRACKER_LISTEN": first.url}
        with Posts(first, digits, "first") as posts:
            stream.more()
            posts.more()
            said = guide.step("export", **settings)
            assert f"{LAST[0]:04}_{LAST[1]}" in said
            posts.more()
            stream.more()
        with serving(conninfo, "--journal", f"{journal}-2") as second:
            with Posts(second, more_digits, "second") as posts:
                guide.step("systemctl restart")
                assert first.stop() == 0
                stream.more()
                first.start()
                guide.step("tracker-daemon health", **settings)
                stream.more()
                posts.more()
            assert second.stop() == 0
        tracker.flush(2 * PATIENCE)
        assert first.stop() == 0
        first.start()
    digits.made |= more_digits.made
    verdict = digits.read(sums(conninfo))
    assert (verdict.missing, verdict.doubled) == ([], [])


def test_a_migration_only_adds(older_database: str) -> None:
    """What an earlier version reads is there afterwards, of the same type; it can go on writing rows without what is new."""
    before = columns(older_database)
    assert run_migrate(older_database)[-1] == f"{LAST[0]:04}_{LAST[1]}"
    after = columns(older_database)
    assert {key: after.get(key) for key in before} == before
    tables = {table for table, _ in before}
    added = {key: value for key, value in after.items() if key not in before and key[0] in tables}
    assert [key for key, (_, free) in added.items() if not free] == []


def test_gives_up_behind_a_lock(postgres: EmbeddedPostgres, older_database: str, tmp_path: Path) -> None:
    """With a lock_timeout `migrate` fails behind a transaction that holds the lock, and nothing is changed."""
    before = columns(older_database)
    file = tmp_path / "database"
    file.write_text(older_database)
    with psycopg.connect(older_database) as holder:
        holder.execute("SELECT pg_advisory_xact_lock(%s)", [schema._LOCK])
        guide = Guide(
            "upgrade.md", tmp_path, postgres.bin_directory, {"lock_timeout=5s": "lock_timeout=50ms", OWNER: str(file)}
        )
        with pytest.raises(AssertionError, match="lock timeout"):
            guide.step("export")
    assert columns(older_database) == before


WRITES = (
    "INSERT INTO tracker_partitions (stream, partition) VALUES ('s', 0)",
    "INSERT INTO tracker_consumers VALUES ('s', gen_random_uuid(), now())",
    "UPDATE tracker_partitions SET owner = gen_random_uuid()",
    "UPDATE tracker_consumers SET expires_at = now()",
    "DELETE FROM tracker_partitions",
    "DELETE FROM tracker_consumers",
)
COPIES = {
    "COPY tracker_partitions (stream, partition) FROM STDIN": ("s", 1),
    "COPY tracker_consumers FROM STDIN": ("s", uuid4(), "2026-01-01"),
}


async def consume_as(conninfo: str) -> bool:
    """Do in the newer tables what a consumer does; say whether it has the partition."""
    leases = Leases(Connector(conninfo), (None, "conversations"), stream="c", partitions=1, consumer=uuid4(), lease=60)
    try:
        await leases.prepare()
        await leases.claim(0, 1_000, "created")
        return (await leases.beat()).owned == {0}
    finally:
        await leases.disconnect()


def test_rights_on_what_a_migration_makes(first_database: str) -> None:
    """By the guide's default privileges a role that only writes rows may write into newer tables; another may not."""
    (grant,) = re.findall(r"`(ALTER DEFAULT PRIVILEGES[^`]+)`", " ".join(GUIDE.read_text(encoding="utf-8").split()))
    before = {table for table, _ in columns(first_database)}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    on_older = [
        line for line, table in re.findall(r"^(GRANT .* ON (\w+) TO chat);", readme, re.MULTILINE) if table in before
    ]
    assert len(on_older) > 2
    assert not before & {"tracker_partitions", "tracker_consumers"}
    writer, other = (f"role_{uuid4().hex[:12]}" for _ in range(2))
    with psycopg.connect(first_database, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {writer} LOGIN; CREATE ROLE {other}")
        try:
            connection.execute(grant.replace("TO tracker", f"TO {writer}"))
            for line in on_older:
                connection.execute(line.replace("TO chat", f"TO {writer}"))
            run_migrate(first_database)
            connection.execute(f"SET ROLE {other}")
            for statement in (*WRITES, *COPIES):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    connection.execute(statement)
            connection.execute(f"SET ROLE {writer}")
            for statement in WRITES[:2]:
                assert connection.execute(statement).rowcount == 1
            for statement, row in COPIES.items():
                with connection.cursor() as cursor:
                    with cursor.copy(statement) as copy:
                        copy.write_row(row)
                    assert cursor.rowcount == 1
            for statement in WRITES[2:]:
                assert connection.execute(statement).rowcount == 2, statement
            assert anyio.run(consume_as, psycopg.conninfo.make_conninfo(first_database, user=writer))
        finally:
            connection.execute("RESET ROLE")
            connection.execute(f"DROP OWNED BY {writer}; DROP ROLE {writer}; DROP ROLE {other}")
