"""The connection fails at every message, in either direction: each call is counted once all the same."""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING, Any

import anyio
import psycopg
import pytest

from tests.digits import Digits
from tests.faults.harness import outcome, sums, tracking
from tests.faults.proxy import Blackhole, Cut, CutAfter, Delay, Refuse
from tests.helpers import PATIENCE
from tracker_daemon import Tracker
from tracker_daemon.postgres import many
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.sink import PostgresSink
from tracker_daemon.sink import SinkFault

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from tests.faults.harness import Errors
    from tests.faults.proxy import FaultProxy

THREADS = 40


def sink_of(conninfo: str, copy_from: int, timeout: float = 30.0) -> PostgresSink:
    """Return a sink that sends everything by COPY (1) or nothing (a large number)."""
    table = (None, "conversations")
    return PostgresSink(Connector(conninfo), table, copy_from=copy_from, statement_timeout=timeout)


def call(tracker: Tracker, digits: Digits, run: int) -> None:
    """A few calls on the threads of one run, new ones and one that lasts."""
    for i in range(THREADS):
        thread_id = f"r{run}-{i}"
        assert tracker.record_turn(thread_id, "agent", digits.tokens(thread_id))
    lasting = f"lasting-{run // 25}"
    assert tracker.record_turn(lasting, "agent", digits.tokens(lasting))


@pytest.mark.parametrize("copy_from", [1, 10**9], ids=["copy", "arrays"])
@pytest.mark.parametrize("direction", ["client", "server"])
@pytest.mark.parametrize("kind", [Cut, CutAfter])
def test_every_message_of_a_flush(
    proxy: FaultProxy,
    database: str,
    errors: Errors,
    registry: CollectorRegistry,
    kind: Any,
    direction: Any,
    copy_from: int,
) -> None:
    """A flush is cut before, or right after, its message N, for every N until none is left to cut."""
    digits, runs = Digits(), 0
    with tracking(sink_of(proxy.conninfo, copy_from), errors, registry) as tracker:
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
    assert digits.read(sums(database)).exact
    assert runs >= 5, f"only {runs} messages were cut"
    assert outcome(registry, "retry") >= runs
    if kind is CutAfter and direction == "client":
        assert outcome(registry, "duplicate") >= 1, "no commit was in doubt and found done"


@pytest.mark.parametrize("direction", ["client", "server"])
def test_every_message_from_connect_on(
    proxy: FaultProxy, database: str, errors: Errors, registry: CollectorRegistry, direction: Any
) -> None:
    """A new tracker's connect, look at the tables, open and flush are cut at message N, for every N."""
    digits = Digits()
    for n in itertools.count(1):
        proxy.arm(Cut(direction, n))
        with tracking(sink_of(proxy.conninfo, 10**9), errors, registry) as tracker:
            call(tracker, digits, n)
            tracker.flush(PATIENCE)
            fired = proxy.fired
            proxy.disarm()
        if not fired:
            break
    assert n > 15
    assert digits.read(sums(database)).exact


@pytest.mark.parametrize("after", [1, 4, 5, 6, 40])
@pytest.mark.parametrize("direction", ["client", "server"])
def test_cut_inside_a_message(
    proxy: FaultProxy, database: str, errors: Errors, registry: CollectorRegistry, direction: Any, after: int
) -> None:
    """A frame that ends in the middle, at any of its bytes, is a lost connection like any other."""
    digits = Digits()
    with tracking(sink_of(proxy.conninfo, 1), errors, registry) as tracker:
        tracker.record_turn("afterwards")
        tracker.flush(PATIENCE)
        for n in range(1, 16, 3):
            proxy.arm(Cut(direction, n, after=after))
            call(tracker, digits, n)
            tracker.flush(PATIENCE)
        proxy.disarm()
    assert digits.read(sums(database)).exact


def test_commit_done_and_answer_lost(
    proxy: FaultProxy, database: str, errors: Errors, registry: CollectorRegistry
) -> None:
    """Twenty commits are done and their answers lost: each is found in the ledger, and counted as a duplicate."""
    digits = Digits()
    with tracking(sink_of(proxy.conninfo, 10**9), errors, registry) as tracker:
        tracker.record_turn("afterwards")
        tracker.flush(PATIENCE)
        for n in range(20):
            proxy.arm(Cut("server", 1, kind="C", contains=b"SELECT 1"))
            call(tracker, digits, n)
            tracker.flush(PATIENCE)
            assert proxy.fired
        proxy.disarm()
    assert outcome(registry, "duplicate") == 20
    assert digits.read(sums(database)).exact


@pytest.mark.parametrize("copy_from", [1, 10**9], ids=["copy", "arrays"])
def test_deaf_server(
    proxy: FaultProxy, database: str, errors: Errors, registry: CollectorRegistry, copy_from: int
) -> None:
    """A peer that falls silent in the middle is given up at the deadline; the batch goes again on a new connection."""
    digits = Digits()
    with tracking(sink_of(proxy.conninfo, copy_from, timeout=0.3), errors, registry) as tracker:
        tracker.record_turn("afterwards")
        tracker.flush(PATIENCE)
        for n in (1, 3, 5):
            proxy.arm(Blackhole("server", n))
            call(tracker, digits, n)
            tracker.flush(PATIENCE)
            assert proxy.fired
            proxy.release()
        proxy.disarm()
    errors.wait_for_kind("timeout", count=3)
    assert digits.read(sums(database)).exact


