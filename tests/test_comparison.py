"""`tracker-daemon bench`: what it leaves behind, and that its figures are of calls that arrived."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import anyio
import psycopg
import pytest
from click.testing import CliRunner

from tests.helpers import query, running, wait_until
from tracker_daemon import comparison
from tracker_daemon.cli import program
from tracker_daemon.errors import TrackerError

if TYPE_CHECKING:
    from pathlib import Path

SMALL = ["--seconds", "0.2", "--threads", "50", "--connections", "2", "--rounds", "1"]
OURS = "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'tracker_bench_%'"


def bench(conninfo: str) -> Any:
    """Run the command in this process."""
    return CliRunner().invoke(program, ["bench", "--database", conninfo, *SMALL], prog_name="tracker-daemon")


def test_compares_and_removes(database: str) -> None:
    """It tells versions, settings and a ratio, touches no table that was there, and leaves none of its own."""
    before = query(database, "SELECT count(*) FROM conversations")
    result = bench(database)
    assert result.exit_code == 0, result.output
    for part in ("server_version=", "fsync=", "synchronous_commit=", "round 1", "times as many calls", "in the table"):
        assert part in result.output
    assert query(database, OURS) == []
    assert query(database, "SELECT count(*) FROM conversations") == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_removes_after_a_signal(empty_database: str, number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C in the middle removes the tables, too, and says so."""
    command = [sys.executable, "-m", "tracker_daemon", "bench", "--database", empty_database, "--seconds", "60"]
    with running(command, {"HOME": str(tmp_path)}) as started:
        wait_until(lambda: any("one statement a call" in line for line in started.lines), "the first round")
        assert len(query(empty_database, OURS)) == 1
        os.kill(started.process.pid, number)
        outcome = started.end()
    assert outcome.returncode == 130, outcome.stderr
    assert "the tables are removed" in "".join(started.lines)
    assert query(empty_database, OURS) == []


def test_role_without_the_right(empty_database: str) -> None:
    """A role that may make no schema gets the server's word, in one line."""
    with psycopg.connect(empty_database, autocommit=True) as connection:
        name = f"r_{connection.info.dbname}"
        connection.execute(f"CREATE ROLE {name} LOGIN")
        try:
            result = bench(psycopg.conninfo.make_conninfo(empty_database, user=name))
        finally:
            connection.execute(f"DROP ROLE {name}")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert "permission denied for database" in result.stderr


def test_calls_that_did_not_arrive(empty_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the table does not have what was called, there is an error and no ratio; the tables are removed all the same."""
    through = comparison._write_through

    async def more(*arguments: Any) -> comparison.Round:
        found = await through(*arguments)
        return comparison.Round(found.calls + 1, found.seconds, found.wait_s)

    monkeypatch.setattr(comparison, "_write_through", more)
    said: list[str] = []
    with pytest.raises(TrackerError, match="no figure holds"):
        anyio.run(comparison.run, empty_database, comparison.Settings(0.2, 50, 2, 1), said.append)
    assert not any("times as many" in line for line in said)
    assert query(empty_database, OURS) == []
