"""Every way a process ends, on a real Postgres: the calls that returned True are the calls in the table.

The programs run in developer mode with warnings as errors, and a window of minutes: what is in the table was written
by the drain at the exit.
"""

from __future__ import annotations

import signal
import socket
import sys
from collections import Counter
from typing import TYPE_CHECKING

import httpx
import pytest
from psycopg.conninfo import make_conninfo

from tests.helpers import command, ledger, query, run_program, running, turns, wait_until, watchdog

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.helpers import Running
    from tracker_daemon.embedded import EmbeddedPostgres

PATIENT = 45.0


@pytest.fixture(autouse=True)
def _deadline() -> Iterator[None]:
    """No test waits for ever."""
    with watchdog(PATIENT):
        yield


def consistent(conninfo: str, producers: int | None = None) -> bool:
    """Say whether the ledger has one first life for each producer, and each applied something."""
    rows = ledger(conninfo)
    return (producers is None or len(rows) == producers) and all(epoch == 1 and seq >= 1 for _, epoch, seq in rows)


# -- one process -----------------------------------------------------------------------------------

ENDS = {
    "end": (0, 1),
    "end_of_one_call": (0, 1),
    "end_after_flush": (0, 1),
    "end_while_flushing": (0, 1),
    "closed": (0, 1),
    "dropped": (0, 1),
    "two_trackers": (0, 3),
    "uncaught": (1, 1),
    "sys_exit": (3, 1),
    "sys_exit_in_thread": (0, 1),
    "thread_outlives_main": (0, 1),
    "daemon_thread_calls_on": (0, 1),
}


@pytest.mark.parametrize(("route", "returncode", "producers"), [(route, *rest) for route, rest in ENDS.items()])
def test_end_of_a_script(database: str, route: str, returncode: int, producers: int) -> None:
    """However a script ends by itself, its calls are in the table, and nothing is said on standard error."""
    outcome = run_program("exit_routes.py", route, database)
    assert outcome.returncode == returncode, outcome.stderr
    assert turns(database) == outcome.accepted > 0
    assert consistent(database, producers)
    # A thread that goes on calling is told, and so is the log.
    said = outcome.stderr.replace("event=calls_rejected reason=closed\n", "").splitlines()
    assert said[-1:] == (["ZeroDivisionError"] if route == "uncaught" else [])
    assert outcome.stderr.count("Traceback") == len(said[-1:])


@pytest.mark.parametrize("route", ["end", "end_of_one_call"])
def test_end_while_the_host_name_is_looked_up(postgres: EmbeddedPostgres, database: str, route: str) -> None:
    """A drain that has yet to connect looks the server's name up, at a time when Python starts no new work."""
    conninfo = make_conninfo(database, host="localhost", port=postgres.port)
    outcome = run_program("exit_routes.py", route, conninfo)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert turns(database) == outcome.accepted > 0


def test_first_call_after_the_main_thread(database: str) -> None:
    """A worker that starts when the main thread has ended drains all the same, where Python lets threads start."""
    if sys.version_info[:2] == (3, 12):
        pytest.skip("Python 3.12 starts no thread once the main thread has ended")
    outcome = run_program("exit_routes.py", "first_call_after_main", database)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert turns(database) == outcome.accepted == 500


@pytest.mark.parametrize(("route", "returncode"), [("interrupted", -signal.SIGINT), ("interrupted_and_handled", -2)])
def test_interrupt(database: str, route: str, returncode: int) -> None:
    """Ctrl-C ends a script with KeyboardInterrupt; its calls are in the table."""
    with running(command("exit_routes.py", route, database)) as program:
        program.wait_for(ready=True)
        program.process.send_signal(signal.SIGINT)
        outcome = program.end()
    assert outcome.returncode == returncode
    assert outcome.stderr.endswith("KeyboardInterrupt\n")
    assert turns(database) == outcome.accepted == 1_000


def test_end_without_a_database(database: str) -> None:
    """With the server unreachable a script ends by its deadline, and says what was lost."""
    outcome = run_program("exit_routes.py", "end_in_vain", make_conninfo(database, host="/nowhere"))
    assert outcome.returncode == 0
    assert "calls_lost_at_shutdown calls=1" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert turns(database) == 0


# -- children --------------------------------------------------------------------------------------

CHILDREN = {
    "forked": 2,
    "forked_and_sys_exit": 2,
    "forked_and_closed": 2,
    "mp_fork": 3,
    "mp_spawn": 3,
    "mp_forkserver": 3,
    "mp_child_fails": 1,
    "mp_pool": None,
    "executor": None,
}


@pytest.mark.parametrize(("route", "producers"), CHILDREN.items())
def test_end_of_children(database: str, route: str, producers: int | None) -> None:
    """A child's calls are in the table once, as are its parent's; each process is a producer of its own."""
    outcome = run_program("exit_routes.py", route, database)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert turns(database) == outcome.accepted > 0
    assert consistent(database, producers)
    assert len({line["pid"] for line in outcome.said if line.get("accepted")}) == len(ledger(database))


# -- what no process can do anything about ---------------------------------------------------------