def test_deadline_that_passed_is_told(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon's question whether it could write says how long it waited, not how long a flush would."""
    monkeypatch.setattr(many, "_PROBE", 0.25)

    async def ask() -> None:
        sink = many.ManySink(Connector(database), (None, "conversations"))
        await sink.probe()
        with psycopg.connect(database) as other:
            other.execute("LOCK TABLE tracker_ledger IN ACCESS EXCLUSIVE MODE")
            with pytest.raises(SinkFault, match=r"^asking the database: no answer within 0.25 s$"):
                await sink.probe()
        await sink.disconnect()

    anyio.run(ask)


def test_answer_later_than_the_deadline(
    proxy: FaultProxy, database: str, errors: Errors, registry: CollectorRegistry
) -> None:
    """The first try's commit comes after we gave up, while the retry runs: the ledger lets one of them through."""
    digits = Digits()
    with tracking(sink_of(proxy.conninfo, 10**9, timeout=0.3), errors, registry) as tracker:
        tracker.record_turn("afterwards")
        tracker.flush(PATIENCE)
        for n in range(5):
            # The flush's statements reach the server only when the client has long given up on them.
            late = threading.Event()
            proxy.arm(Delay("client", 1, until=late))
            call(tracker, digits, n)
            errors.wait_for_kind("timeout", count=n + 1)
            late.set()
            tracker.flush(PATIENCE)
        proxy.disarm()
    assert digits.read(sums(database)).exact


@pytest.mark.parametrize("silent", [False, True])
def test_server_that_takes_no_connection(
    proxy: FaultProxy, database: str, errors: Errors, registry: CollectorRegistry, silent: bool
) -> None:
    """Connections that are refused, or accepted and never answered: calls are taken; all is applied afterwards."""
    digits = Digits()
    proxy.arm(Refuse(silent=silent, repeat=3))
    conninfo = f"{proxy.conninfo} connect_timeout=2"
    with tracking(sink_of(conninfo, 10**9), errors, registry) as tracker:
        for n in range(10):
            call(tracker, digits, n)
        errors.wait_for(lambda _: True, count=2)
        tracker.flush(PATIENCE)
    assert digits.read(sums(database)).exact


def test_close_while_the_server_is_deaf(
    proxy: FaultProxy, database: str, errors: Errors, registry: CollectorRegistry
) -> None:
    """A deaf server holds the end of the program for the deadline and no longer; the loss is reported."""
    tracker = Tracker(sink_of(proxy.conninfo, 10**9), on_error=errors, registry=registry, flush_interval=0.01)
    tracker.record_turn("a")
    tracker.flush(PATIENCE)
    # As when the network goes: what is open falls silent, and nothing opens.
    proxy.arm(Blackhole("client", 1, repeat=None), Refuse(silent=True, repeat=None))
    tracker.record_turn("b")
    assert proxy.wait_fired()
    with _bounded(30):
        report = tracker.close(0.5)
    assert (report.applied, report.lost) == (0, 1)
    errors.wait_for(lambda error: "cut off, as the time for the shutdown had passed" in str(error))
    stats = tracker.stats()
    assert stats.accepted == stats.applied + stats.lost == 2
    assert set(sums(database)) >= {"a"}


class _bounded:  # noqa: N801 - reads as a statement
    """Dump and fail when what is inside hangs: a bound on the test, not a measure."""

    def __init__(self, seconds: float) -> None:
        import faulthandler

        self._seconds, self._handler = seconds, faulthandler

    def __enter__(self) -> None:
        self._handler.dump_traceback_later(self._seconds, exit=True)

    def __exit__(self, *exc_info: object) -> None:
        self._handler.cancel_dump_traceback_later()


def test_same_batch_on_two_connections_at_once(database: str) -> None:
    """Two sinks apply one batch at the same time: the row lock of the ledger lets one through, the other sees it."""
    from uuid import uuid4

    from tracker_daemon.batch import Batch
    from tracker_daemon.delta import ThreadDelta

    async def race(copy_from: int, name: str) -> list[bool]:
        first, second = sink_of(database, copy_from), sink_of(database, copy_from)
        producer = uuid4()
        opened = await first.open(producer, 0)
        delta = ThreadDelta(name, 1)
        delta.turn("a", 1, 0, 1)
        batch = Batch(producer, 0, opened.epoch, 1, (delta,))
        duplicates: list[bool] = []

        async def apply(sink: PostgresSink) -> None:
            duplicates.append((await sink.apply(batch)).duplicate)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(apply, first)
            tasks.start_soon(apply, second)
        await first.aclose(producer, 0, clean=True)
        await second.aclose(producer, 0, clean=True)
        return sorted(duplicates)

    for i in range(10):
        assert anyio.run(race, 1 if i % 2 else 10**9, f"t-{i}") == [False, True]
    assert sums(database) == {f"t-{i}": 1 for i in range(10)}
