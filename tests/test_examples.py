"""Every example runs as it stands, and the table shows exactly what its clients were told.

The examples are copied into an empty folder first: nothing but the installed package is at hand.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import ExitStack, closing, contextmanager
from decimal import Decimal
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import anyio
import httpx
import pytest

from tests.digits import CALLS_PER_THREAD, Digits
from tests.helpers import ledger, query, running, wait_until, watchdog
from tests.test_exits import free_port
from tests.test_readme import code
from tracker_daemon.embedded import EmbeddedPostgres

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.helpers import Outcome, Running

EXAMPLES = Path(__file__).parent.parent / "examples"
TOKEN = "a token of more than sixteen characters"  # noqa: S105 - of this test's daemon


@pytest.fixture(autouse=True)
def _deadline() -> Iterator[None]:
    """No test waits for ever."""
    with watchdog(90):
        yield


@pytest.fixture
def folder(server_folder: Path) -> Iterator[Path]:
    """An empty folder, with a short path for sockets, that a server's user can reach."""
    found = server_folder / uuid4().hex[:8]
    found.mkdir()
    yield found
    shutil.rmtree(found)


def copied(folder: Path, example: str) -> Path:
    """Copy an example, as its user would; return the copy."""
    source = EXAMPLES / example
    return Path((shutil.copytree if source.is_dir() else shutil.copy)(source, folder / source.name))


def turns_by_thread(database: str) -> dict[str, tuple[Any, ...]]:
    """Return turns, tokens, cost, agents and resolution of each thread."""
    rows = query(
        database,
        "SELECT thread_id, turn_count, total_tokens, total_cost_usd, agents_used, resolution_type FROM conversations",
    )
    return {row[0]: row[1:] for row in rows}


# -- a daemon --------------------------------------------------------------------------------------


class Daemon:
    """`tracker-daemon serve` on a socket and a port; it may be killed and started again.

    Args:
        database: its conninfo.
        folder: for socket, token and journal.
        token: whether requests need one.
    """

    def __init__(self, database: str, folder: Path, *, token: bool) -> None:
        self.socket, self.port, self.token_file = folder / "d.sock", free_port(), folder / "token"
        self.url = f"http://127.0.0.1:{self.port}"
        serve = [sys.executable, "-m", "tracker_daemon", "serve", "--database", database]
        self._command = [*serve, "--listen", f"unix:{self.socket}", "--listen", f"127.0.0.1:{self.port}"]
        self._command += ["--journal", str(folder / "daemon-journal")]
        if token:
            self.token_file.write_text(f"{TOKEN}\n")
            self._command += ["--token-file", str(self.token_file)]
        self._stack = ExitStack()
        self.program: Running

    def start(self) -> None:
        """Start it; return when it is ready."""
        self.program = self._stack.enter_context(running(self._command))

        def ready() -> bool:
            assert self.program.process.poll() is None, "".join(self.program.errors)
            try:
                return httpx.get(f"{self.url}/readyz").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(ready, "the daemon")

    def kill(self) -> None:
        """End it at once."""
        self.program.kill()

    def stop(self) -> Outcome:
        """End it as a service manager does."""
        self.program.process.send_signal(signal.SIGTERM)
        return self.program.end()

    def close(self) -> None:
        """Leave nothing running."""
        self._stack.close()


@contextmanager
def a_daemon(database: str, folder: Path, *, token: bool = False) -> Iterator[Daemon]:
    """Run a daemon for as long as the block."""
    daemon = Daemon(database, folder, token=token)
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.close()


# -- quickstart ------------------------------------------------------------------------------------


def test_quickstart(database: str, folder: Path) -> None:
    """The README's first example as a program: on a database of the user's, its conversation is in the table."""
    script = copied(folder, "quickstart.py")
    body = [line for line in code(0).splitlines() if line.startswith("        ")]
    assert len(body) == 5
    assert all(line in script.read_text(encoding="utf-8").splitlines() for line in body)
    run = subprocess.run([sys.executable, script, database], capture_output=True, text=True, timeout=60, check=True)
    assert (run.stdout.count("TrackerStats(accepted=3, applied=3"), run.stderr) == (1, "")
    assert turns_by_thread(database) == {"t-1": (1, 812, Decimal("0.0041"), ["billing"], "resolved_by_agent")}


