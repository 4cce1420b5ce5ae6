"""Behind pgbouncer in transaction mode with a pool of one connection: the same guarantees, and nothing left behind.

And the server's own `psycopg_pool` handed in: its settings are used, its connections are left alone.
"""

from __future__ import annotations

import itertools
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import psycopg
import pytest
from prometheus_client import CollectorRegistry
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool

from tests.digits import Digits
from tests.faults.harness import Errors, outcome, sums, tracking
from tests.faults.pgbouncer import Pgbouncer, find_pgbouncer
from tests.faults.proxy import Blackhole, Cut, CutAfter, FaultProxy
from tests.faults.servers import Stream
from tests.helpers import PATIENCE, query, wait_until
from tracker_daemon import Tracker
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.sink import PostgresSink

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tracker_daemon.embedded import EmbeddedPostgres

needs_pgbouncer = pytest.mark.skipif(
    find_pgbouncer() is None, reason="pgbouncer is not installed; on Debian: apt-get install pgbouncer"
)


@pytest.fixture
def folder(server_folder: Path) -> Path:
    """A folder of the pooler's own, within reach of the servers' user."""
    made = Path(tempfile.mkdtemp(prefix="pgbouncer-", dir=server_folder))
    made.chmod(0o755)
    return made


@pytest.fixture
def pooler(folder: Path, postgres: EmbeddedPostgres) -> Iterator[Pgbouncer]:
    """A pgbouncer in front of the run's server."""
    with Pgbouncer(folder, "127.0.0.1", postgres.port) as pooler:
        yield pooler


@pytest.fixture
def name(database: str) -> str:
    """The name of the test's database."""
    return str(conninfo_to_dict(database)["dbname"])


@pytest.fixture
def pooled(pooler: Pgbouncer, name: str) -> str:
    """The conninfo of the test's database through the pool."""
    return pooler.conninfo(name)


def sink_of(conninfo: str, timeout: float = 30.0) -> PostgresSink:
    """Return a sink, to be looked into."""
    return PostgresSink(Connector(conninfo), (None, "conversations"), statement_timeout=timeout)


def call(tracker: Tracker, digits: Digits, run: int, threads: int = 20) -> None:
    """A few calls on the threads of one run, new ones and one that lasts."""
    for i in range(threads):
        thread_id = f"r{run}-{i}"
        assert tracker.record_turn(thread_id, "agent", digits.tokens(thread_id))
    lasting = f"lasting-{run // 25}"
    assert tracker.record_turn(lasting, "agent", digits.tokens(lasting))


def session_of(sink: PostgresSink) -> Any:
    """Return the sink's open session."""
    assert sink._session is not None
    return sink._session


# -- pgbouncer -------------------------------------------------------------------------------------


@needs_pgbouncer
def test_two_trackers_in_a_pool_of_one(pooled: str, database: str, errors: Errors, registry: CollectorRegistry) -> None:
    """Two trackers share the one connection: all is exact, and neither leaves anything behind in it."""
    digits = Digits()
    first, second = sink_of(pooled), sink_of(pooled)
    with tracking(first, errors, registry) as one, tracking(second, errors, CollectorRegistry()) as other:
        for _ in range(15):
            for tracker in (one, other):
                for i in range(50):
                    assert tracker.record_turn(f"t-{i}", "agent", digits.tokens(f"t-{i}"))
                tracker.flush(PATIENCE)  # far more often than it takes the driver to prepare a statement
        assert session_of(first).pooled
        assert session_of(second).pooled
        assert session_of(first).connection.prepare_threshold is None
        left = "SELECT pg_backend_pid(), (SELECT count(*) FROM pg_prepared_statements)"
        left += ", (SELECT count(*) FROM pg_class WHERE relname LIKE 'tracker_stage%')"
        left += ", current_setting('statement_timeout'), current_setting('default_transaction_isolation')"
        [(pid, *rest)] = query(pooled, left)
        assert rest == [0, 0, "0", "read committed"]
        everyone = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        assert query(database, everyone) == [(pid,)]  # so it is their connection that was looked into
    assert digits.read(sums(database)).exact
    assert errors.seen == []


