"""What the database forgets is applied again from the journal, exactly once; what is not kept any more is reported."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
import pytest

from tests.digits import Digits
from tests.faults.harness import Errors, sums, tracking
from tests.faults.proxy import Cut, FaultProxy
from tests.faults.servers import catch_up, cut_off, promote
from tests.faults.test_failover import digits_of, flush_calls, primary_and_standby, regressions
from tests.helpers import PATIENCE, ledger, wait_until
from tests.journal.forgetful import ForgetfulSink, told
from tracker_daemon import MemorySink

if TYPE_CHECKING:
    from pathlib import Path

    from prometheus_client import CollectorRegistry

    from tests.helpers import Trackers
    from tracker_daemon import Tracker

NOWHERE = "host=127.0.0.1 port=1 user=postgres dbname=postgres"


def calls(tracker: Tracker, digits: Digits, threads: int = 10, name: str = "t") -> None:
    """Make one call on each of some threads."""
    for i in range(threads):
        thread_id = f"{name}-{i}"
        assert tracker.record_turn(thread_id, "agent", digits.tokens(thread_id))


# -- a standby that lagged -------------------------------------------------------------------------


@pytest.mark.parametrize("in_hand", ["not sent", "committed, answer lost"])
def test_standby_that_lagged_is_repaired(
    servers: Path, tmp_path: Path, errors: Errors, registry: CollectorRegistry, in_hand: str
) -> None:
    """A standby is promoted without the last commits: the journal gives them back, before the batch in hand."""
    digits = Digits()
    with primary_and_standby(servers) as (primary, standby), FaultProxy(primary.conninfo) as proxy:
        with tracking(proxy.conninfo, errors, registry, journal=tmp_path) as tracker:
            flush_calls(tracker, digits, 6)
            catch_up(primary, standby)
            cut_off(standby)
            flush_calls(tracker, digits, 5)  # that the standby does not have
            if in_hand == "committed, answer lost":
                proxy.redirect(NOWHERE)
                proxy.arm(Cut("server", 1, kind="C", contains=b"SELECT 1"))
            else:
                primary.stop("immediate")
            calls(tracker, digits)
            errors.wait_for(lambda _: True)
            primary.stop("immediate")
            promote(standby)
            proxy.redirect(standby.conninfo)
            flush_calls(tracker, digits, 5)
            assert tracker._journal is not None
            assert tracker._journal.replayed == 50
        assert [(error.expected, error.found) for error in regressions(errors)] == [(11, 6)]
        assert digits.read(sums(standby.conninfo)).exact


@pytest.mark.parametrize("pending", [False, True])
def test_process_restarted_before_the_failover_is_known(
    servers: Path, tmp_path: Path, errors: Errors, registry: CollectorRegistry, trackers: Trackers, *, pending: bool
) -> None:
    """The process that made the forgotten commits is gone: the next one finds them missing, and applies them."""
    digits = Digits()
    with primary_and_standby(servers) as (primary, standby), FaultProxy(primary.conninfo) as proxy:
        with tracking(proxy.conninfo, errors, registry, journal=tmp_path) as tracker:
            flush_calls(tracker, digits, 3)
            catch_up(primary, standby)
            cut_off(standby)
            flush_calls(tracker, digits, 4)
        if pending:  # and a life that never reached a database is in between
            tracker = trackers(NOWHERE, journal=tmp_path)
            calls(tracker, digits)
            assert tracker.close(0).journaled == 10
        primary.stop("immediate")
        promote(standby)
        proxy.redirect(standby.conninfo)
        with tracking(proxy.conninfo, errors, registry, journal=tmp_path) as tracker:
            flush_calls(tracker, digits, 2)
            assert tracker._journal is not None
            assert tracker._journal.recovered == 40 + 1 + 10 * pending  # one is the closing call of `tracking`
        assert digits.read(sums(standby.conninfo)).exact
        assert len(ledger(standby.conninfo)) == 2 + pending


def test_recovered_batches_that_are_forgotten(
    servers: Path, tmp_path: Path, errors: Errors, registry: CollectorRegistry, trackers: Trackers
) -> None:
    """What this process itself had recovered from an earlier life is forgotten before its own first batch: applied again."""
    digits = Digits()
    with primary_and_standby(servers) as (primary, standby), FaultProxy(primary.conninfo) as proxy:
        first = trackers(proxy.conninfo, journal=tmp_path, flush_interval=0.01, max_batch_size=4)
        flush_calls(first, digits, 3)
        catch_up(primary, standby)
        cut_off(standby)
        flush_calls(first, digits, 2)  # lost with the primary, as is all that follows
        proxy.redirect(NOWHERE)
        proxy.sever_all()
        calls(first, digits)
        assert first.close(0).journaled == 10
        proxy.redirect(primary.conninfo)
        with tracking(proxy.conninfo, errors, registry, journal=tmp_path, flush_interval=600) as tracker:
            tracker.flush(PATIENCE)
            assert tracker.stats().applied == 10
            primary.stop("immediate")
            promote(standby)
            proxy.redirect(standby.conninfo)
            flush_calls(tracker, digits, 2)
            tracker.flush(PATIENCE)
        assert digits.read(sums(standby.conninfo)).exact


def leave_windows(trackers: Trackers, digits: Digits, journal: Path) -> None:
    """Be a life that reaches no database, and leaves four windows of three batches each."""
    bounds = {"max_batch_size": 4, "max_pending": 48, "max_queue_size": 12}
    tracker = trackers(NOWHERE, journal=journal, flush_interval=600, **bounds)
    for number in range(4):
        with tracker._backlog.lock:  # the worker sees all of them at once
            calls(tracker, digits, 12)
        tracker._worker.wake()
        wait_until(lambda number=number: len(tracker._backlog.sealed) == number + 1, "a window sealed")  # type: ignore[misc]
    assert tracker.close(0).journaled == 48


# -- every commit forgotten, at every instant --------------------------------------------------------


@pytest.mark.parametrize("at", range(2, 13))
def test_forgotten_in_the_middle_of_a_window(tmp_path: Path, trackers: Trackers, at: int) -> None:
    """Whichever batch meets it, and whichever the database still has: windows of several batches are repaired too."""
    for back_to in range(1, at):
        digits, sink = Digits(), ForgetfulSink(at, back_to)
        tracker = trackers(sink, journal=tmp_path / f"{back_to}", max_batch_size=4, flush_interval=600)
        for _ in range(4):
            calls(tracker, digits, 12)
            tracker.flush(PATIENCE)
        tracker.close()
        assert len(sink.forgotten) == at - 1 - back_to
        assert digits.read(sink.sums).exact, (at, back_to)
        assert tracker._journal is not None
        assert tracker._journal.replayed == 4 * len(sink.forgotten)


@pytest.mark.parametrize("at", range(2, 13))
def test_forgotten_while_an_earlier_life_is_recovered(tmp_path: Path, trackers: Trackers, at: int) -> None:
    """The same, when the windows are an earlier life's and the database forgets in the middle of the recovery."""
    for back_to in range(1, at):
        digits, journal = Digits(), tmp_path / f"{back_to}"
        leave_windows(trackers, digits, journal)
        sink = ForgetfulSink(at, back_to)
        tracker = trackers(sink, journal=journal, flush_interval=600)
        tracker.flush(PATIENCE)
        tracker.close()
        assert len(sink.forgotten) == at - 1 - back_to
        assert digits.read(sink.sums).exact, (at, back_to)


