"""Each fault of the proxy, against a real server and real clients."""

from __future__ import annotations

import asyncio
import itertools
import select
import socket
import struct
import threading
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.faults.proxy import (
    DIRECTIONS,
    MAX_STARTUP_BYTES,
    PEEK_BYTES,
    Blackhole,
    Cut,
    CutAfter,
    Delay,
    Direction,
    FaultProxy,
    Refuse,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tracker_daemon.embedded import EmbeddedPostgres

Connection = psycopg.Connection[Any]

DEADLINE_S = 20.0
MAX_RUNS = 200
NAME = "through the proxy"


def real_threads() -> set[threading.Thread]:
    """Return the threads but those that only once asked for their name: of other tests, and perhaps long gone."""
    return {thread for thread in threading.enumerate() if type(thread).__name__ != "_DummyThread"}


@pytest.fixture(params=["unix", "tcp"])
def socket_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """Where the proxy listens: a socket folder, or TCP."""
    return tmp_path if request.param == "unix" else None


@pytest.fixture
def proxy(postgres: EmbeddedPostgres, tmp_path: Path) -> Iterator[FaultProxy]:
    """A proxy on a Unix socket; the server knows its clients by their name."""
    with FaultProxy(make_conninfo(postgres.conninfo, application_name=NAME), socket_dir=tmp_path) as proxy:
        yield proxy


@pytest.fixture
def direct(postgres: EmbeddedPostgres) -> Iterator[Connection]:
    """A connection that does not go through the proxy."""
    with closing(psycopg.connect(postgres.conninfo, autocommit=True)) as conn:
        yield conn


@pytest.fixture
def table(direct: Connection) -> Iterator[str]:
    """An empty table of the test's own."""
    name = f"t_{uuid.uuid4().hex}"
    direct.execute(f"CREATE TABLE {name} (n integer, note text)")
    yield name
    direct.execute(f"DROP TABLE {name}")


@pytest.fixture
def rows(direct: Connection, table: str) -> Callable[[], int]:
    """The number of committed rows of the table."""
    return lambda: value(direct, f"SELECT count(*) FROM {table}")


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    """Runs what a test waits for from outside."""
    with ThreadPoolExecutor() as threads:
        yield threads


def value(conn: Connection, query: str) -> Any:
    """The only value of the only row."""
    row = conn.execute(query).fetchone()
    assert row is not None
    return row[0]


def until(condition: Callable[[], bool], direct: Connection) -> None:
    """Ask until *condition* holds; fail at the deadline."""
    for _ in range(int(DEADLINE_S * 200)):
        if condition():
            return
        direct.execute("SELECT pg_sleep(0.005)")
    pytest.fail("the condition did not come true in time")


def backends(direct: Connection, state: str = "%") -> int:
    """How many sessions the server has with clients of the proxy."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND coalesce(state, '') LIKE %s"
    row = direct.execute(query, (NAME, state)).fetchone()
    assert row is not None
    return int(row[0])


def open_through(proxy: FaultProxy) -> closing[Connection]:
    """An autocommit connection through the proxy."""
    return closing(psycopg.connect(proxy.conninfo, autocommit=True))


def insert_and_copy(conninfo: str, table: str) -> None:
    """BEGIN, INSERT, COPY, COMMIT: all three rows or none."""
    with closing(psycopg.connect(conninfo)) as conn, conn.cursor() as cursor:
        cursor.execute(f"INSERT INTO {table} VALUES (%s, %s)", (1, "inserted"))
        with cursor.copy(f"COPY {table} FROM STDIN") as copy:
            copy.write_row((2, "copied"))
            copy.write_row((3, "copied"))
        conn.commit()


def insert_and_copy_async(conninfo: str, table: str) -> None:
    """The same through an asynchronous connection."""

    async def work() -> None:
        conn = await psycopg.AsyncConnection.connect(conninfo)
        try:
            async with conn.cursor() as cursor:
                await cursor.execute(f"INSERT INTO {table} VALUES (%s, %s)", (1, "inserted"))
                async with cursor.copy(f"COPY {table} FROM STDIN") as copy:
                    await copy.write_row((2, "copied"))
                    await copy.write_row((3, "copied"))
            await conn.commit()
        finally:
            await conn.close()

    asyncio.run(work())


def insert_pipelined(conninfo: str, table: str) -> None:
    """BEGIN, three INSERTs, a second Sync midway, COMMIT in one pipeline: all three rows or none."""
    with closing(psycopg.connect(conninfo)) as conn, conn.pipeline() as pipeline:
        conn.execute(f"INSERT INTO {table} VALUES (%s, %s)", (1, "piped"))
        conn.execute(f"INSERT INTO {table} VALUES (%s, %s)", (2, "piped"))
        pipeline.sync()
        conn.execute(f"INSERT INTO {table} VALUES (%s, %s)", (3, "piped"))
        conn.commit()


def copy_extended(conninfo: str, table: str) -> None:
    """A COPY in the extended protocol, where the server ignores the Sync before the data: all three rows or none."""
    with closing(psycopg.connect(conninfo, autocommit=True)) as conn:
        pgconn = conn.pgconn
        pgconn.send_query_params(f"COPY {table} FROM STDIN".encode(), None)
        if (result := next_result(pgconn)) is not None and result.status == psycopg.pq.ExecStatus.COPY_IN:
            pgconn.put_copy_data(b"1\tcopied\n2\tcopied\n3\tcopied\n")
            pgconn.put_copy_end()
            result = next_result(pgconn)
        if result is None or result.status != psycopg.pq.ExecStatus.COMMAND_OK or next_result(pgconn) is not None:
            raise psycopg.OperationalError(pgconn.get_error_message())


def next_result(pgconn: psycopg.pq.abc.PGconn) -> psycopg.pq.abc.PGresult | None:
    """The next result; libpq's own wait would hold the interpreter's lock, which the proxy needs."""
    pgconn.flush()
    while pgconn.is_busy():
        select.select([pgconn.socket], [], [], DEADLINE_S)
        pgconn.consume_input()
    return pgconn.get_result()


WORKS = [insert_and_copy, insert_and_copy_async, insert_pipelined, copy_extended]


def failed(work: Callable[[str, str], None], proxy: FaultProxy, table: str) -> bool:
    """Whether the work, done through the proxy, ended in an error."""
    try:
        work(proxy.conninfo, table)
    except psycopg.OperationalError:
        return True
    return False


@pytest.mark.parametrize("work", WORKS)
def test_unharmed(
    postgres: EmbeddedPostgres,
    socket_dir: Path | None,
    table: str,
    rows: Callable[[], int],
    work: Callable[[str, str], None],
) -> None:
    """With nothing armed work goes through, over both kinds of socket, and no thread or file is left."""
    before = real_threads()
    with FaultProxy(postgres.conninfo, socket_dir=socket_dir) as proxy:
        work(proxy.conninfo, table)
        assert proxy.fired == []
        assert proxy.messages("client", "startup") == 1
        assert proxy.messages("client", "X") == 1
        assert 0 < proxy.messages("server", "Z") < proxy.messages("server")
    assert rows() == 3
    assert real_threads() == before
    assert socket_dir is None or not list(socket_dir.iterdir())


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("after", [0, 3, -1])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_cut_at_every_message(
    *,
    proxy: FaultProxy,
    direct: Connection,
    table: str,
    rows: Callable[[], int],
    direction: Direction,
    after: int,
    work: Callable[[str, str], None],
) -> None:
    """Cutting at message 1, 2, … until none is left keeps all rows or none, both happen, and none is missed."""
    proxy.arm()
    work(proxy.conninfo, table)
    messages = proxy.messages(direction)
    outcomes = []
    for n in range(1, MAX_RUNS):
        direct.execute(f"TRUNCATE {table}")
        proxy.arm(Cut(direction, n, after=after))
        broken = failed(work, proxy, table)
        fired = proxy.fired
        until(lambda: backends(direct) == 0, direct)
        outcomes.append((broken, rows()))
        if not fired:
            break
        assert [(f.index, f.connection) for f in fired] == [(n, n + 1)]
    # psycopg's pipeline sends one Flush more or less, as the answers happen to come.
    assert abs(n - (messages + 1)) <= (work is insert_pipelined and direction == "client")
    assert outcomes[-1] == (False, 3)
    assert {count for _, count in outcomes} == {0, 3}
    assert {broken for broken, count in outcomes if count == 0} == {True}
    # What tells a lost answer from a lost request: only the first leaves the rows behind an error.
    assert ((True, 3) in outcomes) == (direction == "server" or work is insert_pipelined)


@pytest.mark.parametrize("work", WORKS)
def test_answer_lost_at_every_message(
    proxy: FaultProxy,
    direct: Connection,
    table: str,
    rows: Callable[[], int],
    work: Callable[[str, str], None],
) -> None:
    """Whichever request's answer is lost, the server is seen to have answered it; data of a COPY has no answer."""
    outcomes = []
    for n in range(1, MAX_RUNS):
        direct.execute(f"TRUNCATE {table}")
        proxy.arm(CutAfter("client", n))
        broken = failed(work, proxy, table)
        if not proxy.fired:
            break
        (fired,) = proxy.fired
        assert fired.processed == (fired.kind not in {"d", "H"}), fired
        until(lambda: backends(direct) == 0, direct)
        outcomes.append((broken, rows(), fired.kind))
    assert (True, 3) in {outcome[:2] for outcome in outcomes}
    kinds = {kind for _, _, kind in outcomes}
    assert kinds >= {"startup", "P", "B", "D", "E", "S"}
    assert work is insert_pipelined or kinds >= {"d", "c", "X"}


@pytest.mark.parametrize(
    "fault",
    [CutAfter("server", kind="C", contains=b"COMMIT"), CutAfter("client", kind="Q", contains=b"COMMIT")],
    ids=["server", "client"],
)
@pytest.mark.parametrize("work", [insert_and_copy, insert_and_copy_async])
def test_commit_done_and_answer_lost(
    *,
    postgres: EmbeddedPostgres,
    socket_dir: Path | None,
    table: str,
    rows: Callable[[], int],
    fault: CutAfter,
    work: Callable[[str, str], None],
) -> None:
    """The client of a COMMIT whose answer is lost gets an error, at once its rows are there, and a retry passes."""
    with FaultProxy(postgres.conninfo, socket_dir=socket_dir) as proxy:
        proxy.arm(fault)
        with pytest.raises(psycopg.OperationalError):
            work(proxy.conninfo, table)
        assert rows() == 3
        (fired,) = proxy.fired
        assert (fired.fault, fired.processed) == (fault, True)
        work(proxy.conninfo, table)
        assert rows() == 6
        assert len(proxy.fired) == 1


def test_answer_of_a_waiting_server(proxy: FaultProxy, direct: Connection, table: str, rows: Callable[[], int]) -> None:
    """An answer that does not come within `wait_s` is reported as not seen, and the connection is cut all the same."""
    with direct.transaction(), open_through(proxy) as conn:
        direct.execute(f"LOCK TABLE {table}")
        proxy.arm(CutAfter("client", kind="S", wait_s=0.01))
        with pytest.raises(psycopg.OperationalError):
            conn.execute(f"INSERT INTO {table} VALUES (%s)", (1,))
        assert [fired.processed for fired in proxy.fired] == [False]
    until(lambda: rows() == 1, direct)


def test_cut_inside_a_frame(proxy: FaultProxy, direct: Connection, table: str, rows: Callable[[], int]) -> None:
    """A COPY cut after any number of bytes of its data leaves nothing, and the next one everything."""
    size = 0
    for after in itertools.count():
        proxy.arm(Cut("client", kind="d", after=after))
        assert failed(insert_and_copy, proxy, table)
        (fired,) = proxy.fired
        size = fired.size
        if after == size - 1:
            break
    assert size == len(b"d####2\tcopied\n3\tcopied\n")
    until(lambda: backends(direct) == 0, direct)
    assert rows() == 0
    insert_and_copy(proxy.conninfo, table)
    assert rows() == 3


def test_cut_inside_a_long_frame(proxy: FaultProxy) -> None:
    """The cut finds its byte even when it is far behind what the proxy looks at."""
    with open_through(proxy) as conn:
        conn.execute("SELECT 1")
        proxy.arm(Cut("server", kind="D", after=5_000_000))
        with pytest.raises(psycopg.OperationalError):
            conn.execute("SELECT repeat('x', 10000000)")
        (fired,) = proxy.fired
        assert fired.size == 10_000_000 + 1 + 4 + 2 + 4


def test_answer_later_than_the_retry(
    proxy: FaultProxy, table: str, rows: Callable[[], int], threads: ThreadPoolExecutor
) -> None:
    """While the answer to one COMMIT is held, others pass; then it arrives whole and in order."""
    flag = threading.Event()
    proxy.arm(Delay("server", kind="C", contains=b"COMMIT", until=flag))
    late = threads.submit(insert_and_copy, proxy.conninfo, table)
    fired = proxy.wait_fired(DEADLINE_S)
    assert (fired.kind, fired.connection) == ("C", 1)
    assert rows() == 3
    insert_and_copy(proxy.conninfo, table)
    assert rows() == 6
    assert not late.done()
    flag.set()
    late.result(DEADLINE_S)


def test_commit_later_than_its_client(
    proxy: FaultProxy, direct: Connection, table: str, rows: Callable[[], int]
) -> None:
    """A held COMMIT reaches the server although its client has long given up."""
    with closing(psycopg.connect(proxy.conninfo)) as conn:
        conn.execute(f"INSERT INTO {table} VALUES (1)")
        proxy.arm(Delay("client", kind="Q", contains=b"COMMIT"))
        conn.pgconn.send_query(b"COMMIT")
        conn.pgconn.flush()
    assert [fired.kind for fired in proxy.fired] == ["Q"]
    assert rows() == 0
    assert backends(direct) == 1
    proxy.release()
    until(lambda: rows() == 1 and backends(direct) == 0, direct)


def test_delay_of_seconds(proxy: FaultProxy, table: str, rows: Callable[[], int]) -> None:
    """Every message of a connection may be late by a little; nothing is lost or out of order."""
    proxy.arm(Delay("client", seconds=0.001, repeat=None), Delay("server", seconds=0.001, repeat=None))
    insert_and_copy(proxy.conninfo, table)
    assert len(proxy.fired) == proxy.messages("client") + proxy.messages("server")
    assert rows() == 3


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_deaf_peer_released(proxy: FaultProxy, threads: ThreadPoolExecutor, direction: Direction) -> None:
    """A connection that went deaf answers after the release as if nothing had been."""
    with open_through(proxy) as conn, open_through(proxy) as other:
        proxy.arm(Blackhole(direction))
        answer: Future[Any] = threads.submit(value, conn, "SELECT 1")
        proxy.wait_fired(DEADLINE_S)
        assert value(other, "SELECT 2") == 2
        assert not answer.done()
        assert proxy.connections == 2
        proxy.release()
        assert answer.result(DEADLINE_S) == 1
        assert len(proxy.fired) == 1


def test_deaf_peer_and_a_client_with_a_deadline(
    proxy: FaultProxy, direct: Connection, table: str, rows: Callable[[], int]
) -> None:
    """A client that gives up on a deaf peer can go on elsewhere; the server keeps the old session until the release."""

    async def give_up() -> None:
        conn = await psycopg.AsyncConnection.connect(proxy.conninfo)
        await conn.execute(f"INSERT INTO {table} VALUES (1)")
        proxy.arm(Blackhole("client"))
        commit = asyncio.create_task(conn.commit())
        await asyncio.wait([commit], timeout=0.01)
        await asyncio.to_thread(proxy.wait_fired, DEADLINE_S)
        assert not commit.done()
        await conn.close()
        commit.cancel()
        await asyncio.gather(commit, return_exceptions=True)

    asyncio.run(give_up())
    assert rows() == 0
    assert backends(direct) == 1
    insert_and_copy(proxy.conninfo, table)
    assert rows() == 3
    proxy.release()
    until(lambda: rows() == 4 and backends(direct) == 0, direct)


def test_refused(proxy: FaultProxy) -> None:
    """The connections asked for are closed at once; those before and after are served."""
    proxy.arm(Refuse(n=2, repeat=2))
    with open_through(proxy) as conn:
        for _ in range(2):
            with pytest.raises(psycopg.OperationalError):
                psycopg.connect(proxy.conninfo)
        assert value(conn, "SELECT 1") == 1
    with open_through(proxy) as conn:
        assert value(conn, "SELECT 1") == 1
    assert [fired.connection for fired in proxy.fired] == [2, 3]


def test_silent(proxy: FaultProxy, threads: ThreadPoolExecutor) -> None:
    """A connection accepted in silence waits until the release and is then served; others never wait."""
    proxy.arm(Refuse(silent=True))
    waiting: Future[Connection] = threads.submit(psycopg.connect, proxy.conninfo)
    proxy.wait_fired(DEADLINE_S)
    with open_through(proxy) as conn:
        assert value(conn, "SELECT 1") == 1
    assert not waiting.done()
    proxy.release()
    with closing(waiting.result(DEADLINE_S)) as conn:
        assert value(conn, "SELECT 2") == 2


def test_cancel_request(proxy: FaultProxy, direct: Connection, threads: ThreadPoolExecutor) -> None:
    """A cancel request reaches the server on a connection of its own and ends the query."""
    with open_through(proxy) as conn:
        query = threads.submit(conn.execute, "SELECT pg_sleep(60)")
        until(lambda: backends(direct, "active") == 1, direct)
        proxy.arm()
        conn.cancel_safe(timeout=DEADLINE_S)
        with pytest.raises(psycopg.errors.QueryCanceled):
            query.result(DEADLINE_S)
        assert proxy.messages("client", "cancel") == 1
        assert value(conn, "SELECT 1") == 1


def test_cancel_request_lost(proxy: FaultProxy, direct: Connection, threads: ThreadPoolExecutor) -> None:
    """A cancel request is a message to fail like any other: the query runs on."""
    with open_through(proxy) as conn:
        query = threads.submit(conn.execute, "SELECT pg_sleep(60)")
        until(lambda: backends(direct, "active") == 1, direct)
        proxy.arm(Cut("client", kind="cancel"))
        conn.cancel_safe(timeout=DEADLINE_S)  # a server never answers it, so the client cannot know
        assert [fired.kind for fired in proxy.fired] == ["cancel"]
        assert not query.done()
        assert proxy.sever_all() == 1
        with pytest.raises(psycopg.OperationalError):
            query.result(DEADLINE_S)
    assert backends(direct, "active") == 1
    direct.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)'")
    until(lambda: backends(direct) == 0, direct)


