"""Clients that are slow, silent, greedy or send garbage cost nobody else anything."""

from __future__ import annotations

import asyncio
import http.client
import resource
import select
import signal
import socket
import threading
from contextlib import closing, suppress
from typing import TYPE_CHECKING
from uuid import uuid4

import psycopg
import pytest

from tests.daemon.harness import Daemon, read_all, serving, turn
from tests.helpers import PATIENCE, refusing_port, totals, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

HEAD = b"POST /v1/calls HTTP/1.1\r\nHost: d\r\n"
TURN = turn().encode()


@pytest.fixture(scope="module")
def shared(postgres, template) -> Iterator[Daemon]:
    """A daemon with narrow bounds, for the module."""
    from tests.conftest import _database

    found = _database(postgres, template)
    options = ("--read-timeout", "0.5", "--max-body", "100000", "--max-line", "1000")
    with serving(next(found), *options) as daemon:
        yield daemon
        # Nothing was taken of any of it, and nobody hangs on.
        daemon.post("", wait=True)
        assert totals(daemon.database).turns == len(FINE)
        assert "Traceback" not in daemon.log
        assert "Invalid HTTP request" not in daemon.log  # no client writes the log at its own rate
        assert daemon.stop() == 0
    next(found, None)


FINE: list[int] = []


@pytest.fixture
def daemon(shared: Daemon) -> Iterator[Daemon]:
    """The same; after each test an honest call goes through."""
    yield shared
    FINE.append(shared.post(TURN, wait=True).status)
    assert FINE[-1] == 200


def status_of(answer: bytes) -> int:
    """Return the status of a raw answer, 0 for none."""
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"G",
        HEAD,
        HEAD + b"Content-Length: 100\r\n\r\n" + b"{",
        HEAD + b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"cal',
        b"GET /livez HTTP/1.1\r\nHost: d\r\n\r\nGET /li",
    ],
    ids=["silent", "slow head", "half a head", "slow body", "slow chunks", "slow second head"],
)
def test_slow(daemon: Daemon, sent: bytes) -> None:
    """Whoever does not bring a request to its end in time is cut off, a body that is late with 408."""
    with daemon.raw() as client:
        client.sendall(sent)
        answer = read_all(client)
    if b"\r\n\r\n" in sent and sent.startswith(HEAD):
        assert status_of(answer) == 408
    else:
        assert answer.count(b"HTTP/1.1") == sent.count(b"\r\n\r\n")


def test_byte_by_byte(daemon: Daemon) -> None:
    """A head that comes a byte at a time has the same time as a whole one."""
    with daemon.raw() as client:
        try:
            for byte in HEAD * 1_000:
                client.send(bytes([byte]))
                threading.Event().wait(0.02)
        except (BrokenPipeError, ConnectionResetError):
            return
        pytest.fail("it was never cut off")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), 400),
        (b"\r\n" * 50_000, 400),
        (b"GET / HTTP/9.9\r\n\r\n", 200),  # read as 1.1
        (b"GET /\x00 HTTP/1.1\r\nHost: d\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: d\r\nX: " + b"x" * 70_000, 400),
        (b"GET / HTTP/1.1\r\nHost: d\r\n" + b"X: y\r\n" * 20_000, 400),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400),
        (HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}", 400),
        (HEAD + b"Content-Length: " + b"9" * 19 + b"\r\n\r\n", 413),
        (HEAD + b"Content-Length: 100001\r\n\r\n" + b"x", 413),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1000\r\n" + b"\n" * 4096 + b"\r\n" + (b"1000\r\n" + b"\n" * 4096 + b"\r\n") * 30, 413),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
        (HEAD + b"Content-Length: 5000\r\n\r\n" + b"x" * 5_000, 400),
        (HEAD + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n\x1f\x8b", 400),
    ],
    ids=[
        "tls", "newlines", "version", "nul in the path", "huge header", "many headers", "negative", "two lengths",
        "length of 19 digits", "announced too large", "chunked too large", "no chunk", "long line", "gzip",
    ],
)  # fmt: skip
def test_garbage(daemon: Daemon, sent: bytes, status: int) -> None:
    """What is no request, or passes a bound, is refused with its status, or cut off; never with a 500."""
    with daemon.raw() as client:
        try:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = read_all(client)
    assert status_of(answer) in (0, status), answer
    assert b"Traceback" not in answer


@pytest.mark.parametrize(
    "sent", [HEAD + b"Content-Length: 5000\r\n\r\n" + b"x" * 5_000, HEAD + b"Content-Length: 100001\r\n\r\n"]
)
def test_refused_in_words(daemon: Daemon, sent: bytes) -> None:
    """Whoever waits for the answer gets it, and learns the bound."""
    with daemon.raw() as client:
        client.sendall(sent)
        answer = b""
        while b"}" not in answer and (part := client.recv(65_536)):
            answer += part
    assert status_of(answer) in (400, 413)
    assert b"more than" in answer