@pytest.mark.parametrize("back_to", range(1, 6))
def test_forgotten_once_the_process_is_gone(tmp_path: Path, trackers: Trackers, back_to: int) -> None:
    """The database goes back between two processes, three times: each time the next one gives it everything again."""
    digits, sink = Digits(), ForgetfulSink()
    for _ in range(3):
        tracker = trackers(sink, journal=tmp_path, max_batch_size=4, flush_interval=600)
        tracker.flush(PATIENCE)
        sink.back_to = len(sink.batches) + back_to
        calls(tracker, digits, 20)
        tracker.flush(PATIENCE)
        tracker.close()
        assert digits.read(sink.sums).exact
        sink.forget()
    tracker = trackers(sink, journal=tmp_path)
    tracker.flush(PATIENCE)
    tracker.close()
    assert digits.read(sink.sums).exact


def test_registration_that_is_forgotten(tmp_path: Path, trackers: Trackers, caplog: pytest.LogCaptureFixture) -> None:
    """The ledger does not know an earlier life that it had registered: nothing is guessed. It is told, the files stay."""
    digits, sink = Digits(), MemorySink()
    tracker = trackers(sink, journal=tmp_path, flush_interval=600)
    calls(tracker, digits)
    tracker.flush(PATIENCE)
    tracker.close()
    kept = {path.name for path in tmp_path.glob("*.journal")}
    sink.ledger.clear()  # and the rows are there: applied again they would be doubled
    tracker = trackers(sink, journal=tmp_path, flush_interval=600)
    calls(tracker, digits)
    tracker.flush(PATIENCE)
    tracker.close()
    assert digits.read({thread_id: row.total_tokens for thread_id, row in sink.rows.items()}).exact
    assert len(told(caplog, "journal_set_aside")) == 1
    assert kept <= {path.name for path in tmp_path.glob("*.journal")}