def test_os_exit(database: str) -> None:
    """`os._exit` loses what was not flushed, and nothing else."""
    outcome = run_program("exit_routes.py", "os_exit", database)
    assert outcome.returncode == 0
    assert (turns(database), outcome.by("main")["pending"]) == (outcome.by("main")["flushed"], 50) == (160, 50)
    assert [row[1:] for row in ledger(database)] == [(1, 2)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed(database: str, number: signal.Signals) -> None:
    """SIGTERM without a handler and kill -9 lose what was not flushed, and nothing else."""
    with running(command("exit_routes.py", "killed", database)) as program:
        program.wait_for(ready=True)
        program.process.send_signal(number)
        outcome = program.end()
    assert outcome.returncode == -number
    assert turns(database) == outcome.by("main")["flushed"] == 160
    assert [row[1:] for row in ledger(database)] == [(1, 2)]


# -- servers ---------------------------------------------------------------------------------------


def free_port() -> int:
    """Return a TCP port of the loopback that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Site:
    """A web server under test.

    Args:
        program: its process.
        port: where it listens.
    """

    def __init__(self, program: Running, port: int) -> None:
        self.program, self.url = program, f"http://127.0.0.1:{port}"
        self.accepted: Counter[str] = Counter()

    def post(self, client: httpx.Client) -> None:
        """Make one call, and count it for the process that took it."""
        answer = client.post(f"{self.url}/t-{self.accepted.total() % 5}")
        assert answer.status_code == 204
        self.accepted[answer.headers["process"]] += 1

    def wait(self) -> None:
        """Return when the server answers."""

        def answers() -> bool:
            assert self.program.process.poll() is None, "".join(self.program.errors)
            try:
                with httpx.Client() as client:
                    self.post(client)
            except httpx.TransportError:
                return False
            return True

        wait_until(answers, "the server's first answer")

    def use(self, requests: int, processes: int = 1) -> None:
        """Make calls until there were *requests*, and every process took some."""

        def enough() -> bool:
            with httpx.Client() as client:  # a new connection may get to another process
                for _ in range(5):
                    self.post(client)
            return self.accepted.total() >= requests and len(self.accepted) >= processes

        wait_until(enough, f"a request to each of {processes} processes")


def serve(database: str, arguments: list[str], processes: int, **environment: str) -> tuple[int, int, str]:
    """Run a server, use it, end it by SIGTERM; return the calls accepted, its status and what it said."""
    port = free_port()
    words = [word.replace("PORT", str(port)) for word in arguments]
    strict = [sys.executable, "-X", "dev", "-m"]
    with running([*strict, *words], {"CONNINFO": database, **environment}) as program:
        site = Site(program, port)
        site.wait()
        site.use(100, processes)
        assert turns(database) == 0
        program.process.send_signal(signal.SIGTERM)
        outcome = program.end()
    return site.accepted.total(), outcome.returncode, outcome.stderr


UVICORN = ["uvicorn", "web_app:asgi", "--host", "127.0.0.1", "--port", "PORT", "--log-level", "warning"]
GUNICORN = ["gunicorn", "web_app:wsgi", "--bind", "127.0.0.1:PORT", "--log-level", "warning", "--no-control-socket"]


def test_uvicorn(database: str) -> None:
    """Under uvicorn SIGTERM never gets to atexit: the lifespan drains."""
    accepted, returncode, said = serve(database, UVICORN, 1)
    assert turns(database) == accepted >= 100
    assert (returncode, said) == (-signal.SIGTERM, "")
    assert consistent(database, 1)


def test_uvicorn_workers(database: str) -> None:
    """Each of uvicorn's workers has its own tracker, and drains it."""
    accepted, _, _ = serve(database, [*UVICORN, "--workers", "2"], 2)
    assert turns(database) == accepted >= 100
    assert consistent(database, 2)


@pytest.mark.parametrize(
    "options",
    [["--workers", "2"], ["--workers", "2", "--preload"], ["--worker-class", "gthread", "--threads", "4", "--preload"]],
    ids=["sync", "sync, preloaded", "gthread, preloaded"],
)
def test_gunicorn(database: str, options: list[str]) -> None:
    """Under gunicorn each worker process drains at its end, also when the tracker was made before the fork."""
    processes = 2 if "--workers" in options else 1
    accepted, returncode, said = serve(database, [*GUNICORN, *options], processes)
    assert turns(database) == accepted >= 100
    assert returncode == 0
    assert "Traceback" not in said
    assert consistent(database, processes)


def test_gunicorn_preloaded_and_used(database: str) -> None:
    """A tracker that was at work in gunicorn's first process starts empty in its workers."""
    options = ["--workers", "2", "--preload"]
    accepted, returncode, said = serve(database, [*GUNICORN, *options], 2, CALL_AT_IMPORT="1")
    assert turns(database) == accepted >= 100
    assert returncode == 0
    assert "Traceback" not in said
    assert query(database, "SELECT count(*) FROM conversations WHERE thread_id = 'import'") == [(1,)]
    assert consistent(database, 3)


def test_gunicorn_with_uvicorn_workers(database: str) -> None:
    """In gunicorn's asynchronous workers the lifespan drains."""
    pytest.importorskip("uvicorn_worker", reason="the package uvicorn-worker is not installed")
    words = [word.replace("wsgi", "asgi") for word in GUNICORN]
    accepted, _, _ = serve(database, [*words, "--worker-class", "uvicorn_worker.UvicornWorker"], 1)
    assert turns(database) == accepted >= 100
    assert consistent(database, 1)