def test_gone_in_the_middle(daemon: Daemon) -> None:
    """A client that leaves in the middle of its body, or before its answer, is no error of the daemon's."""
    for part in (b"Content-Length: 1000\r\n\r\n{", b'Transfer-Encoding: chunked\r\n\r\n2\r\n{"'):
        with daemon.raw() as client:
            client.sendall(HEAD + part)
    with daemon.raw() as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: d\r\n\r\n")
    assert daemon.get("/livez").status == 200
    assert "request_failed" not in daemon.log


@pytest.mark.parametrize("requests", [1, 2], ids=["one", "two in a row"])
def test_half_closed(daemon: Daemon, requests: int) -> None:
    """Who ends its own side after its requests gets every answer, and the end of the connection after the last one.

    With two, the second one waits in the connection while the first is answered.
    """
    body = turn("half").encode()
    with psycopg.connect(daemon.database) as blocker, daemon.raw() as client:
        blocker.execute("LOCK TABLE conversations IN ACCESS EXCLUSIVE MODE")
        lines = HEAD.replace(b"/v1/calls", b"/v1/calls?wait=committed") + b"Content-Length: %d\r\n\r\n" % len(body)
        before = daemon.metric("tracker_calls_accepted_total")
        client.sendall((lines + body) * requests)
        client.shutdown(socket.SHUT_WR)
        wait_until(lambda: daemon.metric("tracker_calls_accepted_total") > before, "the call")
        blocker.rollback()
        answer = read_all(client)
    FINE.extend([200] * requests)  # turns of the module's count
    assert answer.count(b"HTTP/1.1 200 ") == answer.count(b'{"accepted":1}\n') == requests


def test_a_client_that_never_reads(daemon: Daemon) -> None:
    """Who does not take its answers off the connection is cut off; as many as there may be at once cost nobody else."""
    clients = [daemon.raw() for _ in range(20)]
    poll = select.poll()
    gone: set[int] = set()

    def cut_off() -> bool:
        gone.update(number for number, event in poll.poll(0) if event & (select.POLLHUP | select.POLLERR))
        return len(gone) == len(clients)

    try:
        for client in clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2_048)
            client.setblocking(False)
            poll.register(client, 0)
            with suppress(BlockingIOError):
                while True:
                    client.send(b"GET /status.json HTTP/1.1\r\nHost: d\r\n\r\n" * 100)
        wait_until(cut_off, "the end of every connection")
    finally:
        for client in clients:
            client.close()


