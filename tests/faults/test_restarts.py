"""A real server that dies, stands still, moves or changes its password; and our own process standing still."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg_pool import AsyncConnectionPool

from tests.conftest import run_migrate
from tests.digits import Digits
from tests.faults.harness import Errors, outcome, sums, tracking
from tests.faults.proxy import Blackhole, Cut, Delay, FaultProxy
from tests.faults.servers import Stream, folder_for_servers, needing_password, server, stopped
from tests.helpers import PATIENCE, command, ledger, query, refusing_port, running, wait_until
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.sink import PostgresSink
from tracker_daemon.sink import SinkFault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from prometheus_client import CollectorRegistry

    from tracker_daemon import Tracker
    from tracker_daemon.embedded import EmbeddedPostgres

NOWHERE = "host=127.0.0.1 port=1 user=postgres dbname=postgres"
COPY, ARRAYS = 1, 10**9
RESTARTS = 8


@pytest.fixture(scope="module")
def postgres() -> Iterator[EmbeddedPostgres]:
    """A server of these tests' own, which they may kill; it writes to the disk in earnest."""
    with folder_for_servers() as folder, server(folder / "pg") as running_server:
        yield running_server


@pytest.fixture
def database(empty_database: str) -> str:
    """The conninfo of a new database with the tables, on that server."""
    run_migrate(empty_database)
    return empty_database


def sink_of(conninfo: str | Callable[[], str], timeout: float = 30.0, copy_from: int = ARRAYS) -> PostgresSink:
    """Return a sink with a deadline of its own."""
    table = (None, "conversations")
    return PostgresSink(Connector(conninfo), table, statement_timeout=timeout, copy_from=copy_from)


def call(tracker: Tracker, digits: Digits, threads: int = 20) -> None:
    """One call on each of a few threads that last."""
    for i in range(threads):
        assert tracker.record_turn(f"t-{i}", "agent", digits.tokens(f"t-{i}"))


def kinds(errors: Errors) -> set[str]:
    """Return the classes of the errors seen."""
    return {error.kind if isinstance(error, SinkFault) else type(error).__name__ for error in errors.seen}


def backends(admin: psycopg.Connection[Any], condition: str = "true") -> list[int]:
    """Return the server processes of the tracker, in the order of their start."""
    statement = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    statement += f" AND backend_type = 'client backend' AND {condition} ORDER BY backend_start"
    return [pid for (pid,) in admin.execute(statement).fetchall()]  # type: ignore[call-overload]


def end_backends(admin: psycopg.Connection[Any]) -> None:
    """Have the tracker connect again."""
    for pid in backends(admin):
        admin.execute("SELECT pg_terminate_backend(%s)", [pid])