@needs_pgbouncer
def test_large_batch_without_copy(pooled: str, database: str, errors: Errors) -> None:
    """12,000 threads, which go by COPY on a direct connection, go through the pool without."""
    copies = []
    for run, conninfo in enumerate([database, pooled]):
        with FaultProxy(conninfo) as proxy:
            proxy.arm()
            registry, digits = CollectorRegistry(), Digits()
            with tracking(proxy.conninfo, errors, registry, max_batch_size=12_000, flush_interval=5) as tracker:
                for i in range(12_000):
                    assert tracker.record_turn(f"r{run}-{i}", "agent", digits.tokens(f"r{run}-{i}"))
                tracker.flush(PATIENCE)
                assert registry.get_sample_value("tracker_flush_rows_bucket", {"le": "10000.0"}) == 0
            copies.append(proxy.messages("client", "d"))
            found = {thread: tokens for thread, tokens in sums(database).items() if thread.startswith(f"r{run}-")}
            assert digits.read(found).exact
    assert copies[0] > 0
    assert copies[1] == 0
    assert query(database, "SELECT count(*) FROM pg_class WHERE relname LIKE 'tracker_stage%'") == [(0,)]
    assert errors.seen == []


@needs_pgbouncer
@pytest.mark.parametrize("direction", ["client", "server"])
@pytest.mark.parametrize("kind", [Cut, CutAfter])
def test_every_message_before_the_pooler(
    pooled: str, database: str, errors: Errors, registry: CollectorRegistry, kind: Any, direction: Any
) -> None:
    """The way to the pooler is cut at message N of a flush, for every N: exact, by the ledger where a commit was done."""
    digits, runs = Digits(), 0
    with FaultProxy(pooled) as proxy:
        sink = sink_of(proxy.conninfo)
        with tracking(sink, errors, registry) as tracker:
            tracker.record_turn("afterwards")
            tracker.flush(PATIENCE)
            for n in itertools.count(1):
                proxy.arm(kind(direction, n))
                call(tracker, digits, n)
                tracker.flush(PATIENCE)
                if not proxy.fired:
                    break
                runs += 1
            proxy.disarm()
            assert session_of(sink).pooled
    assert digits.read(sums(database)).exact
    assert runs >= 8, f"only {runs} messages were cut"
    assert outcome(registry, "retry") >= runs
    if kind is CutAfter and direction == "client":
        assert outcome(registry, "duplicate") >= 1, "no commit was in doubt and found done"


@needs_pgbouncer
@pytest.mark.parametrize("kind", [Cut, CutAfter])
def test_every_message_behind_the_pooler(
    folder: Path, database: str, name: str, errors: Errors, registry: CollectorRegistry, kind: Any
) -> None:
    """The way from the pooler to the server is cut at message N: the pooler survives, and all is exact."""
    digits, runs = Digits(), 0
    with FaultProxy(database) as proxy:
        server = conninfo_to_dict(proxy.conninfo)
        with Pgbouncer(folder, str(server["host"]), int(str(server["port"]))) as pooler:
            with tracking(sink_of(pooler.conninfo(name)), errors, registry) as tracker:
                tracker.record_turn("afterwards")
                tracker.flush(PATIENCE)
                for n in itertools.count(1):
                    proxy.arm(kind("client", n))
                    call(tracker, digits, n)
                    tracker.flush(PATIENCE)
                    if not proxy.fired:
                        break
                    runs += 1
                proxy.disarm()
            assert pooler.running
    assert digits.read(sums(database)).exact
    assert runs >= 8, f"only {runs} messages were cut"
    assert outcome(registry, "retry") >= runs
    if kind is CutAfter:
        assert outcome(registry, "duplicate") >= 1, "no commit was in doubt and found done"