def test_pipeline(proxy: FaultProxy) -> None:
    """Hundreds of answers in flight come back in order, an error among them included."""
    with open_through(proxy) as conn, conn.cursor() as cursor:
        with conn.pipeline():
            cursors = [conn.execute("SELECT %s::int", (i,)) for i in range(500)]
            assert [c.fetchone() for c in cursors] == [(i,) for i in range(500)]
        with pytest.raises(psycopg.errors.DivisionByZero), conn.pipeline():
            conn.execute("SELECT 1 / 0")
        assert cursor.execute("SELECT 1").fetchone() == (1,)
        proxy.arm(CutAfter("client", kind="S"))
        with pytest.raises(psycopg.OperationalError), conn.pipeline():
            conn.execute("SELECT 1 / 0")
        assert [fired.processed for fired in proxy.fired] == [True]


def test_large_copy(postgres: EmbeddedPostgres, socket_dir: Path | None, table: str, direct: Connection) -> None:
    """Long values and many short rows pass a COPY both ways unchanged, with a fault armed that looks at each."""
    long = "é" * (2 * PEEK_BYTES)
    notes = [long, *(f"note {i}" for i in range(200_000)), long]
    with FaultProxy(postgres.conninfo, socket_dir=socket_dir) as proxy, open_through(proxy) as conn:
        proxy.arm(*(Cut(direction, contains=b"is nowhere") for direction in DIRECTIONS))
        with conn.cursor() as cursor:
            with cursor.copy(f"COPY {table} FROM STDIN") as copy:
                for i, note in enumerate(notes):
                    copy.write_row((i, note))
            with cursor.copy(f"COPY (SELECT note FROM {table} ORDER BY n) TO STDOUT") as copy:
                assert [row[0] for row in copy.rows()] == notes
        assert proxy.fired == []
        assert proxy.messages("server", "d") == len(notes)
    assert value(direct, f"SELECT count(*) FROM {table}") == len(notes)


