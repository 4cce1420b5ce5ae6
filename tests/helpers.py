"""What several test files share: waiting with a deadline, programs in processes of their own, looking at the tables."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import psycopg
from prometheus_client import CollectorRegistry
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tracker_daemon import MemorySink, Tracker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tracker_daemon import TrackerStats
    from tracker_daemon.batch import Batch
    from tracker_daemon.sink import Applied

PROGRAMS = Path(__file__).parent / "programs"
PATIENCE = 60.0
"""Seconds after which a test that waits has failed; never how long one takes."""


def wait_until(condition: Callable[[], object], what: str = "the condition", seconds: float = PATIENCE) -> None:
    """Return once *condition* holds; fail after *seconds*."""
    deadline, tick = monotonic() + seconds, threading.Event()
    while not condition():
        assert monotonic() < deadline, f"{what} did not come about in {seconds:g} s"
        tick.wait(0.005)


@contextmanager
def watchdog(seconds: float = 60.0) -> Iterator[None]:
    """Fail the test, wherever its main thread waits, when it takes longer than *seconds*."""

    def bark(*_: object) -> None:
        raise AssertionError(f"the test was still waiting after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, bark)
    outer, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, outer)


# -- sinks -----------------------------------------------------------------------------------------


class GatedSink(MemorySink):
    """A sink whose `apply` waits at a gate; closed to begin with. `arrived` is set when a batch waits there."""

    def __init__(self) -> None:
        super().__init__()
        self.arrived, self._open = threading.Event(), threading.Event()

    def let_through(self) -> None:
        """Open the gate for good."""
        self._open.set()

    async def apply(self, batch: Batch) -> Applied:
        """See `Sink.apply`; lets the worker's loop run while it waits."""
        import anyio

        self.arrived.set()
        while not self._open.is_set():  # noqa: ASYNC110 - opened from another thread
            await anyio.sleep(0.002)
        return await super().apply(batch)

    @property
    def turns(self) -> int:
        """Turns over all rows."""
        return sum(row.turn_count for row in self.rows.values())


class Trackers:
    """Makes trackers on a registry of their own; closes what a test leaves open."""

    def __init__(self) -> None:
        self._made: list[Tracker] = []

    def __call__(self, sink: Any, **settings: Any) -> Tracker:
        """Make one."""
        tracker = Tracker(sink, **{"registry": CollectorRegistry(), **settings})
        self._made.append(tracker)
        return tracker

    def close(self) -> None:
        """Close all, without waiting for what is pending."""
        for tracker in self._made:
            tracker.close(0)


def balanced(stats: TrackerStats) -> bool:
    """Say whether the identity of the books holds."""
    return stats.accepted == stats.applied + stats.dead_lettered + stats.lost + stats.pending


def many_turns(tracker: Tracker, number: int, threads: int = 7) -> int:
    """Make *number* calls over a few threads; return how many were accepted."""
    return sum(tracker.record_turn(f"t{i % threads}", "billing", 1, 0.5) for i in range(number))


# -- a listener that never answers -----------------------------------------------------------------


@contextmanager
def deaf_listener() -> Iterator[int]:
    """A TCP port on the loopback that takes connections and stays silent."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as listener:
        yield listener.getsockname()[1]


@contextmanager
def refusing_port() -> Iterator[int]:
    """A TCP port on the loopback that nobody listens on, held so that nobody else takes it."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def listens(path: Path) -> bool:
    """Whether somebody listens on a Unix socket; its file is there a moment before."""
    with socket.socket(socket.AF_UNIX) as asking:
        return asking.connect_ex(str(path)) == 0


# -- the tables ------------------------------------------------------------------------------------