@needs_pgbouncer
def test_commit_through_the_pool_and_answer_lost(
    pooled: str, database: str, errors: Errors, registry: CollectorRegistry
) -> None:
    """Ten commits are done and their answers lost on the way: each is found in the ledger."""
    digits = Digits()
    with FaultProxy(pooled) as proxy, tracking(sink_of(proxy.conninfo), errors, registry) as tracker:
        tracker.record_turn("afterwards")
        tracker.flush(PATIENCE)
        for n in range(10):
            proxy.arm(Cut("server", 1, kind="C", contains=b"COMMIT"))
            call(tracker, digits, n)
            tracker.flush(PATIENCE)
            assert proxy.fired
        proxy.disarm()
    assert outcome(registry, "duplicate") == 10
    assert digits.read(sums(database)).exact


@needs_pgbouncer
def test_server_connection_terminated(
    pooled: str, database: str, admin: psycopg.Connection[Any], errors: Errors, registry: CollectorRegistry
) -> None:
    """The pool's one connection is ended by the operator, again and again, while calls stream in."""
    digits, ended = Digits(), 0
    terminate = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
    terminate += " AND pid <> pg_backend_pid()"
    with tracking(pooled, errors, registry) as tracker, Stream(tracker, digits) as stream:
        while len(errors.seen) < 5:
            stream.more()
            ended += len(admin.execute(terminate).fetchall())  # type: ignore[call-overload]
            assert ended < 1_000, "it is ended and the tracker does not notice"
    assert {getattr(error, "kind", None) for error in errors.seen} == {"connection"}
    assert digits.read(sums(database)).exact


@needs_pgbouncer
def test_pooler_killed_and_restarted(
    pooler: Pgbouncer, pooled: str, database: str, errors: Errors, registry: CollectorRegistry
) -> None:
    """`kill -9` of the pooler in the middle of the stream, five times: calls are taken, and applied when it is back."""
    digits = Digits()
    with tracking(pooled, errors, registry) as tracker, Stream(tracker, digits) as stream:
        for _ in range(5):
            stream.more()
            tracker.flush(PATIENCE)
            before = len(errors.seen)
            pooler.kill()
            stream.more()
            wait_until(lambda before=before: len(errors.seen) > before, "an error")
            pooler.start()
    assert {getattr(error, "kind", None) for error in errors.seen} == {"connection"}
    assert digits.read(sums(database)).exact


@needs_pgbouncer
def test_pooler_paused_resumed_and_reloaded(
    pooler: Pgbouncer, pooled: str, database: str, errors: Errors, registry: CollectorRegistry
) -> None:
    """RELOAD and RECONNECT are not noticed; a PAUSE is waited for by the deadline of each try, and nothing is doubled."""
    digits = Digits()
    with tracking(sink_of(pooled, timeout=0.2), errors, registry) as tracker:
        for n, command in enumerate(["RELOAD", "RECONNECT"]):
            call(tracker, digits, n)
            tracker.flush(PATIENCE)
            pooler.tell(command)
        call(tracker, digits, 2)
        tracker.flush(PATIENCE)
        assert errors.seen == []
        pooler.tell("PAUSE")
        call(tracker, digits, 3)
        errors.wait_for(lambda _: True, count=3)
        pooler.tell("RESUME")
        tracker.flush(PATIENCE)
    assert {getattr(error, "kind", None) for error in errors.seen} == {"timeout"}
    assert digits.read(sums(database)).exact


@needs_pgbouncer
def test_pooler_stopped_for_a_moment(
    pooler: Pgbouncer, pooled: str, database: str, errors: Errors, registry: CollectorRegistry
) -> None:
    """A pooler that falls silent with our flush in its hands, and wakes after we gave it up, doubles nothing."""
    digits = Digits()
    conninfo = f"{pooled} connect_timeout=2"
    with tracking(sink_of(conninfo, timeout=0.2), errors, registry) as tracker:
        for n in range(3):
            call(tracker, digits, n)
            tracker.flush(PATIENCE)
            pooler.send(signal.SIGSTOP)
            call(tracker, digits, n + 100)
            errors.wait_for_kind("timeout", count=n + 1)
            pooler.send(signal.SIGCONT)
    assert digits.read(sums(database)).exact


