"""SIGTERM and SIGINT in every state of the flush, once and twice: the end comes in time, and its report adds up."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from tests.faults.servers import stopped
from tests.helpers import Outcome, Running, command, query, refusing_port, running, turns, wait_until, watchdog

if TYPE_CHECKING:
    from collections.abc import Iterator
    from signal import Signals

    from tracker_daemon.embedded import EmbeddedPostgres

PATIENT = 45.0
FOREVER = "600"
"""A shutdown deadline that no test waits for."""

STATES = pytest.mark.parametrize(("scene", "number"), [("flushing", signal.SIGTERM), ("in_flush", signal.SIGINT)])


@pytest.fixture(autouse=True)
def _deadline() -> Iterator[None]:
    """No test waits for ever."""
    with watchdog(PATIENT):
        yield


class Scene:
    """A scene of the program, which takes signals."""

    def __init__(self, program: Running) -> None:
        self._program = program

    def wait_for(self, who: str, **fields: object) -> None:
        """Wait until the program says so."""
        self._program.wait_for(who=who, **fields)

    def send(self, number: Signals) -> None:
        """Send it a signal."""
        self._program.process.send_signal(number)

    def go_on(self) -> None:
        """Let it go on after what the test did in between."""
        self._program.process.send_signal(signal.SIGUSR1)

    def end(self) -> dict[str, Any]:
        """Wait for its end; return what it said last, when that adds up."""
        outcome = self._program.end(PATIENT)
        return checked(outcome)

    def said(self, who: str) -> dict[str, Any]:
        """Return the one line that *who* said."""
        [line] = [line for line in self._program.said if line["who"] == who]
        return line


def checked(outcome: Outcome) -> dict[str, Any]:
    """Return what the program said last: it ended well, and its books agree with what it counted."""
    assert outcome.returncode == 0, outcome.stderr
    assert "Traceback" not in outcome.stderr
    said = outcome.by("main")
    stats = said["stats"]
    assert stats["accepted"] == said["counted"], said
    assert stats["accepted"] == stats["applied"] + stats["dead_lettered"] + stats["lost"]
    assert stats["pending"] == 0
    assert len({tuple(report.items()) for report in said["reports"]}) <= 1, "the reports of two closes differ"
    return said


@contextmanager
def playing(scene: str, conninfo: str, shutdown_timeout: str = FOREVER) -> Iterator[Scene]:
    """Run a scene; it never outlives the block."""
    with running(command("fault_signals.py", scene, conninfo, shutdown_timeout)) as program:
        yield Scene(program)


@contextmanager
def table_locked(database: str) -> Iterator[psycopg.Connection[Any]]:
    """Hold up every flush, until the end or a rollback."""
    with psycopg.connect(database) as locker:
        locker.execute("LOCK TABLE conversations IN ACCESS EXCLUSIVE MODE")
        yield locker


def someone_waits(database: str) -> bool:
    """Say whether a flush waits for the lock."""
    statement = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    return bool(query(database, statement))


@pytest.mark.parametrize(
    ("scene", "calls", "drained", "number"),
    [
        ("unused", 0, 0, signal.SIGTERM),
        ("idle", 100, 0, signal.SIGTERM),
        ("window", 1_000, 1_000, signal.SIGTERM),
        ("window", 1_000, 1_000, signal.SIGINT),
    ],
)
def test_signal_while_nothing_is_in_the_way(
    database: str, number: Signals, scene: str, calls: int, drained: int
) -> None:
    """Idle, or with an open window: everything is applied, and the report says how much the drain did."""
    with playing(scene, database) as program:
        program.wait_for("ready")
        program.send(number)
        said = program.end()
    assert said["reports"] == [{"applied": drained, "dead_lettered": 0, "journaled": 0, "lost": 0}]
    assert said["stats"]["applied"] == calls == turns(database)


def test_signal_in_the_middle_of_a_call(database: str) -> None:
    """The handler interrupts a call of the main thread while others call: what returned True is applied or counted."""
    with playing("calling", database) as program:
        program.wait_for("ready")
        wait_until(lambda: turns(database) > 500, "some flushes")
        program.send(signal.SIGTERM)
        said = program.end()
    stats = said["stats"]
    # The interrupted call itself goes on only when the close is over: it may be too late.
    assert stats["lost"] <= 1
    assert stats["rejected"] >= 2
    assert stats["applied"] == turns(database) > 500


@STATES
def test_signal_during_a_flush_that_ends(database: str, number: Signals, scene: str) -> None:
    """A flush that is held up when the signal comes, and goes on before the deadline: all is applied."""
    with playing(scene, database) as program:
        program.wait_for("flushed")
        with table_locked(database) as locker:
            program.go_on()
            program.wait_for("ready")
            wait_until(lambda: someone_waits(database), "a flush that waits")
            program.send(number)
            program.wait_for("closing", signals=1)
            locker.rollback()
            said = program.end()
        if scene == "in_flush":
            assert program.said("flush")["error"] is None
    [report] = said["reports"]
    assert (report["applied"], report["lost"]) == (50, 0)
    assert said["stats"]["applied"] == turns(database)


@STATES
def test_signal_during_a_flush_that_does_not_end(database: str, number: Signals, scene: str) -> None:
    """A flush that is held up past the deadline: the program ends all the same, and says what it could not keep."""
    with playing(scene, database, "0.5") as program:
        program.wait_for("flushed")
        with table_locked(database):
            program.go_on()
            program.wait_for("ready")
            wait_until(lambda: someone_waits(database), "a flush that waits")
            program.send(number)
            said = program.end()
        if scene == "in_flush":
            assert "still pending" in program.said("flush")["error"] or "lost" in program.said("flush")["error"]
    [report] = said["reports"]
    assert (report["applied"], report["lost"]) == (0, 50)
    assert said["stats"]["applied"] <= turns(database) <= said["stats"]["accepted"]


def test_signal_while_the_database_is_down() -> None:
    """Nobody listens: the drain tries until the deadline, and everything is reported as lost."""
    with refusing_port() as port:
        conninfo = f"host=127.0.0.1 port={port} user=postgres dbname=postgres"
        with playing("window", conninfo, "0.5") as program:
            program.wait_for("ready")
            program.send(signal.SIGTERM)
            said = program.end()
    assert [report["lost"] for report in said["reports"]] == [1_000]
    assert said["stats"]["applied"] == 0


@STATES
def test_second_signal_cuts_the_drain_short(database: str, scene: str, number: Signals) -> None:
    """The first handler waits for minutes; the second one's `close(0)`, inside it, ends the drain for both."""
    with playing(scene, database) as program:
        program.wait_for("flushed")
        with table_locked(database):
            program.go_on()
            program.wait_for("ready")
            wait_until(lambda: someone_waits(database), "a flush that waits")
            program.send(signal.SIGTERM)
            program.wait_for("closing", signals=1)
            program.send(number)
            program.wait_for("closing", signals=2)
            said = program.end()
    assert said["signals"] == 2
    assert [report["lost"] for report in said["reports"]] == [50, 50]