def test_encryption_declined(postgres: EmbeddedPostgres) -> None:
    """A client that would like encryption is told that there is none, and goes on without."""
    with FaultProxy(postgres.conninfo) as proxy:
        conninfo = make_conninfo(proxy.conninfo, sslmode="prefer")
        with closing(psycopg.connect(conninfo)) as conn:
            assert value(conn, "SELECT 1") == 1
        assert proxy.messages("client", "ssl") == 1
        assert proxy.messages("client", "startup") == 1


def test_selection(proxy: FaultProxy) -> None:
    """A fault counts only the messages it asks for, from its arming on, and fires as often as it says."""
    with open_through(proxy) as conn:
        conn.prepare_threshold = None
        conn.execute("SELECT 'x'")
        proxy.arm(Delay("client", 2, kind="Q", contains=b"'x'", seconds=0, repeat=2))
        for word in "xyxyxyx":
            conn.execute(f"SELECT '{word}'")
        assert [fired.index for fired in proxy.fired] == [3, 5]
        assert proxy.messages("client") == proxy.messages("client", "Q") == 7
        proxy.arm()
        conn.execute("SELECT 'x'")
        assert proxy.fired == []
        assert proxy.messages("client") == 1


def test_two_faults_at_one_message(proxy: FaultProxy) -> None:
    """The first armed takes the message, the other takes the next."""
    first, second = Delay("client", kind="Q", seconds=0), Cut("client", kind="Q")
    with open_through(proxy) as conn:
        proxy.arm(first, second)
        conn.execute("SELECT 1")
        assert [fired.fault for fired in proxy.fired] == [first]
        with pytest.raises(psycopg.OperationalError):
            conn.execute("SELECT 2")
        assert [(fired.fault, fired.index) for fired in proxy.fired] == [(first, 1), (second, 2)]