@needs_pgbouncer
def test_pool_taken_by_somebody_else(pooled: str, database: str, errors: Errors, registry: CollectorRegistry) -> None:
    """While another client sits on the one connection calls go on coalescing; when it leaves, all is applied."""
    digits = Digits()
    with tracking(sink_of(pooled, timeout=0.2), errors, registry) as tracker, psycopg.connect(pooled) as holder:
        holder.execute("SELECT 1")  # opens a transaction: the connection is taken
        for n in range(5):
            call(tracker, digits, n)
        errors.wait_for(lambda _: True, count=3)
        assert tracker.stats().pending == tracker.stats().accepted == 5 * 21
        holder.rollback()
        tracker.flush(PATIENCE)
    assert {getattr(error, "kind", None) for error in errors.seen} == {"timeout"}
    assert digits.read(sums(database)).exact


@needs_pgbouncer
def test_table_locked_behind_the_pooler(
    pooled: str, database: str, errors: Errors, registry: CollectorRegistry
) -> None:
    """The server's own deadlines hold in the pool's connection, for our transactions and for nobody else's."""
    digits = Digits()
    with tracking(sink_of(pooled, timeout=2), errors, registry) as tracker, psycopg.connect(database) as locker:
        call(tracker, digits, 1)
        tracker.flush(PATIENCE)
        locker.execute("LOCK TABLE conversations IN ACCESS EXCLUSIVE MODE")
        call(tracker, digits, 2)
        errors.wait_for_kind("lock")
        locker.rollback()
        tracker.flush(PATIENCE)
        assert query(pooled, "SELECT current_setting('lock_timeout')") == [("0",)]
    assert {getattr(error, "kind", None) for error in errors.seen} == {"lock"}
    assert digits.read(sums(database)).exact


@needs_pgbouncer
def test_late_flush_behind_the_pooler(
    folder: Path, database: str, name: str, errors: Errors, registry: CollectorRegistry
) -> None:
    """The pooler's connection falls deaf in the middle of a transaction: the next try comes by another, and waits."""
    digits = Digits()
    with FaultProxy(database) as proxy:
        server = conninfo_to_dict(proxy.conninfo)
        with (
            Pgbouncer(folder, str(server["host"]), int(str(server["port"]))) as pooler,
            tracking(sink_of(pooler.conninfo(name), timeout=0.4), errors, registry) as tracker,
        ):
            tracker.record_turn("afterwards")
            tracker.flush(PATIENCE)
            for n in range(3):
                # The rows are written and the ledger's row is locked; the answer, and our COMMIT, go nowhere.
                proxy.arm(Blackhole("server", 1, kind="D"))
                call(tracker, digits, n)
                tracker.flush(PATIENCE)
                assert proxy.fired
                proxy.release()
            proxy.disarm()
    errors.wait_for_kind("timeout", count=3)
    assert digits.read(sums(database)).exact


@needs_pgbouncer
def test_one_bad_row_through_the_pool(
    pooled: str, database: str, admin: psycopg.Connection[Any], errors: Errors, registry: CollectorRegistry
) -> None:
    """A row that a CHECK refuses is found by halving, in one transaction of the pooler; the other 299 commit with it."""
    admin.execute("ALTER TABLE conversations ADD CHECK (thread_id <> 'bad')")
    digits = Digits()
    with tracking(pooled, errors, registry, flush_interval=5) as tracker:
        for i in range(299):
            assert tracker.record_turn(f"t-{i}", "agent", digits.tokens(f"t-{i}"))
        assert tracker.record_turn("bad", "agent", 1)
        tracker.flush(PATIENCE)
    assert digits.read(sums(database)).exact
    assert query(database, "SELECT thread_id, sqlstate FROM tracker_dead_letters") == [("bad", "23514")]
    assert registry.get_sample_value("tracker_calls_dead_lettered_total", {"reason": "constraint"}) == 1
    assert errors.seen == []