def test_quickstart_without_a_server(folder: Path) -> None:
    """Without an argument it brings a database of its own, and keeps it."""
    script = copied(folder, "quickstart.py")
    subprocess.run([sys.executable, script], cwd=folder, timeout=60, check=True, stdout=subprocess.DEVNULL)
    with EmbeddedPostgres(folder / "chat-database") as server:
        assert turns_by_thread(server.conninfo)["t-1"][:2] == (1, 812)


# -- FastAPI ---------------------------------------------------------------------------------------


class Talk:
    """What one client was told over its websocket."""

    def __init__(self, thread_id: str) -> None:
        self.thread_id = thread_id
        self.answers: list[dict[str, Any]] = []

    async def say(self, socket: Any, *texts: str) -> None:
        """Say each, and wait for its answer."""
        for text in texts:
            await socket.send(text)
            self.answers.append(json.loads(await socket.recv()))

    def row(self, resolution: str) -> tuple[Any, ...]:
        """Return the row that this must have left."""
        cost = sum((Decimal(answer["cost"]) for answer in self.answers), Decimal())
        agents = list(dict.fromkeys(answer["agent"] for answer in self.answers))
        return len(self.answers), sum(answer["tokens"] for answer in self.answers), cost, agents, resolution


async def _clients(url: str, server: Running, talks: dict[str, Talk]) -> None:
    """Talk at once: some leave politely, some are cut off, some are there when the server is told to end."""
    from websockets.asyncio.client import connect
    from websockets.exceptions import ConnectionClosed

    stay, stayed = anyio.Event(), []

    async def client(number: int) -> None:
        talk = talks[f"t-{number}"] = Talk(f"t-{number}")
        async with connect(f"{url}/chat/{talk.thread_id}") as socket:
            await talk.say(socket, *(("an invoice", "hello") * (number + 1))[number % 2 :])
            if number % 3 == 1:
                socket.transport.abort()
            elif number % 3 == 2:
                stayed.append(number)
                if len(stayed) == 4:
                    stay.set()
                with pytest.raises(ConnectionClosed):
                    await socket.recv()

    async with anyio.create_task_group() as tasks:
        for number in range(12):
            tasks.start_soon(client, number)
        await stay.wait()
        # The others have left: their server side has seen it when it counts no call of theirs as missing.
        gone = sum(number % 3 != 2 for number in range(12))
        async with httpx.AsyncClient() as scraper:
            while True:
                text = (await scraper.get(f"{url.replace('ws', 'http')}/metrics")).text
                if f'tracker_calls_accepted_total{{call="resolve"}} {gone}.0' in text:
                    break
                assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)


def test_fastapi_websocket(database: str, folder: Path) -> None:
    """Every turn a client saw answered, and every end of a conversation, is in the table after SIGTERM."""
    app = copied(folder, "fastapi_websocket")
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "app:app", "--app-dir", str(app), "--port", str(port)]
    talks: dict[str, Talk] = {}
    with running(command, {"CHAT_TRACKER": database}) as server:
        wait_until(lambda: "running on" in "".join(server.errors) or server.process.poll() is not None, "uvicorn")
        assert httpx.get(f"http://127.0.0.1:{port}/threads/t-0/pending").json() == {"turns": 0, "tokens": 0}
        assert _handshake(port, "x" * 513) == 403
        anyio.run(_clients, f"ws://127.0.0.1:{port}", server, talks)
        outcome = server.end()
    assert "Traceback" not in outcome.stderr
    left = ("resolved_by_agent", "abandoned", "abandoned")
    assert turns_by_thread(database) == {
        f"t-{number}": talks[f"t-{number}"].row(left[number % 3]) for number in range(12)
    }
    assert len(ledger(database)) == 1


def _handshake(port: int, thread_id: str) -> int:
    """Return the status that a websocket's opening gets."""
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    with pytest.raises(InvalidStatus) as refused:
        connect(f"ws://127.0.0.1:{port}/chat/{thread_id}")
    return refused.value.response.status_code


# -- Django ----------------------------------------------------------------------------------------