def test_second_signal_while_the_database_is_down() -> None:
    """Between two tries, too, the second signal ends the drain."""
    with refusing_port() as port:
        conninfo = f"host=127.0.0.1 port={port} user=postgres dbname=postgres"
        with playing("window", conninfo) as program:
            program.wait_for("ready")
            program.send(signal.SIGTERM)
            program.wait_for("closing", signals=1)
            program.send(signal.SIGTERM)
            said = program.end()
    assert [report["lost"] for report in said["reports"]] == [1_000, 1_000]


def test_signal_while_the_server_stands_still(
    postgres: EmbeddedPostgres, database: str, admin: psycopg.Connection[Any]
) -> None:
    """Our server process and the one that makes others stand still: the deadline holds without their answer."""
    with playing("flushing", database, "0.5") as program:
        program.wait_for("flushed")
        [(backend,)] = admin.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        ).fetchall()
        with stopped(postgres.pid), stopped(backend):
            program.go_on()
            program.wait_for("ready")
            program.send(signal.SIGTERM)
            said = program.end()
    [report] = said["reports"]
    assert (report["applied"], report["lost"]) == (0, 50)
    assert 100 <= turns(database) <= 150  # what was under way may be done when it wakes: once, if at all


def test_signal_during_a_scrape(database: str) -> None:
    """The handler closes in the middle of a scrape of its own thread: neither waits for the other, both are right."""
    with playing("scraping", database) as program:
        said = program.end()
        assert program.said("scrape")["accepted"] == 111
        assert program.said("other")["lost"] == 0
    assert said["stats"]["applied"] == 100
    assert turns(database) == 111


def test_signal_in_asyncio(database: str) -> None:
    """`loop.add_signal_handler` and `aclose` drain as well."""
    with playing("in_asyncio", database) as program:
        program.wait_for("ready")
        program.send(signal.SIGTERM)
        said = program.end()
    assert [report["applied"] for report in said["reports"]] == [500]
    assert turns(database) == 500