def query(conninfo: str, statement: str) -> list[tuple[Any, ...]]:
    """Return the rows of one statement."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        return connection.execute(statement).fetchall()  # type: ignore[call-overload,no-any-return]


@dataclass(frozen=True)
class Totals:
    """Sums over the whole table."""

    turns: int
    tokens: int
    cost: float


def totals(conninfo: str) -> Totals:
    """Return the sums over all conversations."""
    [row] = query(
        conninfo,
        "SELECT coalesce(sum(turn_count), 0)::bigint, coalesce(sum(total_tokens), 0)::bigint,"
        " coalesce(sum(total_cost_usd), 0)::float8 FROM conversations",
    )
    return Totals(*row)


def turns(conninfo: str) -> int:
    """Return the turns over all conversations."""
    return totals(conninfo).turns


def ledger(conninfo: str) -> list[tuple[str, int, int]]:
    """Return producer, epoch and applied sequence of every ledger row, oldest first."""
    statement = "SELECT producer::text, epoch, applied_sequence FROM tracker_ledger ORDER BY opened_at"
    return query(conninfo, statement)


@contextmanager
def away(conninfo: str) -> Iterator[None]:
    """Have the server let nobody into the database, for as long as the block."""
    name = str(conninfo_to_dict(conninfo)["dbname"])
    allow = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")
    with psycopg.connect(make_conninfo(conninfo, dbname="postgres"), autocommit=True) as connection:
        connection.execute(allow.format(sql.Identifier(name), False))
        try:
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
            yield
        finally:
            connection.execute(allow.format(sql.Identifier(name), True))


@contextmanager
def a_role(conninfo: str) -> Iterator[tuple[psycopg.Connection[Any], str]]:
    """A role that may do nothing but log in, and a connection that may everything."""
    with psycopg.connect(conninfo, autocommit=True) as admin:
        name = f"reader_{os.getpid()}"
        admin.execute(f"CREATE ROLE {name} LOGIN")  # type: ignore[call-overload]
        try:
            yield admin, name
        finally:
            admin.execute(f"DROP OWNED BY {name}")  # type: ignore[call-overload]
            admin.execute(f"DROP ROLE {name}")  # type: ignore[call-overload]


def grant_as_the_readme(admin: psycopg.Connection[Any], role: str) -> None:
    """Give *role* the rights that the README lists, and no more."""
    page = (PROGRAMS.parent.parent / "README.md").read_text(encoding="utf-8")
    grants = re.findall(r"^(GRANT .*?) TO chat;", page, re.MULTILINE)
    assert len(grants) > 3
    for grant in grants:
        admin.execute(f"{grant} TO {role}")


# -- programs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    returncode: int
    stderr: str
    said: list[dict[str, Any]]
    """The JSON lines on its standard output, its children's among them."""

    @property
    def accepted(self) -> int:
        """Calls that returned True, over all processes."""
        return sum(line.get("accepted", 0) for line in self.said)

    def by(self, who: str) -> dict[str, Any]:
        """Return the one line that *who* said."""
        [line] = [line for line in self.said if line.get("who") == who]
        return line


def command(program: str, *arguments: str) -> list[str]:
    """Return the command that runs *program* strictly: developer mode, warnings are errors."""
    # A fork beside running threads is what several of them test; newer versions of Python warn of it.
    strict = ["-X", "dev", "-W", "error", "-W", "ignore:This process:DeprecationWarning"]
    return [sys.executable, *strict, str(PROGRAMS / program), *arguments]


class Running:
    """A program at work; `Running.said` grows as it speaks.

    Args:
        arguments: the command.
        environment: added to this process's own.
    """

    def __init__(self, arguments: list[str], environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
            cwd=PROGRAMS,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=(self.process.stdout, self.lines)),
            threading.Thread(target=self._read, args=(self.process.stderr, self.errors)),
        ]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(stream: Any, lines: list[str]) -> None:
        with stream:
            for line in stream:
                lines.append(line)  # noqa: PERF402 - each is looked at as soon as it is there

    @property
    def said(self) -> list[dict[str, Any]]:
        """The JSON lines until now."""
        return [json.loads(line) for line in list(self.lines) if line.startswith("{")]

    def wait_for(self, **expected: object) -> dict[str, Any]:
        """Return the first line that has the *expected* fields, as soon as it is there."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            found.extend(line for line in self.said if expected.items() <= line.items())
            assert found or self.process.poll() is None, "".join(self.errors)
            return bool(found)

        wait_until(look, f"a line with {expected}")
        return found[0]

    def end(self, seconds: float = PATIENCE) -> Outcome:
        """Wait until the program and whoever inherited its output have ended."""
        self.process.wait(seconds)
        for reader in self._readers:
            reader.join(seconds)
            assert not reader.is_alive(), "a child of the program still holds its output"
        # In developer mode the event loop remarks on a slow machine.
        errors = [line for line in self.errors if not (line.startswith("Executing <") and " took " in line)]
        return Outcome(self.process.returncode, "".join(errors), self.said)

    def kill(self) -> None:
        """End the program and its children at once, whatever they do."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for reader in self._readers:
            reader.join()


@contextmanager
def running(arguments: list[str], environment: dict[str, str] | None = None) -> Iterator[Running]:
    """Run a program for as long as the block; it never outlives it."""
    program = Running(arguments, environment)
    try:
        yield program
    finally:
        program.kill()


def run_program(program: str, *arguments: str) -> Outcome:
    """Run a program to its end."""
    with running(command(program, *arguments)) as started:
        return started.end()