def test_disarm(proxy: FaultProxy) -> None:
    """After `disarm` nothing fires; what fired stays on record."""
    with open_through(proxy) as conn:
        proxy.arm(Delay("client", seconds=0, repeat=None))
        conn.execute("SELECT 1")
        proxy.disarm()
        conn.execute("SELECT 2")
        assert len(proxy.fired) == 1


def test_farewell_counts_for_its_own_run(postgres: EmbeddedPostgres, socket_dir: Path | None) -> None:
    """The Terminate of a connection closed before `arm` never counts after it, however close the two are."""
    with FaultProxy(postgres.conninfo, socket_dir=socket_dir) as proxy:
        for _ in range(50):
            with open_through(proxy):
                proxy.arm()
            assert proxy.messages("client", "X") == 1
            with open_through(proxy):
                proxy.arm(Cut("client"))
            assert [fired.kind for fired in proxy.fired] == ["X"]
            with open_through(proxy):
                pass
            proxy.arm()
            assert proxy.messages("client") == 0


def test_wait_fired_says_what_it_saw(proxy: FaultProxy) -> None:
    """The error of a fault that did not fire names the messages that came."""
    with open_through(proxy) as conn:
        conn.execute("SELECT 1")
        with pytest.raises(TimeoutError, match=r"0 of 1 faults fired.*1 client Q x1.*1 server C x1"):
            proxy.wait_fired(0)