def test_a_thousand_connections(database: str) -> None:
    """A thousand connections at once, to a process that was given a low limit on files: each of them is served."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, hard), hard))
    try:
        with serving(database) as daemon:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(4_096, hard), hard))
            asyncio.run(_all_at_once(daemon, 1_000))
            assert daemon.post("", wait=True).status == 200
            assert totals(database).turns == 3_000
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def _all_at_once(daemon: Daemon, number: int) -> None:
    connected = asyncio.Barrier(number)

    async def client() -> int:
        reader, writer = await asyncio.open_unix_connection(daemon.path)
        await connected.wait()
        served = 0
        for _ in range(3):
            writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(TURN) + TURN)
            head = await reader.readuntil(b"\r\n\r\n")
            served += status_of(head) == 202
            await reader.readexactly(len(b'{"accepted":1}\n'))
        writer.close()
        await writer.wait_closed()
        return served

    async with asyncio.timeout(120):
        assert sum(await asyncio.gather(*(client() for _ in range(number)))) == 3 * number


def test_idle_connections_make_room(database: str) -> None:
    """A client that holds all the connections it can, idle, costs nobody a place; what it opens closes its own."""
    with refusing_port() as port:
        pass
    where = ("127.0.0.1", port)
    with serving(database, "--max-connections", "10", "--listen", f"127.0.0.1:{port}") as daemon:
        held = [socket.create_connection(where, PATIENCE, ("127.0.0.2", 0)) for _ in range(15)]
        try:
            for client in held:
                with suppress(BrokenPipeError, ConnectionResetError):
                    client.sendall(b"GET /livez HTTP/1.1\r\nHost: d\r\n\r\n")
            with closing(http.client.HTTPConnection(*where, timeout=PATIENCE)) as other:
                for _ in range(3):
                    other.request("POST", "/v1/calls", TURN)
                    reply = other.getresponse()
                    assert (reply.status, reply.read()) == (202, b'{"accepted":1}\n')
            assert daemon.get("/readyz").status == 200
            daemon.says("connections_full")
        finally:
            for client in held:
                client.close()


def test_a_request_that_waits_to_be_read_is_not_idle(database: str) -> None:
    """What makes room is the connection that is idle for longest: one with a request in the kernel is answered first."""
    with refusing_port() as port:
        pass
    where = ("127.0.0.1", port)
    with serving(database, "--max-connections", "9", "--listen", f"127.0.0.1:{port}") as daemon:

        def connect() -> socket.socket:
            return socket.create_connection(where, PATIENCE, ("127.0.0.2", 0))

        def answered(client: socket.socket) -> int:
            answer = b""
            while not answer.endswith(b"}\n") and (part := client.recv(65_536)):
                answer += part
            return status_of(answer)

        held = [connect() for _ in range(4)]
        for each in (held[3], *held[:3]):
            each.sendall(b"GET /livez HTTP/1.1\r\nHost: d\r\n\r\n")
            assert answered(each) == 200
        # Stopped, the daemon finds the requests of the three and what is new in one turn of its loop.
        daemon.signal(signal.SIGSTOP)
        new = connect()
        for each in held[:3]:
            each.sendall(b"GET /livez HTTP/1.1\r\nHost: d\r\n\r\n")
        daemon.signal(signal.SIGCONT)
        assert [answered(each) for each in held[:3]] == [200] * 3
        new.sendall(b"GET /livez HTTP/1.1\r\nHost: d\r\n\r\n")
        assert answered(new) == 200
        assert held[3].recv(1) == b""  # the one that was used first, though it was opened last
        for each in (*held, new):
            each.close()


def test_too_many_connections(database: str) -> None:
    """Where each connection is busy a further one is answered 503 at once; when one is free again the next is served."""
    with refusing_port() as port:
        pass
    options = ["--max-connections", "5", "--listen", f"127.0.0.1:{port}"]
    with serving(database, *options) as daemon, psycopg.connect(database) as blocker:
        blocker.execute("LOCK TABLE conversations IN ACCESS EXCLUSIVE MODE")

        def connect() -> socket.socket:
            return socket.create_connection(("127.0.0.1", port), PATIENCE, ("127.0.0.2", 0))

        held = [connect() for _ in range(2)]
        for each in held:
            each.sendall(HEAD.replace(b"/v1/calls", b"/v1/calls?wait=committed"))
            each.sendall(b"Content-Length: %d\r\n\r\n" % len(TURN) + TURN)
        wait_until(lambda: daemon.metric("tracker_calls_accepted_total") == 2, "both requests")

        def refused() -> bool:
            with connect() as client:
                return b" 503 " in read_all(client)

        try:
            wait_until(refused, "the refusal")
        finally:
            for each in held:
                each.close()

        blocker.rollback()

        def served() -> bool:
            with connect() as client:
                client.sendall(b"GET /livez HTTP/1.1\r\nHost: d\r\n\r\n")
                return status_of(client.recv(65_536)) == 200

        wait_until(served, "a free place")


def test_flood(database: str) -> None:
    """While one client's requests run into its bound, another one's calls are committed in time, and are all there."""
    with serving(database, "--max-queue-size", "20000") as daemon:
        big = turn("flood", agent_name="a", tokens=1) * 5_000
        stop = threading.Event()
        seen: list[int] = []

        def flood() -> None:
            while not stop.is_set():
                seen.append(daemon.post(big).status)

        greedy = [threading.Thread(target=flood) for _ in range(8)]
        for each in greedy:
            each.start()
        try:
            wait_until(lambda: len(seen) > 20, "the flood")
            headers = {"Tracker-Producer": str(uuid4())}
            for number in range(1, 16):
                reply = daemon.post(TURN, headers={**headers, "Tracker-Sequence": str(number)})
                assert reply.status == 202
        finally:
            stop.set()
            for each in greedy:
                each.join(PATIENCE)
        assert set(seen) <= {202, 429}, set(seen)
        with psycopg.connect(database) as connection:
            assert connection.execute("SELECT turn_count FROM conversations WHERE thread_id = 't'").fetchone() == (15,)


def test_one_producer_many_at_once(database: str) -> None:
    """Many requests of one producer at once hold nobody else up: the other one's goes with the next transaction."""
    greedy = str(uuid4())
    with serving(database, "--relay-interval", "0") as daemon, psycopg.connect(database) as blocker:
        blocker.execute("LOCK TABLE conversations IN ACCESS EXCLUSIVE MODE")
        answered: list[str] = []

        def post(name: str, producer: str, sequence: int) -> None:
            daemon.post(TURN, headers={"Tracker-Producer": producer, "Tracker-Sequence": str(sequence)})
            answered.append(name)

        threads = [threading.Thread(target=post, args=("greedy", greedy, number)) for number in range(1, 40)]
        for each in threads:
            each.start()
        wait_until(lambda: daemon.get("/status.json").json["clients"] == 1, "the greedy one")
        honest = threading.Thread(target=post, args=("honest", str(uuid4()), 1))
        honest.start()
        wait_until(lambda: daemon.get("/status.json").json["clients"] == 2, "the other one")
        blocker.rollback()
        for each in [honest, *threads]:
            each.join(PATIENCE)
        assert answered.index("honest") < 20
