"""The demo: its verdict is right when the table is, and wrong when it is not."""

from __future__ import annotations

import asyncio
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from decimal import Decimal, Inexact
from functools import partial
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, Any, cast

import httpx
import psycopg
import pytest
from click.testing import CliRunner
from rich.console import Console

from tests.helpers import wait_until
from tracker_daemon import Tracker
from tracker_daemon.cli import program
from tracker_daemon.daemon.health import ask
from tracker_daemon.daemon.options import Listen
from tracker_daemon.demo import run as demo
from tracker_daemon.demo.count import Call, Counted
from tracker_daemon.demo.drive import drive
from tracker_daemon.demo.figures import Figure, Progress, Report
from tracker_daemon.demo.screen import Lines, Screen, screen
from tracker_daemon.demo.signals import Signals
from tracker_daemon.demo.terminal import Terminal
from tracker_daemon.demo.traffic import Conversations, Pacer, Traffic, visit, write_through
from tracker_daemon.demo.verdict import compare
from tracker_daemon.memory_sink import MemorySink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from prometheus_client import CollectorRegistry

SMALL = ("--rate", "2000", "--threads", "200")


@contextmanager
def running(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Start the demo as a program, with *folder* for its temporary files; it must leave nothing there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tracker_daemon", "demo", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    with process:
        try:
            yield process
        finally:
            process.kill()
    assert list(folder.glob("tracker-demo-*")) == []


@pytest.fixture
def folder(server_folder: Path, request: pytest.FixtureRequest) -> Path:
    """A folder of the test's own, in reach of the server's user."""
    path = server_folder / re.sub(r"\W", "-", request.node.name)
    path.mkdir()
    path.chmod(0o755)
    return path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure one statement a call for a moment only."""
    monkeypatch.setattr(demo, "_BASELINE_CALLS", 20)


def line_with(process: subprocess.Popen[str], text: str) -> None:
    """Read the output up to the line with *text*."""
    assert process.stdout is not None
    assert any(text in line for line in process.stdout)


# -- the program -----------------------------------------------------------------------------------


def test_demo(folder: Path) -> None:
    """The demo ends with every row exact, all the figures, and exit status 0, and leaves nothing behind."""
    with running(folder, "--seconds", "2", *SMALL) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert re.search(r"^EXACT  \d+ rows, every column: 0 differences; 0 calls refused or lost$", output, re.MULTILINE)
    for figure in (
        r"PostgreSQL 18\.\d+, fsync on, synchronous_commit on",
        r"calls made +[34],\d{3} ",
        r"rows written +[\d,]+   in \d+ transactions",
        r"calls per row written +\d+\.\d",
        r"flush p50 +[\d.]+ ms",
        r"flush p99 +[\d.]+ ms",
        r"peak queue depth +\d+   threads, [\d,]+ calls",
        r"measured +[\d,]+/s   [\d,]+ calls, 10 connections",
        r"extrapolated +\d+ s   for all 3,\d{3} calls|extrapolated +\d+ s   for all 4,\d{3} calls",
        r"round trips +[\d,]+",
        r"row versions +[\d,]+",
    ):
        assert re.search(figure, output), figure


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_traffic(folder: Path, number: signal.Signals) -> None:
    """A signal in the middle ends the traffic; what was called is drained, compared and reported: exit status 0."""
    with running(folder, "--seconds", "600", *SMALL) as process:
        line_with(process, "1.0 s  chat traffic")
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert re.search(r"^EXACT  \d+ rows", output, re.MULTILINE)


def test_second_signal(folder: Path) -> None:
    """A second signal ends the demo at once: no verdict, exit status 1, no traceback, nothing left."""
    with running(folder, "--seconds", "600", *SMALL) as process:
        line_with(process, "1.0 s  chat traffic")
        process.send_signal(signal.SIGINT)
        line_with(process, "measuring one statement a call")
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.split() == ["Aborted!"]


def test_signal_before_the_traffic(folder: Path) -> None:
    """A signal while the server starts ends the demo at once."""
    with running(folder, *SMALL) as process:
        line_with(process, "starting PostgreSQL")
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.split() == ["Aborted!"]


# -- against a daemon ------------------------------------------------------------------------------


@contextmanager
def daemon(database: str, folder: Path) -> Iterator[str]:
    """A daemon on a socket in *folder*; gives its URL once it is ready."""
    path = folder / "tracker.sock"
    command = [sys.executable, "-m", "tracker_daemon", "serve", "--database", database, "--listen", f"unix:{path}"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: ask(Listen(path=path), 5.0)[0], "the daemon")
            yield f"unix:{path}"
        finally:
            process.terminate()
            process.wait(timeout=30)


def test_against_a_daemon(database: str, folder: Path) -> None:
    """With --daemon there is only traffic: no server of its own; every call of the report is in the daemon's table."""
    with (
        daemon(database, folder) as url,
        running(folder, "--daemon", url, "--seconds", "1.5", *SMALL) as process,
    ):
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    found = re.search(
        r"^APPLIED  ([\d,]+) calls on (\d+) conversations; 0 refused, set aside or lost$", output, re.MULTILINE
    )
    assert found, output
    assert "PostgreSQL" not in output
    with psycopg.connect(database) as connection:
        rows, turns = connection.execute("SELECT count(*), sum(turn_count) FROM conversations").fetchone() or (0, 0)
    assert rows == int(found[2])
    assert 0 < turns < int(found[1].replace(",", ""))


def test_signal_ends_the_traffic_against_a_daemon(database: str, folder: Path) -> None:
    """A signal ends it: what was called is handed over, and the exit status is 0."""
    with (
        daemon(database, folder) as url,
        running(folder, "--daemon", url, "--seconds", "600", *SMALL) as process,
    ):
        line_with(process, "1.0 s  chat traffic")
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert re.search(r"^APPLIED  ", output, re.MULTILINE)


def test_numbers_for_prometheus(database: str, folder: Path) -> None:
    """With --metrics the tracker's numbers are served while the traffic lasts."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (
        daemon(database, folder) as url,
        running(folder, "--daemon", url, "--metrics", f"127.0.0.1:{port}", "--seconds", "600", *SMALL) as process,
    ):
        line_with(process, "1.0 s  chat traffic")
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    (accepted,) = re.findall(r'^tracker_calls_accepted_total\{call="record_turn"\} (\S+)$', text, re.MULTILINE)
    assert float(accepted) > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--metrics", "127.0.0.1:9101"), "--metrics goes with --daemon"),
        (("--daemon", "unix:x", "--metrics", "9101"), "must be HOST:PORT"),
        (("--daemon", "unix:x", "--metrics", "h:99999"), "must be HOST:PORT"),
    ],
)
def test_wrong_address_for_prometheus(arguments: tuple[str, ...], message: str) -> None:
    """What is no address, or has no traffic of its own to show, is refused."""
    result = CliRunner().invoke(program, ["demo", *arguments])
    assert result.exit_code == 2
    assert message in result.output


def test_no_daemon_there(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Calls that no daemon takes are lost at the end: they are told, and the exit status is 1."""
    monkeypatch.setattr("tracker_daemon.demo.drive.Tracker", partial(Tracker, shutdown_timeout=0.2))
    assert drive(f"unix:{folder}/nobody.sock", seconds=0.2, rate=500, threads=20) == 1
    found = re.search(
        r"^CALLS LOST  (\d+) of (\d+) calls on \d+ conversations; (\d+) refused", capsys.readouterr().out, re.MULTILINE
    )
    assert found
    assert found[1] == found[2] == found[3] != "0"


def test_url_of_a_daemon() -> None:
    """What is no daemon's URL is refused before anything starts, without being repeated."""
    for url in ("postgresql://me:secret@there/chat", "tracker.sock"):
        result = CliRunner().invoke(program, ["demo", "--daemon", url])
        assert result.exit_code == 2
        assert "must be unix:PATH, http://HOST:PORT or https://HOST:PORT" in result.output
        assert "secret" not in result.output


def test_screen_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rich is not installed, as in the daemon's image, the demo shows lines."""
    monkeypatch.delitem(sys.modules, "tracker_daemon.demo.terminal", raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert isinstance(screen(), Lines)


# -- a verdict that can fail -----------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_falsified(capsys: pytest.CaptureFixture[str]) -> None:
    """One row changed behind the tracker's back: its difference is named and the exit status is 1."""
    falsified: list[str] = []

    def tamper(conninfo: str) -> None:
        with psycopg.connect(conninfo) as connection:
            row = connection.execute(
                "UPDATE conversations SET total_cost_usd = total_cost_usd + 1e-20"
                " WHERE thread_id = (SELECT max(thread_id) FROM conversations) RETURNING thread_id"
            ).fetchone()
            falsified.extend(row or ())

    assert demo.run(seconds=0.5, rate=2_000, threads=100, tamper=tamper) == 1
    output = capsys.readouterr().out
    assert re.search(rf"^   {falsified[0]}: total_cost_usd is [\d.E-]+, counted [\d.E-]+$", output, re.MULTILINE)
    assert re.search(
        r"^NOT EXACT  \d+ rows, every column: 1 differences; 0 calls refused or lost$", output, re.MULTILINE
    )


@pytest.mark.usefixtures("quick")
def test_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that the tracker refuses are no difference in the table, and still no success."""
    monkeypatch.setattr(demo, "Tracker", partial(Tracker, max_pending=5))
    assert demo.run(seconds=0.5, rate=2_000, threads=100) == 1
    output = capsys.readouterr().out
    assert re.search(
        r"^CALLS REFUSED  \d+ rows, every column: 0 differences; [\d,]+ calls refused", output, re.MULTILINE
    )
    assert not re.search(r"calls refused +0", output)


def test_not_in_the_main_thread() -> None:
    """In another thread the demo leaves the signals alone."""
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with Signals():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def now(method: Any, *arguments: Any) -> tuple[Call, tuple[int, int]]:
    """Return a call and a span that is certain to hold it."""
    moment = time.time_ns()
    return Call(method, arguments), (moment - 1_000_000_000, moment + 1_000_000_000)


@pytest.fixture
def counted(database: str, registry: CollectorRegistry) -> dict[str, Counted]:
    """Two conversations, in the table and counted."""
    calls = [
        ("a", *now("ensure_conversation")),
        ("a", *now("record_turn", "billing", 7, 0.1)),
        ("a", *now("record_turn", "search", 5, Decimal("0.20000000000000000000001"))),
        ("a", *now("record_turn", "billing", 1, 0)),
        ("a", *now("resolve", "escalated")),
        ("b", *now("ensure_conversation")),
        ("b", *now("record_turn", None, 1, 1e-7)),
    ]
    found: dict[str, Counted] = {"a": Counted(), "b": Counted()}
    with Tracker(database, registry=registry) as tracker:
        for thread_id, call, span in calls:
            assert getattr(tracker, call.method)(thread_id, *call.arguments)
            found[thread_id].add(call, span)
    return found


def compared(database: str, counted: dict[str, Counted]) -> list[str]:
    """Return the differences."""

    async def work() -> list[str]:
        async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
            return (await compare(connection, "conversations", counted)).named

    return asyncio.run(work())


def test_compare_exact(database: str, counted: dict[str, Counted]) -> None:
    """What the tracker wrote is what was counted."""
    assert compared(database, counted) == []


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("turn_count = 4", "a: turn_count is 4, counted 3"),
        ("total_tokens = 12", "a: total_tokens is 12, counted 13"),
        ("total_cost_usd = 0.3", "a: total_cost_usd is 0.3, counted 0.30000000000000000000001"),
        ("agents_used = '{search,billing}'", "a: agents_used is [search, billing], counted [billing, search]"),
        ("resolution_type = NULL", "a: resolution_type is null, counted escalated"),
        ("ended_at = NULL", "a: ended_at is null, counted "),
        ("ended_at = ended_at + interval '1 minute'", "a: ended_at is "),
        ("started_at = started_at - interval '1 minute'", "a: started_at is "),
        ("last_activity = last_activity - interval '1 minute'", "a: last_activity is "),
    ],
)
def test_compare_column(database: str, counted: dict[str, Counted], change: str, difference: str) -> None:
    """A wrong value in any column is named, with both values."""
    with psycopg.connect(database) as connection:
        connection.execute(f"UPDATE conversations SET {change} WHERE thread_id = 'a'")
    found = compared(database, counted)
    assert found[0].startswith(difference)
    assert all(each.startswith("a: ") for each in found)


def test_compare_ended(database: str, counted: dict[str, Counted]) -> None:
    """An end that nobody called is named."""
    with psycopg.connect(database) as connection:
        connection.execute("UPDATE conversations SET ended_at = now() WHERE thread_id = 'b'")
    (found,) = compared(database, counted)
    assert found.startswith("b: ended_at is ")
    assert found.endswith("counted none")


def test_compare_backwards(database: str, counted: dict[str, Counted]) -> None:
    """A start after the last activity is a difference even where each is within its span."""
    with psycopg.connect(database) as connection:
        connection.execute(
            "UPDATE conversations SET started_at = last_activity, last_activity = started_at WHERE thread_id = 'a'"
        )
    (found,) = compared(database, counted)
    assert "is after last_activity" in found


def test_compare_rows(database: str, counted: dict[str, Counted]) -> None:
    """A row too few and a row too many are named; of many differences the first ten."""
    with psycopg.connect(database) as connection:
        connection.execute("UPDATE conversations SET thread_id = 'c' WHERE thread_id = 'a'")
    assert compared(database, counted) == ["c: has a row, and no call was made", "a: has no row, counted 5 calls"]
    with psycopg.connect(database) as connection:
        connection.execute("INSERT INTO conversations (thread_id) SELECT n::text FROM generate_series(1, 50) n")
    assert len(compared(database, counted)) == 10


# -- the count and the traffic ---------------------------------------------------------------------


def test_count_is_exact() -> None:
    """A float counts as it prints, decimals keep every digit, and a digit that would be lost is an error."""
    counted = Counted()
    for cost in (0.1, 0.2, Decimal("1e-40"), 3):
        counted.add(*now("record_turn", None, 1, cost))
    assert str(counted.cost) == "3.3000000000000000000000000000000000000001"
    with pytest.raises(Inexact):
        counted.add(*now("record_turn", None, 1, Decimal("1e-400")))


def test_visit() -> None:
    """A visit is what a chat server does: ensure first, then turns, then at most one resolve."""
    random = Random(7)
    agents: set[str | None] = set()
    for _ in range(500):
        first, *turns = visit(random)
        assert first == Call("ensure_conversation")
        if turns[-1].method == "resolve":
            turns.pop()
        assert turns
        assert {turn.method for turn in turns} == {"record_turn"}
        agents.update(turn.arguments[0] for turn in turns)
    assert len(agents) == 9


def test_conversations_have_one_server() -> None:
    """Nobody else gets a conversation that is being served; after the visit it is free again."""
    conversations = Conversations(1)
    first, second = conversations.serve(Random(1)), conversations.serve(Random(2))
    assert next(first) is not None
    assert next(second) is None
    first.close()
    assert next(second) is not None
    second.close()


def test_traffic_is_skewed() -> None:
    """The busiest of a thousand conversations has far more than its share, and hundreds are visited."""
    conversations, random = Conversations(1_000), Random(3)
    visits: dict[str, int] = {}
    for step in islice(conversations.serve(random), 20_000):
        assert step is not None
        visits[step[0].thread_id] = visits.get(step[0].thread_id, 0) + 1
    assert visits[conversations.all[0].thread_id] > 20 * 20
    assert len(visits) > 500


def test_pacer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many calls are due as the time gives, given back ones among them, and not what is long past."""
    moment = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: moment)
    pacer = Pacer(100)
    assert not pacer.take()
    moment += 0.021
    assert [pacer.take() for _ in range(3)] == [True, True, False]
    pacer.give_back()
    assert pacer.take()
    moment += 60
    assert sum(pacer.take() for _ in range(1_000)) == 25


class StopAfter:
    """A tracker's door that sets an event at the n-th call."""

    def __init__(self, tracker: Tracker, calls: int, event: threading.Event) -> None:
        self.tracker, self.left, self.event = tracker, calls, event

    def __getattr__(self, method: str) -> Any:
        self.left -= 1
        if self.left <= 0:
            self.event.set()
        return getattr(self.tracker, method)


def test_traffic_counts_what_was_accepted(registry: CollectorRegistry) -> None:
    """Accepted and refused calls are counted apart, as the tracker counts them."""
    with Tracker(MemorySink(), max_pending=10, registry=registry) as tracker:
        stop = threading.Event()
        traffic = Traffic(cast("Tracker", StopAfter(tracker, 500, stop)), threads=50, rate=2_000)
        asyncio.run(traffic.run(stop))
    stats = tracker.stats()
    assert stats.accepted == sum(each.calls for each in traffic.counted.values())
    assert stats.rejected == traffic.refused
    assert stats.accepted + stats.rejected >= 500
    assert stats.rejected > 0


def test_write_through(database: str) -> None:
    """The comparison's calls reach the table, a statement each, and no more of them than asked for."""
    measured = asyncio.run(write_through(database, "conversations", 20, calls=200, seconds=60))
    assert 0 < measured.calls <= 200
    assert measured.rate == measured.calls / measured.seconds
    with psycopg.connect(database) as connection:
        row = connection.execute("SELECT sum(turn_count) FROM conversations").fetchone()
    assert row is not None
    assert 0 < row[0] < measured.calls


# -- the screen ------------------------------------------------------------------------------------


def terminal(width: int = 80) -> tuple[Screen, Callable[[], str]]:
    """Return a terminal's screen, and what gives its output."""
    file = io.StringIO()
    return Terminal(Console(file=file, force_terminal=True, width=width, highlight=False)), file.getvalue


def show_all(screen: Screen, *, exact: bool) -> None:
    """Show something of everything."""
    figures = [Figure("calls made", "12,345", "in 1.0 s"), Figure("calls lost", "0")]
    verdict, differences = ("EXACT", []) if exact else ("NOT EXACT", ["t[1]: turn_count is 1, counted 2"])
    with screen:
        screen.head("the demo")
        screen.say("PostgreSQL")
        screen.show(Progress("chat traffic", 0.0, 2.0))
        screen.show(Progress("chat traffic", 1.0, 2.0, 900, 450.0, 100, 50, 200, 99.0, 3, 0.01, 0.0212, (0.01, 0.02)))
        screen.report(
            Report(exact, verdict, "4 rows", differences, [("Written behind", figures)], more=len(differences))
        )


@pytest.mark.parametrize("exact", [True, False])
def test_screens_say_the_same(capsys: pytest.CaptureFixture[str], *, exact: bool) -> None:
    """The terminal and plain lines show the same numbers, and name the differences as they are."""
    show_all(Lines(), exact=exact)
    rich_screen, output = terminal()
    show_all(rich_screen, exact=exact)
    plain = capsys.readouterr().out
    coloured = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", output())
    for text in (plain, coloured):
        for piece in ("the demo", "PostgreSQL", "900", "450", "100", "4.0", "10 ms", "21 ms", "12,345", "4 rows"):
            assert piece in text
        assert ("NOT EXACT" in text) is not exact
        assert ("t[1]: turn_count is 1, counted 2" in text) is not exact
        assert ("and 1 more" in text) is not exact
    assert "\x1b" not in plain


def test_terminal_fits() -> None:
    """Nothing of the table is wider than a narrow terminal."""
    screen, output = terminal(60)
    show_all(screen, exact=True)
    lines = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", output()).replace("\r", "\n").split("\n")
    assert max(map(len, lines)) <= 60