class Site:
    """The Django application under gunicorn, and the sums of what it answered."""

    def __init__(self, server: Running, port: int) -> None:
        self.server, self._client = server, httpx.Client(base_url=f"http://127.0.0.1:{port}")
        self.digits, self.workers = Digits(), Counter[int]()
        self._number = 0

    def post(self, path: str, body: dict[str, object]) -> httpx.Response:
        """Send one request; a synchronous worker closes its connection, so the next one may get to the other."""
        return self._client.post(f"/threads/{path}", json=body)

    def send(self, path: str, body: str) -> httpx.Response:
        """Send a body as it is."""
        return self._client.post(f"/threads/{path}", content=body)

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()

    def wait(self) -> None:
        """Return when it answers."""

        def answers() -> bool:
            assert self.server.process.poll() is None, "".join(self.server.errors)
            try:
                return self._client.get("/").status_code == 404
            except httpx.TransportError:
                return False

        wait_until(answers, "gunicorn")

    def turn(self) -> None:
        """Make one turn, and note which worker took it."""
        thread_id = f"t-{self._number % 11}-{self._number // (11 * CALLS_PER_THREAD)}"
        self._number += 1
        body = {"agent_name": "billing", "tokens": self.digits.tokens(thread_id), "cost": 0.1}
        answer = self.post(f"{thread_id}/turns", body)
        assert answer.json()["accepted"] is True, answer.text
        self.workers[answer.json()["process"]] += 1

    def use(self, workers: int) -> None:
        """Make turns until so many workers have taken some."""

        def enough() -> bool:
            self.turn()
            return self._number > 50 and len(self.workers) >= workers

        wait_until(enough, f"a request to {workers} workers")


@contextmanager
def gunicorn(folder: Path, **environment: str) -> Iterator[Site]:
    """Run the Django example under gunicorn with two workers."""
    app = copied(folder, "django_gunicorn")
    port = free_port()
    words = ["--preload", "--workers", "2", "--chdir", str(app), "--bind", f"127.0.0.1:{port}", "--no-control-socket"]
    with running([sys.executable, "-m", "gunicorn", *words, "chat:application"], environment) as server:
        site = Site(server, port)
        with closing(site):
            site.wait()
            yield site


@contextmanager
def where(kind: str, database: str, folder: Path) -> Iterator[str]:
    """What CHAT_TRACKER says: the database, or a daemon on it."""
    if kind == "database":
        yield database
    else:
        with a_daemon(database, folder) as daemon:
            yield f"unix:{daemon.socket}"
            assert daemon.stop().returncode == 0


def gone(process: int) -> bool:
    """Say whether a process has ended, and its parent knows."""
    return not Path(f"/proc/{process}").exists()


def check(site: Site, database: str) -> None:
    """Each call counts once, and costs add as decimals."""
    rows = turns_by_thread(database)
    verdict = site.digits.read({thread: row[1] for thread, row in rows.items()})
    assert verdict.exact, verdict
    calls = site.digits.made
    assert {thread: row[:1] + row[2:4] for thread, row in rows.items()} == {
        thread: (number, number * Decimal("0.1"), ["billing"]) for thread, number in calls.items()
    }


@pytest.mark.parametrize("kind", ["database", "daemon"])
def test_django_gunicorn(database: str, folder: Path, kind: str) -> None:
    """Two preforked workers, told to end: every turn that was answered is in the table."""
    with where(kind, database, folder) as tracker, gunicorn(folder, CHAT_TRACKER=tracker) as site:
        site.use(workers=2)
        assert site.post("t-0-0/turns", {"tokens": "many"}).status_code == 400
        assert site.post("t-0-0/turns", {}).json()["accepted"]  # a turn without tokens
        site.digits.made["t-0-0"] += 0
        assert site.post("t-1-0/resolution", {"resolution_type": "resolved_by_agent"}).json()["accepted"]
        # What is wrong with the request, in its own words; nothing of the program's.
        answers = {
            '{"tokens": "many"}': "tokens must be an integer, got 'many'",
            "[1]": "the body must be an object",
            "no": "the body must be JSON",
        }
        for body, error in answers.items():
            answer = site.send("t-0-0/turns", body)
            assert (answer.status_code, answer.json()) == (400, {"error": error})
        answer = site.post("t-1-0/resolution", {})
        assert answer.status_code == 400
        assert answer.json() == {"error": "the body must be an object with resolution_type"}
        site.server.process.send_signal(signal.SIGTERM)
        outcome = site.server.end()
    assert outcome.returncode == 0
    assert "Traceback" not in outcome.stderr
    rows = turns_by_thread(database)
    assert rows["t-1-0"][-1] == "resolved_by_agent"
    verdict = site.digits.read({thread: row[1] for thread, row in rows.items()})
    assert verdict.exact, verdict
    assert sum(row[0] for row in rows.values()) == sum(site.digits.made.values()) + 1
    assert sum(row[2] for row in rows.values()) == sum(site.digits.made.values()) * Decimal("0.1")
    assert len([row for row in ledger(database) if row[2]]) == len(site.workers)