def test_sever_all(proxy: FaultProxy, direct: Connection) -> None:
    """Every connection is closed on both sides, and new ones are served."""
    with open_through(proxy) as one, open_through(proxy) as two:
        assert proxy.sever_all() == 2
        for conn in one, two:
            with pytest.raises(psycopg.OperationalError):
                conn.execute("SELECT 1")
    until(lambda: backends(direct) == 0, direct)
    assert proxy.connections == 0
    with open_through(proxy) as conn:
        assert value(conn, "SELECT 1") == 1


def test_redirect(proxy: FaultProxy, postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    """New connections go to the server named last; where none listens they are closed, as by a dead server."""
    proxy.redirect(f"host={tmp_path / 'nowhere'} user=postgres dbname=postgres")
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(proxy.conninfo)
    proxy.redirect(postgres.conninfo)
    with open_through(proxy) as conn:
        assert value(conn, "SELECT 1") == 1


def test_two_proxies_in_one_folder(proxy: FaultProxy, tmp_path: Path) -> None:
    """Proxies may stand before one another and share a folder."""
    with FaultProxy(proxy.conninfo, socket_dir=tmp_path) as outer, open_through(outer) as conn:
        assert value(conn, "SELECT 1") == 1
        assert outer.conninfo != proxy.conninfo
    with open_through(proxy) as conn:
        assert value(conn, "SELECT 1") == 1


@pytest.mark.parametrize(
    "fault", [Blackhole("client"), Delay("server"), Refuse(silent=True)], ids=lambda f: type(f).__name__
)
def test_leaving_while_held(
    postgres: EmbeddedPostgres, tmp_path: Path, threads: ThreadPoolExecutor, fault: Blackhole | Delay | Refuse
) -> None:
    """Leaving the context ends what is held: its client gets an error."""
    with FaultProxy(postgres.conninfo, socket_dir=tmp_path) as proxy:
        proxy.arm(fault)
        held: Future[Connection] = threads.submit(psycopg.connect, proxy.conninfo)
        proxy.wait_fired(DEADLINE_S)
    with pytest.raises(psycopg.OperationalError):
        held.result(DEADLINE_S)
    with pytest.raises(RuntimeError, match="not running"):
        proxy.release()
    assert [fired.fault for fired in proxy.fired] == [fault]


def test_frames_in_single_bytes(proxy: FaultProxy) -> None:
    """Messages are told apart however the bytes are cut."""
    startup = struct.pack("!II", 0, 196608) + b"user\0postgres\0database\0postgres\0\0"
    query = b"SELECT 1\0"
    sent = struct.pack("!I", len(startup)) + startup[4:]
    sent += b"Q" + struct.pack("!I", 4 + len(query)) + query
    sent += b"X" + struct.pack("!I", 4)
    params = conninfo_to_dict(proxy.conninfo)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(DEADLINE_S)
        client.connect(f"{params['host']}/.s.PGSQL.{params['port']}")
        for byte in sent:
            client.send(bytes([byte]))
            proxy.settle()
        while client.recv(65536):
            pass
    assert proxy.messages("client") == 3
    assert proxy.messages("server", "Z") == 2
    assert proxy.messages("server", "D") == 1


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\n\r\n", struct.pack("!II", MAX_STARTUP_BYTES + 1, 196608)])
def test_garbage(postgres: EmbeddedPostgres, sent: bytes) -> None:
    """What is not Postgres fails the test at the end instead of passing for a fault."""
    proxy = FaultProxy(postgres.conninfo)
    with pytest.raises(ExceptionGroup, match="the proxy failed"), proxy:  # noqa: PT012
        port = conninfo_to_dict(proxy.conninfo)["port"]
        with socket.create_connection(("127.0.0.1", int(port or 0)), DEADLINE_S) as client:
            client.sendall(sent)
            assert client.recv(1) == b""


def test_arguments() -> None:
    """Faults that could never fire and servers that cannot be found are refused at once."""
    with pytest.raises(ValueError, match="count from 1"):
        Cut("client", 0)
    with pytest.raises(ValueError, match="count from 1"):
        Refuse(repeat=0)
    with pytest.raises(ValueError, match="direction"):
        Cut("both")  # type: ignore[arg-type]
    for conninfo in "dbname=postgres", "host=a,b":
        with pytest.raises(ValueError, match="exactly one"):
            FaultProxy(conninfo)