# -- restarts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy_from", [COPY, ARRAYS], ids=["copy", "arrays"])
def test_immediate_restarts_in_a_loop(
    postgres: EmbeddedPostgres, database: str, errors: Errors, registry: CollectorRegistry, copy_from: int
) -> None:
    """The server crashes again and again while calls stream in: each call is counted once."""
    digits = Digits()
    with tracking(sink_of(database, copy_from=copy_from), errors, registry) as tracker:
        with Stream(tracker, digits) as stream:
            for _ in range(RESTARTS // 2):
                stream.more()
                before = len(errors.seen)
                postgres.restart("immediate")
                wait_until(lambda before=before: len(errors.seen) > before, "an error")
                tracker.flush(PATIENCE)
        assert outcome(registry, "retry") >= RESTARTS // 2
    assert kinds(errors) <= {"connection", "capacity"}
    assert digits.read(sums(database)).exact


def test_crash_with_a_commit_in_doubt(
    postgres: EmbeddedPostgres, database: str, errors: Errors, registry: CollectorRegistry
) -> None:
    """The answer to a commit is lost and the server crashes: after its recovery the ledger says that it was done."""
    digits = Digits()
    with FaultProxy(database) as proxy, tracking(sink_of(proxy.conninfo), errors, registry) as tracker:
        call(tracker, digits)
        tracker.flush(PATIENCE)
        for n in range(3):
            proxy.redirect(NOWHERE)  # so that the next try finds no server before the crash
            proxy.arm(Cut("server", 1, kind="C", contains=b"SELECT 1"))
            before = len(errors.seen)
            call(tracker, digits)
            wait_until(lambda before=before: len(errors.seen) > before, "an error")
            assert proxy.fired
            postgres.restart("immediate")
            proxy.redirect(database)
            tracker.flush(PATIENCE)
            assert outcome(registry, "duplicate") == n + 1
    assert digits.read(sums(database)).exact


# -- what stands still -----------------------------------------------------------------------------


def test_postmaster_stands_still(
    postgres: EmbeddedPostgres,
    database: str,
    admin: psycopg.Connection[Any],
    errors: Errors,
    registry: CollectorRegistry,
) -> None:
    """An open connection needs no postmaster; a new one does, and is given up at its deadline until it is back."""
    digits = Digits()
    with tracking(sink_of(f"{database} connect_timeout=2"), errors, registry) as tracker:
        call(tracker, digits)
        tracker.flush(PATIENCE)
        with stopped(postgres.pid):
            call(tracker, digits)
            tracker.flush(PATIENCE)
            assert errors.seen == []
            end_backends(admin)
            call(tracker, digits)
            errors.wait_for_kind("timeout")
            assert tracker.stats().pending == 20
        tracker.flush(PATIENCE)
    assert digits.read(sums(database)).exact


@pytest.mark.parametrize("copy_from", [COPY, ARRAYS], ids=["copy", "arrays"])
def test_backend_stands_still_with_our_flush(
    database: str, admin: psycopg.Connection[Any], errors: Errors, registry: CollectorRegistry, copy_from: int
) -> None:
    """A server process that stops with a flush in its buffer wakes after another has done it: nothing is doubled."""
    digits = Digits()
    with tracking(sink_of(database, 0.3, copy_from), errors, registry) as tracker:
        for n in range(3):
            call(tracker, digits)
            tracker.flush(PATIENCE)
            [backend] = backends(admin)
            with stopped(backend):
                call(tracker, digits)
                errors.wait_for_kind("timeout", count=n + 1)
                tracker.flush(PATIENCE)
            wait_until(lambda backend=backend: backend not in backends(admin), "the end of the one that stood still")
    assert digits.read(sums(database)).exact


@pytest.mark.parametrize("copy_from", [COPY, ARRAYS], ids=["copy", "arrays"])
def test_backend_stands_still_with_the_ledger_locked(
    database: str, admin: psycopg.Connection[Any], errors: Errors, registry: CollectorRegistry, copy_from: int
) -> None:
    """A server process stops in the middle of a transaction: the next tries wait for its lock, and see what it did."""
    admin.execute(
        "CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN NEW; END $$"
    )
    admin.execute("CREATE TRIGGER hold BEFORE INSERT ON conversations FOR EACH ROW EXECUTE FUNCTION hold()")
    digits = Digits()
    with tracking(sink_of(database, 0.5, copy_from), errors, registry) as tracker:
        call(tracker, digits)
        tracker.flush(PATIENCE)
        admin.execute("SELECT pg_advisory_lock(1)")
        call(tracker, digits)
        waiting = "wait_event = 'advisory'"
        wait_until(lambda: backends(admin, waiting), "a flush that holds the ledger's row")
        [backend] = backends(admin, waiting)
        with stopped(backend):
            admin.execute("SELECT pg_advisory_unlock(1)")
            errors.wait_for_kind("lock", count=2)
        tracker.flush(PATIENCE)
    assert kinds(errors) <= {"timeout", "lock", "connection"}
    assert digits.read(sums(database)).exact


def test_network_gone_in_the_middle_of_a_copy(
    database: str, proxy: FaultProxy, errors: Errors, registry: CollectorRegistry
) -> None:
    """The server waits without end for the rest of a COPY; our next try does not wait for what that one holds."""
    digits = Digits()
    with tracking(sink_of(proxy.conninfo, 0.4, COPY), errors, registry) as tracker:
        for n in range(3):
            call(tracker, digits)
            tracker.flush(PATIENCE)
            proxy.arm(Blackhole("client", 1, kind="d"))
            call(tracker, digits)
            tracker.flush(PATIENCE)
            assert proxy.fired
            # It has not given up: there is no deadline of the server's for it.
            assert len(query(database, COPYING)) == n + 1
    assert kinds(errors) == {"timeout"}
    proxy.disarm()
    proxy.release()
    wait_until(lambda: not query(database, COPYING), "the end of those that waited")
    assert digits.read(sums(database)).exact


COPYING = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'COPY%'"


def test_late_opening_does_not_fence_its_own_life(
    database: str, proxy: FaultProxy, errors: Errors, registry: CollectorRegistry
) -> None:
    """The first try to open the ledger arrives after the second has succeeded: the life that it opened goes on."""
    digits, late = Digits(), threading.Event()
    proxy.arm(Delay("client", 1, contains=b"INSERT INTO", until=late))
    with tracking(sink_of(proxy.conninfo, 0.3), errors, registry) as tracker:
        call(tracker, digits)
        tracker.flush(PATIENCE)
        assert proxy.fired
        errors.wait_for_kind("timeout")
        late.set()
        wait_until(lambda: proxy.connections == 1, "the end of the late connection")
        wait_until(lambda: len(query(database, ALL)) == 1, "the end of its server process")
        call(tracker, digits)
        tracker.flush(PATIENCE)
        assert registry.get_sample_value("tracker_fenced") == 0
    assert digits.read(sums(database)).exact
    assert len(ledger(database)) == 1


ALL = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"


@pytest.mark.parametrize("copy_from", [COPY, ARRAYS], ids=["copy", "arrays"])
def test_our_process_stands_still(
    database: str, admin: psycopg.Connection[Any], proxy: FaultProxy, copy_from: int
) -> None:
    """Our process is stopped in the middle of a flush for longer than the server waits, and goes on: all is exact."""
    digits = Digits()
    with running(command("fault_stopped.py", proxy.conninfo, str(copy_from), "0.5")) as program:
        for n in range(3):
            program.wait_for(who="flushed")
            program.lines.clear()
            # The end of the merge's answer stays away: with COPY the server now waits for our COMMIT.
            proxy.arm(Blackhole("server", 1, kind="C", contains=b"SELECT 1"))
            proxy.wait_fired(PATIENCE)
            with stopped(program.process.pid):
                proxy.release()
                if copy_from == COPY:
                    wait_until(lambda: not backends(admin), f"the server giving up, round {n}")
            program.lines.clear()
        program.wait_for(who="flushed")
        program.process.send_signal(signal.SIGTERM)
        ended = program.end()
    assert ended.returncode == 0, ended.stderr
    said = ended.by("main")
    assert said["lost"] == said["pending"] == 0
    assert said["accepted"] == said["applied"] == sum(said["made"].values())
    if copy_from == COPY:
        assert said["retries"] >= 3
    digits.made = said["made"]
    assert digits.read(sums(database)).exact


# -- passwords -------------------------------------------------------------------------------------


# Words that stand in no message: of a slow task the event loop says how many seconds it took.
FIRST, SECOND = "the-first-password", "the-second-password"


@pytest.fixture
def role(postgres: EmbeddedPostgres, admin: psycopg.Connection[Any]) -> Iterator[str]:
    """A role that needs a password (`FIRST`), over TCP."""
    name = f"app_{admin.info.dbname}"
    identifier = sql.Identifier(name)
    admin.execute(sql.SQL("CREATE ROLE {}").format(identifier))
    admin.execute(sql.SQL("GRANT ALL ON ALL TABLES IN SCHEMA public TO {}").format(identifier))
    with needing_password(postgres, name, FIRST):
        yield name
    admin.execute(sql.SQL("DROP OWNED BY {}").format(identifier))
    admin.execute(sql.SQL("DROP ROLE {}").format(identifier))


@pytest.mark.parametrize("way", ["passfile", "conninfo", "pool's conninfo", "pool's kwargs"])
def test_rotated_password(
    postgres: EmbeddedPostgres,
    admin: psycopg.Connection[Any],
    role: str,
    tmp_path: Path,
    errors: Errors,
    registry: CollectorRegistry,
    caplog: pytest.LogCaptureFixture,
    way: str,
) -> None:
    """A password that is changed is read again at the next connect, wherever it comes from, without a restart."""
    base = make_conninfo(postgres.tcp_conninfo, user=role, dbname=admin.info.dbname)
    password = [FIRST]
    passfile = tmp_path / "passwords"

    def store() -> None:
        passfile.write_text(f"*:*:*:*:{password[0]}\n")
        passfile.chmod(0o600)

    def conninfo() -> str:
        return make_conninfo(base, password=password[0])

    async def later_conninfo() -> str:
        return conninfo()

    sinks: dict[str, Callable[[], Any]] = {
        "passfile": lambda: f"{base} passfile={passfile}",
        "conninfo": lambda: sink_of(conninfo),
        "pool's conninfo": lambda: AsyncConnectionPool[Any](later_conninfo, open=False),
        "pool's kwargs": lambda: AsyncConnectionPool[Any](base, kwargs=lambda: {"password": password[0]}, open=False),
    }
    store()
    digits = Digits()
    with tracking(sinks[way](), errors, registry) as tracker:
        call(tracker, digits)
        tracker.flush(PATIENCE)
        admin.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(role), SECOND))
        call(tracker, digits)
        tracker.flush(PATIENCE)  # what is open stays open
        assert errors.seen == []
        end_backends(admin)
        call(tracker, digits)
        errors.wait_for_kind("auth")
        password[0] = SECOND
        store()
        tracker.flush(PATIENCE)
    assert kinds(errors) <= {"connection", "auth"}
    told = caplog.text + " ".join(map(str, errors.seen))
    assert FIRST not in told
    assert SECOND not in told
    assert digits.read(sums(conninfo_of(admin))).exact