@pytest.mark.parametrize("kind", ["database", "daemon"])
def test_django_worker_killed(database: str, folder: Path, kind: str) -> None:
    """A worker killed with calls of the last moment in its journal: the one that takes its place applies them."""
    journal = folder / "journal"
    with (
        where(kind, database, folder) as tracker,
        gunicorn(folder, CHAT_TRACKER=tracker, CHAT_JOURNAL=str(journal)) as site,
    ):
        for killed in range(3):
            site.use(workers=2 + killed)
            site.turn()
            last = next(reversed(site.workers))
            for _ in range(20):
                site.turn()
            os.kill(last, signal.SIGKILL)
            # gunicorn waits for it before it starts another.
            wait_until(partial(gone, last), "the worker's end")
        site.use(workers=5)
        site.server.process.send_signal(signal.SIGTERM)
        outcome = site.server.end()
    assert outcome.returncode == 0
    assert "calls_lost" not in outcome.stderr
    check(site, database)


# -- Node ------------------------------------------------------------------------------------------


def node() -> str:
    """Return Node's path; skip where there is none with fetch."""
    path = shutil.which("node") or shutil.which("nodejs")
    if path is None:
        pytest.skip("Node is not installed: apt-get install -y --no-install-recommends nodejs")
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
    if int(said.lstrip("v").split(".")[0]) < 18:
        pytest.skip(f"Node {said.strip()} has no fetch: 18 or newer is needed")
    return path


@contextmanager
def node_client(folder: Path, url: str, token_file: Path) -> Iterator[tuple[Running, Path]]:
    """Run the Node example on what is written to a pipe; yield both."""
    program = copied(folder, "node_fetch") / "client.mjs"
    pipe = folder / "calls"
    os.mkfifo(pipe)
    command = ["sh", "-c", 'exec "$0" "$1" "$2" "$3" < "$4"', node(), program, url, token_file, pipe]
    with running([str(word) for word in command]) as client:
        yield client, pipe