# -- psycopg_pool ----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["direct", pytest.param("pooled", marks=needs_pgbouncer)])
def test_pool_of_the_server(
    request: pytest.FixtureRequest, database: str, errors: Errors, registry: CollectorRegistry, way: str
) -> None:
    """A pool handed in gives its conninfo, `kwargs` and `configure`; its own connections stay as they are."""
    conninfo = database if way == "direct" else request.getfixturevalue("pooled")
    configured: list[psycopg.AsyncConnection[Any]] = []
    digits = Digits()

    async def configure(connection: psycopg.AsyncConnection[Any]) -> None:
        configured.append(connection)
        await connection.execute("SELECT 1")  # as many do, it leaves a transaction open that the pool would refuse
        await connection.commit()

    async def serve() -> None:
        kwargs = {"prepare_threshold": None, "row_factory": dict_row, "application_name": "the host"}
        async with AsyncConnectionPool[Any](
            conninfo, kwargs=kwargs, configure=configure, min_size=1, max_size=1, open=False
        ) as pool:
            await pool.wait()
            [its_own] = configured
            tracker = Tracker(pool, on_error=errors, registry=registry, flush_interval=0.01)
            async with tracker:
                for _ in range(10):
                    for i in range(20):
                        assert tracker.record_turn(f"t-{i}", "agent", digits.tokens(f"t-{i}"))
                    await tracker.aflush(PATIENCE)
                    async with pool.connection() as connection:
                        assert connection is its_own
                        row = await (await connection.execute("SELECT 1 AS one")).fetchone()
                        assert row == {"one": 1}
                assert len(configured) == 2
                ours = configured[1]
                assert ours.prepare_threshold is None
                assert ours.info.get_parameters()["application_name"] == "the host"
            assert ours.closed
            assert not its_own.closed
            assert not its_own.autocommit
            assert pool.get_stats()["requests_num"] == 10  # the test's own
            assert pool.get_stats().get("connections_num") == 1

    anyio.run(serve)
    assert digits.read(sums(database)).exact
    assert errors.seen == []


def test_pool_that_is_used_up_or_closed(database: str, errors: Errors, registry: CollectorRegistry) -> None:
    """The tracker takes no connection out of the pool: it writes while all are taken, and after the pool is closed."""
    digits = Digits()

    async def serve() -> None:
        pool = AsyncConnectionPool[Any](database, min_size=1, max_size=1, open=False)
        await pool.open(wait=True)
        tracker = Tracker(pool, on_error=errors, registry=registry, flush_interval=0.01)
        async with tracker:
            async with pool.connection():
                call(tracker, digits, 1)
                await tracker.aflush(PATIENCE)
            await pool.close()
            call(tracker, digits, 2)
            await tracker.aflush(PATIENCE)

    anyio.run(serve)
    assert digits.read(sums(database)).exact
    assert errors.seen == []


@needs_pgbouncer
def test_many_bad_rows(pooled: str, database: str, errors: Errors, registry: CollectorRegistry) -> None:
    """Bad rows one after the other go one by one in the server there as well, and nothing stays in its connection."""
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute("ALTER TABLE conversations ADD CHECK (thread_id NOT LIKE 'bad%')")
        with tracking(pooled, errors, registry, flush_interval=0.1) as tracker:
            for number in range(200):
                assert tracker.record_turn(f"bad-{number}", "agent", 1)
                assert tracker.record_turn(f"good-{number % 20}", "agent", 1)
            tracker.flush(PATIENCE)
        assert admin.execute("SELECT count(*) FROM tracker_dead_letters").fetchall() == [(200,)]
    assert sums(database) == {f"good-{number}": 10 for number in range(20)}
    with psycopg.connect(pooled) as same:
        left = same.execute("SELECT current_setting('tracker_daemon.thread_ids', true)").fetchone()
    assert left in ((None,), ("",))