def conninfo_of(connection: psycopg.Connection[Any]) -> str:
    """Return the conninfo of an open connection."""
    return str(connection.info.dsn)


# -- servers that move -----------------------------------------------------------------------------


def test_two_hosts_of_which_one_refuses(
    postgres: EmbeddedPostgres, database: str, errors: Errors, registry: CollectorRegistry
) -> None:
    """Of several hosts the one that answers is used, through restarts, and nobody hears of the other."""
    digits = Digits()
    name = conninfo_to_dict(database)["dbname"]
    with refusing_port() as nobody:
        conninfo = f"host=127.0.0.1,127.0.0.1 port={nobody},{postgres.port} user=postgres dbname={name}"
        with tracking(conninfo, errors, registry) as tracker:
            call(tracker, digits)
            tracker.flush(PATIENCE)
            assert errors.seen == []
            postgres.restart("fast")
            call(tracker, digits)
            tracker.flush(PATIENCE)
    assert digits.read(sums(database)).exact


def test_primary_made_read_only_and_its_successor_found(
    postgres: EmbeddedPostgres,
    database: str,
    admin: psycopg.Connection[Any],
    errors: Errors,
    registry: CollectorRegistry,
) -> None:
    """A primary that has become read-only is left for the other host, in the middle of its connection too."""
    digits = Digits()
    name = sql.Identifier(admin.info.dbname)
    with FaultProxy(database) as first:
        hosts = f"{conninfo_to_dict(first.conninfo)['port']},{postgres.port}"
        conninfo = f"host=127.0.0.1,127.0.0.1 port={hosts} user=postgres dbname={admin.info.dbname}"
        with tracking(conninfo, errors, registry) as tracker:
            call(tracker, digits)
            tracker.flush(PATIENCE)
            assert first.connections == 1
            # The proxy's side sees a server that is read-only by default; the other does not.
            admin.execute(sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(name))
            end_backends(admin)
            call(tracker, digits)
            errors.wait_for_kind("readonly")
            admin.execute("SET default_transaction_read_only = off")
            admin.execute(sql.SQL("ALTER DATABASE {} RESET default_transaction_read_only").format(name))
            first.redirect(NOWHERE)
            tracker.flush(PATIENCE)
            assert first.connections == 0
    assert digits.read(sums(database)).exact