@pytest.mark.parametrize("arguments", [(), ("localhost:8080",), ("http://127.0.0.1:8080", "token", "more")])
def test_node_usage(folder: Path, arguments: tuple[str, ...]) -> None:
    """Without the daemon's address the program says how it is called, and ends with 2."""
    program = copied(folder, "node_fetch") / "client.mjs"
    command = [node(), str(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "usage: node client.mjs http://HOST:PORT [TOKEN_FILE] < calls.ndjson\n"


class Lines:
    """Calls as the Node client reads them."""

    def __init__(self, threads: int) -> None:
        self.digits, self._threads, self._number = Digits(), threads, 0

    def make(self, number: int) -> str:
        """Return so many."""
        return "".join(self._one() for _ in range(number))

    def _one(self) -> str:
        thread_id = f"t-{self._number % self._threads}"
        self._number += 1
        tokens = self.digits.tokens(thread_id)
        # No integer above 2**53 - 1 gets through JSON.parse unhurt.
        assert tokens < 2**53
        fields = {"thread_id": thread_id, "agent_name": "node", "tokens": tokens, "cost": "0.1"}
        return json.dumps({"call": "record_turn", **fields}) + "\n"

    def check(self, database: str) -> None:
        """Each call counts once."""
        rows = turns_by_thread(database)
        verdict = self.digits.read({thread: row[1] for thread, row in rows.items()})
        assert verdict.exact, verdict
        assert sum(row[2] for row in rows.values()) == self._number * Decimal("0.1")


def test_node_while_the_daemon_is_killed(database: str, folder: Path) -> None:
    """The daemon killed at work and started again, three times, and a token replaced: each call counts once."""
    lines = Lines(200)
    with (
        a_daemon(database, folder, token=True) as daemon,
        node_client(folder, daemon.url, daemon.token_file) as (client, pipe),
        pipe.open("w") as calls,
    ):
        sent = 0
        for _ in range(3):
            calls.write(lines.make(500))
            calls.flush()
            sent += 100
            wait_until(lambda: len(client.said) * 100 > sent, "progress")  # noqa: B023 - called here
            daemon.kill()
            tries = len(client.errors)
            calls.write(lines.make(500))
            calls.flush()
            wait_until(lambda: len(client.errors) > tries, "a try that fails")  # noqa: B023 - called here
            sent = len(client.said) * 100
            daemon.token_file.write_text(f"another token, {sent} calls later\n")
            daemon.start()
        calls.write(lines.make(1_000))
        calls.close()
        outcome = client.end()
        assert outcome.returncode == 0, outcome.stderr
        assert sum(line["sent"] for line in outcome.said) == 4_000
        assert daemon.stop().returncode == 0
    lines.check(database)


class _Front(BaseHTTPRequestHandler):
    """Hands requests to a daemon; some answers are lost, some requests refused."""

    daemon: httpx.Client
    seen: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        """Serve one."""
        body = self.rfile.read(int(self.headers["content-length"]))
        self.seen.append((self.headers["tracker-sequence"], body))
        number = len(self.seen)
        if number % 5 in (3, 4):
            self._answer(429 if number % 5 == 3 else 503, b'{"error": "later"}', {"Retry-After": "0.01"})
            return
        names = ("authorization", "tracker-producer", "tracker-sequence")
        headers = {name: self.headers[name] for name in names}
        answer = self.daemon.post(self.path, content=body, headers=headers)
        if number % 5 == 1:
            self.close_connection = True  # applied, and nobody is told
        else:
            self._answer(answer.status_code, answer.content, {})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_node_when_answers_are_lost(database: str, folder: Path) -> None:
    """Answers lost after the commit, 429 and 503: the same lines come under the same sequence, and count once."""
    lines, seen = Lines(100), list[tuple[str, bytes]]()
    with (
        a_daemon(database, folder, token=True) as daemon,
        httpx.Client(base_url=daemon.url) as behind,
        ThreadingHTTPServer(("127.0.0.1", 0), type("Front", (_Front,), {"daemon": behind, "seen": seen})) as server,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with node_client(folder, url, daemon.token_file) as (client, pipe):
            pipe.write_text(lines.make(1_000) + '{"call": "record_turn", "thread_id": ""}\n' + lines.make(500))
            outcome = client.end()
        server.shutdown()
        assert httpx.get(f"{daemon.url}/metrics").text.count('tracker_flushes_total{outcome="duplicate"} 0.0') == 0
        assert daemon.stop().returncode == 0
    # Whatever was tried again after no answer came as it was before.
    assert all(again == seen[number] for number, again in enumerate(seen[1:]) if number % 5 in (0, 2, 3)), "changed"
    # The one call that nobody can take is told, and nothing else is missing for it.
    assert outcome.returncode == 1
    [refused] = [line for line in outcome.stderr.splitlines() if line.startswith("refused")]
    assert refused.startswith("refused: thread_id must")
    assert refused.endswith('"call":"record_turn","thread_id":""}')
    assert sum(line["sent"] for line in outcome.said) == 1_500
    assert {word for line in outcome.stderr.splitlines() for word in ("429", "503") if word in line} == {"429", "503"}
    lines.check(database)


# -- curl ------------------------------------------------------------------------------------------


def test_curl(database: str, folder: Path) -> None:
    """Over the socket and over TCP with a token: each call counts once, the repeated one too."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed: apt-get install -y --no-install-recommends curl")
    script = copied(folder, "curl.sh")
    with a_daemon(database, folder, token=True) as daemon:
        where = {"SOCKET": str(daemon.socket), "URL": daemon.url, "TOKEN_FILE": str(daemon.token_file)}
        with running(["sh", str(script)], where) as program:
            outcome = program.end()
        assert outcome.returncode == 0, outcome.stderr
        assert daemon.stop().returncode == 0
    assert outcome.said == [
        {"status": "ready"},
        {"accepted": 2},
        {"accepted": 1},
        {"accepted": 1, "duplicate": False, "dead_lettered": 0},
        {"accepted": 1, "duplicate": False, "dead_lettered": 0},
        {"accepted": 1, "duplicate": True, "dead_lettered": 0},
        {"accepted": 1},
    ]
    assert turns_by_thread(database) == {
        "t-1": (4, 852, Decimal("0.004150"), ["billing", "refunds"], "resolved_by_agent")
    }