# -- what is not kept --------------------------------------------------------------------------------


def test_windows_not_kept_are_reported(tmp_path: Path, trackers: Trackers, caplog: pytest.LogCaptureFixture) -> None:
    """With retention passed the missing batches are told, by sequence, and the rest is exact: nothing is guessed."""
    digits, sink = Digits(), ForgetfulSink(at=10, back_to=3)
    tracker = trackers(sink, journal=tmp_path, journal_retain=0, flush_interval=600)
    for _ in range(12):
        calls(tracker, digits)
        tracker.flush(PATIENCE)
    tracker.close()
    verdict = digits.read(sink.sums)
    assert verdict.doubled == []
    # Of the windows 4 to 9 the newest alone was kept; the tenth is the batch in hand.
    assert [batch.sequence for batch in sink.forgotten] == [4, 5, 6, 7, 8, 9]
    lost = digits_of([{delta.thread_id: delta.tokens for delta in batch.deltas} for batch in sink.forgotten[:-1]])
    assert sorted(verdict.missing) == sorted(lost)
    [missing] = told(caplog, "batches_missing")
    assert (missing["first"], missing["last"], missing["batches"], missing["forgotten"]) == (4, 8, 5, True)
    assert [each["first"] for each in told(caplog, "applied_again")] == [9]


def test_quota_that_keeps_some(tmp_path: Path, trackers: Trackers, caplog: pytest.LogCaptureFixture) -> None:
    """What is applied and kept takes a quarter of the quota: the newest are given back, the older ones reported."""
    digits, sink = Digits(), ForgetfulSink(at=30, back_to=1)
    tracker = trackers(sink, journal=tmp_path, journal_quota=8 << 20, flush_interval=600)
    agent = "a" * 500
    for window in range(30):
        for i in range(300):
            thread_id = f"{'t' * 400}-{window}-{i}"
            assert tracker.record_turn(thread_id, agent, digits.tokens(thread_id))
        tracker.flush(PATIENCE)
    tracker.close()
    verdict = digits.read(sink.sums)
    assert verdict.doubled == []
    [missing] = told(caplog, "batches_missing")
    assert missing["first"] == 2
    assert len(verdict.missing) == 300 * missing["batches"] > 0
    assert tracker._journal is not None
    assert tracker._journal.replayed == 300 * 28 - len(verdict.missing) > 0
    assert not tracker._journal.degraded
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 8 << 20


def test_kept_window_that_cannot_be_read(tmp_path: Path, trackers: Trackers, caplog: pytest.LogCaptureFixture) -> None:
    """A kept file that is damaged is told and reported as missing; it holds up neither what follows nor new calls."""
    digits, sink = Digits(), ForgetfulSink(at=6, back_to=2)
    tracker = trackers(sink, journal=tmp_path, journal_sync=0, flush_interval=600)
    for window in range(8):
        calls(tracker, digits)
        if window == 5:
            [path] = tmp_path.glob("*-0000000000000004-0000.journal")
            data = bytearray(path.read_bytes())
            data[200] ^= 1
            path.write_bytes(data)
        tracker.flush(PATIENCE)
    tracker.close()
    verdict = digits.read(sink.sums)
    assert verdict.doubled == []
    assert sorted(verdict.missing) == sorted((f"t-{i}", 3) for i in range(10))
    assert [(each["first"], each["last"]) for each in told(caplog, "batches_missing")] == [(4, 4)]
    assert len(told(caplog, "journal_unreadable")) >= 1


@pytest.mark.parametrize("windows", [1, 3])
def test_ledger_row_that_was_collected(database: str, tmp_path: Path, trackers: Trackers, windows: int) -> None:
    """A day after a clean close the ledger's row is collected: what the journal still keeps of that life is not doubled."""
    digits = Digits()
    tracker = trackers(database, journal=tmp_path, flush_interval=600)
    for _ in range(windows):
        calls(tracker, digits)
        tracker.flush(PATIENCE)
    tracker.close()
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("UPDATE tracker_ledger SET closed_at = now() - interval '2 days'")
    for _ in range(2):
        tracker = trackers(database, journal=tmp_path, flush_interval=600)
        calls(tracker, digits)
        tracker.flush(PATIENCE)
        tracker.close()
    assert digits.read(sums(database)).exact
