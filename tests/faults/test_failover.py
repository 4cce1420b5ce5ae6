"""Databases that forget commits, and producers that are replaced: seen, counted, and neither lost nor doubled beyond it.

What a database has forgotten is not ours to give back without a journal. What is promised here: the digits missing
are exactly those of the batches that it forgot, nothing is doubled, and the batch in hand and all later ones count once.
"""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any
from uuid import UUID

import anyio
import psycopg
import pytest

from tests.conftest import run_migrate
from tests.digits import Digits
from tests.faults.harness import Errors, outcome, sums, tracking
from tests.faults.proxy import Blackhole, Cut, FaultProxy, Refuse
from tests.faults.servers import (
    Recording,
    Stream,
    catch_up,
    cut_off,
    folder_for_servers,
    promote,
    server,
    standby_of,
)
from tests.helpers import PATIENCE, ledger, query, wait_until
from tracker_daemon import DrainReport, Fenced, Tracker
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.sink import PostgresSink
from tracker_daemon.sink import LedgerMissing, LedgerRegressed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from prometheus_client import CollectorRegistry

    from tracker_daemon.embedded import EmbeddedPostgres


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for servers."""
    with folder_for_servers() as made:
        yield made


@contextmanager
def primary_and_standby(folder: Path) -> Iterator[tuple[EmbeddedPostgres, EmbeddedPostgres]]:
    """Run the two, with the tables."""
    with server(folder / "primary", fsync="off", shared_buffers="16MB") as primary:
        run_migrate(primary.conninfo)
        with standby_of(primary, folder / "standby") as standby:
            yield primary, standby


def sink_of(conninfo: str, timeout: float = 30.0) -> PostgresSink:
    """Return a sink for the tables there."""
    return PostgresSink(Connector(conninfo), (None, "conversations"), statement_timeout=timeout)


def flush_calls(tracker: Tracker, digits: Digits, batches: int, threads: int = 10) -> None:
    """Make as many batches, on threads that last."""
    for _ in range(batches):
        with tracker._backlog.lock:  # the worker sees all of them at once: each is one batch, on a slow machine too
            for i in range(threads):
                assert tracker.record_turn(f"t-{i}", "agent", digits.tokens(f"t-{i}"))
        tracker.flush(PATIENCE)


def digits_of(batches: list[dict[str, int]]) -> Counter[tuple[str, int]]:
    """Return the calls that *batches* hold: thread and number."""
    calls: Counter[tuple[str, int]] = Counter()
    for batch in batches:
        for thread_id, tokens in batch.items():
            rest, number = tokens, 0
            while rest:
                rest, digit = divmod(rest, 4)
                calls[thread_id, number] += digit
                number += 1
    return +calls


def regressions(errors: Errors) -> list[LedgerRegressed]:
    """Return what was told of them."""
    return [error for error in errors.seen if isinstance(error, LedgerRegressed)]


def check(
    conninfo: str,
    digits: Digits,
    sink: Recording,
    errors: Errors,
    registry: CollectorRegistry,
    caplog: pytest.LogCaptureFixture,
) -> int:
    """Assert that only the batches that the ledger says were forgotten are missing; return how many those are.

    The database may have gone back several times, to the same instant.
    """
    told = regressions(errors)
    assert registry.get_sample_value("tracker_ledger_regressions_total") == len(told) >= 1
    assert sum("database_forgot_commits" in record.getMessage() for record in caplog.records) == len(told)
    [found] = {error.found for error in told}
    epochs = [opened.epoch for opened in sink.opened]
    assert epochs == sorted(set(epochs)), "an epoch was given twice"
    # Each time it is asked where it stands, then moved on to right before the batch in hand, which is told.
    expected = [error.expected for error in told]
    assert [opened.applied_sequence for opened in sink.opened] == [0] + [n for last in expected for n in (found, last)]
    assert [opened.applied_sequence for opened in sink.moved_on] == expected
    lines = [record.tracker for record in caplog.records if "batches_missing" in record.getMessage()]  # type: ignore[attr-defined]
    fields = [(line["first"], line["last"], line["batches"], line["forgotten"]) for line in lines]
    assert fields == [(found + 1, last, last - found, True) for last in expected]
    sequences = [sequence for _, sequence in sink.acknowledged]
    assert len(sequences) == len(set(sequences)), "a sequence was given twice"
    forgotten = sink.forgotten(found)
    assert len(forgotten) == expected[-1] - found
    verdict = digits.read(sums(conninfo))
    assert verdict.doubled == []
    missing = digits_of(forgotten)
    missing.pop(("afterwards", 0), None)
    assert sorted(verdict.missing) == sorted(missing)
    assert set(missing.values()) <= {1}
    return len(forgotten)


# -- a standby that lagged -------------------------------------------------------------------------


@pytest.mark.parametrize("in_hand", ["not sent", "committed, answer lost"])
def test_failover_to_a_standby_that_lagged(
    folder: Path, errors: Errors, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture, in_hand: str
) -> None:
    """An asynchronous standby is promoted without the last commits: those are missing, and nothing else is wrong."""
    digits = Digits()
    with primary_and_standby(folder) as (primary, standby), FaultProxy(primary.conninfo) as proxy:
        sink = Recording(sink_of(proxy.conninfo))
        with tracking(sink, errors, registry) as tracker:
            flush_calls(tracker, digits, 6)
            catch_up(primary, standby)
            cut_off(standby)
            flush_calls(tracker, digits, 5)  # that the standby does not have
            if in_hand == "committed, answer lost":
                # The commit is on the primary alone, and nobody knows: the batch goes again, to whoever is there.
                proxy.redirect("host=127.0.0.1 port=1 user=postgres dbname=postgres")
                proxy.arm(Cut("server", 1, kind="C", contains=b"SELECT 1"))
            else:
                primary.stop("immediate")
            for i in range(10):
                assert tracker.record_turn(f"t-{i}", "agent", digits.tokens(f"t-{i}"))
            errors.wait_for(lambda _: True)
            if primary.running:
                assert proxy.fired
                primary.stop("immediate")
            promote(standby)
            proxy.redirect(standby.conninfo)
            flush_calls(tracker, digits, 5)
        assert check(standby.conninfo, digits, sink, errors, registry, caplog) == 5
        assert outcome(registry, "duplicate") == 0
        assert ledger(standby.conninfo)[-1][1] == 3  # opened anew, and moved on


def test_failover_that_forgot_the_producer(folder: Path, errors: Errors, registry: CollectorRegistry) -> None:
    """The new primary does not know this producer at all: whether the batch in hand is there is not guessed."""
    digits = Digits()
    with primary_and_standby(folder) as (primary, standby), FaultProxy(primary.conninfo) as proxy:
        catch_up(primary, standby)
        cut_off(standby)
        tracker = Tracker(sink_of(proxy.conninfo), on_error=errors, registry=registry, flush_interval=0.01)
        flush_calls(tracker, digits, 2)
        primary.stop("immediate")
        promote(standby)
        proxy.redirect(standby.conninfo)
        assert tracker.record_turn("t-0", "agent", digits.tokens("t-0"))
        errors.wait_for(lambda error: isinstance(error, LedgerMissing))
        assert registry.get_sample_value("tracker_fenced") == 1
        report = tracker.close(5)
        assert (report.applied, report.lost) == (0, 1)
        assert registry.get_sample_value("tracker_calls_lost_total", {"reason": "halted"}) == 1
        assert sums(standby.conninfo) == {}
        assert ledger(standby.conninfo) == []


def test_failover_that_has_the_batch_in_hand(folder: Path, errors: Errors, registry: CollectorRegistry) -> None:
    """The standby has the commit whose answer was lost with the primary: it is found there, and not counted again."""
    digits = Digits()
    with primary_and_standby(folder) as (primary, standby), FaultProxy(primary.conninfo) as proxy:
        with tracking(sink_of(proxy.conninfo), errors, registry) as tracker:
            flush_calls(tracker, digits, 3)
            proxy.redirect("host=127.0.0.1 port=1 user=postgres dbname=postgres")
            proxy.arm(Cut("server", 1, kind="C", contains=b"SELECT 1"))
            for i in range(10):
                assert tracker.record_turn(f"t-{i}", "agent", digits.tokens(f"t-{i}"))
            errors.wait_for(lambda _: True)
            assert proxy.fired
            catch_up(primary, standby)
            primary.stop("immediate")
            promote(standby)
            proxy.redirect(standby.conninfo)
            flush_calls(tracker, digits, 3)
        assert outcome(registry, "duplicate") == 1
        assert regressions(errors) == []
        assert digits.read(sums(standby.conninfo)).exact


def test_primary_and_standby_in_one_conninfo(folder: Path, errors: Errors, registry: CollectorRegistry) -> None:
    """With both servers named, the tracker finds the primary behind the standby, and the new one after the failover."""
    digits = Digits()
    with primary_and_standby(folder) as (primary, standby):
        ports = f"{standby.port},{primary.port}"
        conninfo = f"host=127.0.0.1,127.0.0.1 port={ports} user=postgres dbname=postgres"
        with tracking(conninfo, errors, registry) as tracker, Stream(tracker, digits) as stream:
            stream.more()
            tracker.flush(PATIENCE)
            assert errors.seen == []
            [(walsenders,)] = query(primary.conninfo, "SELECT count(*) FROM pg_stat_replication")
            assert walsenders == 1
            primary.stop("fast")  # which waits until the standby has everything
            stream.more()
            # The standby alone is left: it is refused for being read-only, and nothing is written to it.
            errors.wait_for_kind("readonly")
            assert query(standby.conninfo, "SELECT pg_is_in_recovery()") == [(True,)]
            promote(standby)
            stream.more()
            tracker.flush(PATIENCE)
        assert regressions(errors) == []
        assert digits.read(sums(standby.conninfo)).exact


def test_synchronous_failover_under_load(folder: Path, errors: Errors, registry: CollectorRegistry) -> None:
    """With a synchronous standby nothing is forgotten: a failover in the middle of the stream is exact."""
    digits = Digits()
    with primary_and_standby(folder) as (primary, standby), FaultProxy(primary.conninfo) as proxy:
        with psycopg.connect(primary.conninfo, autocommit=True) as admin:
            admin.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            admin.execute("SELECT pg_reload_conf()")
        synchronous = "SELECT sync_state FROM pg_stat_replication"
        wait_until(lambda: query(primary.conninfo, synchronous) == [("sync",)], "a synchronous standby")
        with tracking(sink_of(proxy.conninfo), errors, registry) as tracker, Stream(tracker, digits) as stream:
            stream.more(200)
            primary.stop("immediate")
            stream.more(200)
            errors.wait_for_kind("connection")
            promote(standby)
            proxy.redirect(standby.conninfo)
            stream.more(200)
            tracker.flush(PATIENCE)
        assert regressions(errors) == []
        assert registry.get_sample_value("tracker_ledger_regressions_total") == 0
        assert digits.read(sums(standby.conninfo)).exact


# -- one server that forgets -----------------------------------------------------------------------


def test_restored_backup(
    folder: Path, errors: Errors, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    """A backup is put in the place of the database, twice: what was committed after it is missing, and that is all."""
    digits = Digits()
    with server(folder / "pg", fsync="off") as postgres:
        run_migrate(postgres.conninfo)
        sink = Recording(sink_of(postgres.conninfo))
        with tracking(sink, errors, registry) as tracker:
            flush_calls(tracker, digits, 4)
            postgres.stop()
            copy(folder / "pg" / "data", folder / "backup")
            postgres.start()
            with Stream(tracker, digits) as stream:
                for times in (1, 2):
                    flush_calls(tracker, digits, 4)
                    postgres.stop("immediate")
                    shutil.rmtree(folder / "pg" / "data")
                    if times == 1:
                        copy(folder / "backup", folder / "pg" / "data")
                    else:
                        (folder / "backup").rename(folder / "pg" / "data")
                    stream.more()
                    postgres.start()
                    stream.more()
                    tracker.flush(PATIENCE)
                    # The second time the database forgets the opening that followed the first.
                    assert len(regressions(errors)) == times
            flush_calls(tracker, digits, 4)
        assert check(postgres.conninfo, digits, sink, errors, registry, caplog) >= 8


def copy(source: Path, target: Path) -> None:
    """Copy a cluster, owners and all."""
    subprocess.run(["cp", "-a", str(source), str(target)], check=True)


def test_commits_that_were_not_on_the_disk(
    folder: Path, errors: Errors, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    """`synchronous_commit=off` and a crash: the ledger went back as far as the data did, so both are seen to."""
    digits = Digits()
    with server(folder / "pg", synchronous_commit="off", wal_writer_delay="10s", fsync="off") as postgres:
        run_migrate(postgres.conninfo)
        sink = Recording(sink_of(postgres.conninfo))
        with tracking(sink, errors, registry) as tracker:
            flush_calls(tracker, digits, 2)
            with psycopg.connect(postgres.conninfo, autocommit=True) as admin:
                admin.execute("CHECKPOINT")  # the beginning is on the disk
            while not regressions(errors):
                # The log's writer may come by at any time: not every crash loses something.
                flush_calls(tracker, digits, 2)
                postgres.restart("immediate")
                flush_calls(tracker, digits, 1)
        assert check(postgres.conninfo, digits, sink, errors, registry, caplog) >= 1


# -- forgotten while nothing was pending -----------------------------------------------------------


@pytest.mark.parametrize("backup", ["of some batches", "of before the first"])
def test_restored_backup_found_at_close(
    folder: Path, errors: Errors, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture, backup: str
) -> None:
    """A backup is put in the place of the database behind an idle tracker: its close connects again, and tells."""
    digits = Digits()
    with server(folder / "pg", fsync="off") as postgres:
        run_migrate(postgres.conninfo)
        tracker = Tracker(postgres.conninfo, on_error=errors, registry=registry, flush_interval=0.01)
        flush_calls(tracker, digits, 4 if backup == "of some batches" else 0)
        postgres.stop()
        copy(folder / "pg" / "data", folder / "backup")
        postgres.start()
        found = [sequence for _, _, sequence in ledger(postgres.conninfo)]
        flush_calls(tracker, digits, 3)
        [(_, _, expected)] = ledger(postgres.conninfo)
        postgres.stop("immediate")
        shutil.rmtree(folder / "pg" / "data")
        (folder / "backup").rename(folder / "pg" / "data")
        postgres.start()
        before, stats = len(errors.seen), tracker.stats()
        assert stats.pending == 0
        assert tracker.close(PATIENCE) == DrainReport()
        [told] = errors.seen[before:]
        if found:
            assert isinstance(told, LedgerRegressed)
            assert ([told.found], told.expected) == (found, expected)
        else:
            assert isinstance(told, LedgerMissing)
        assert registry.get_sample_value("tracker_ledger_regressions_total") == len(found)
        assert sum("ledger_at_close" in record.getMessage() for record in caplog.records) == 1
        assert [sequence for _, _, sequence in ledger(postgres.conninfo)] == found


def test_close_on_a_connection_that_was_lost(
    database: str, proxy: FaultProxy, errors: Errors, registry: CollectorRegistry
) -> None:
    """A database that has kept everything gets its mark over a new connection, and nothing is told."""
    tracker = Tracker(proxy.conninfo, on_error=errors, registry=registry, flush_interval=0.01)
    flush_calls(tracker, Digits(), 2)
    assert proxy.sever_all() == 1
    tracker.close(PATIENCE)
    assert errors.seen == []
    assert query(database, "SELECT closed_at IS NOT NULL FROM tracker_ledger") == [(True,)]


@pytest.mark.parametrize(
    ("away", "timeout", "most"),
    [("refuses", 30.0, 1.5), ("silent", 30.0, 5.0), ("silent", 0.5, 1.5), ("deaf later", 30.0, 5.0)],
)
def test_close_while_the_server_is_away(
    proxy: FaultProxy, errors: Errors, registry: CollectorRegistry, away: str, timeout: float, most: float
) -> None:
    """With nothing pending, a server that is away costs the close two seconds at most, and nothing is told."""
    tracker = Tracker(proxy.conninfo, on_error=errors, registry=registry, flush_interval=0.01)
    flush_calls(tracker, Digits(), 2)
    if away == "refuses":
        proxy.redirect("host=127.0.0.1 port=1 user=postgres dbname=postgres")
    else:
        proxy.arm(Refuse(silent=True) if away == "silent" else Blackhole("server", 12))
    proxy.sever_all()
    began = monotonic()
    report = tracker.close(timeout)
    assert monotonic() - began < most
    assert report == DrainReport()
    assert errors.seen == []
    assert away == "refuses" or proxy.fired


# -- fenced ----------------------------------------------------------------------------------------


async def _open(conninfo: str, producer: UUID) -> int:
    sink = sink_of(conninfo)
    opened = await sink.open(producer, 0)
    await sink.aclose(producer, 0, clean=False)
    return opened.epoch


def test_fenced_by_another_life(database: str, errors: Errors, registry: CollectorRegistry) -> None:
    """Somebody opens the same producer: this one writes nothing more, says so, and counts what it cannot keep."""
    digits = Digits()
    tracker = Tracker(database, on_error=errors, registry=registry, flush_interval=0.01)
    flush_calls(tracker, digits, 3)
    before = sums(database)
    [(producer, epoch, sequence)] = ledger(database)
    assert anyio.run(_open, database, UUID(producer)) == epoch + 1
    for i in range(10):
        assert tracker.record_turn(f"t-{i}", "agent", digits.tokens(f"t-{i}"))
    errors.wait_for(lambda error: isinstance(error, Fenced))
    assert registry.get_sample_value("tracker_fenced") == 1
    wait_until(lambda: not tracker.record_turn("later", "agent", 1))  # what will never be written is refused
    report, stats = tracker.close(5), tracker.stats()
    assert (report.applied, report.lost) == (0, stats.accepted - 30)
    assert registry.get_sample_value("tracker_calls_lost_total", {"reason": "halted"}) == report.lost >= 10
    assert stats.accepted == stats.applied + stats.lost
    assert sums(database) == before
    assert ledger(database) == [(producer, epoch + 1, sequence)]


def test_fenced_while_the_batch_waits(
    database: str, admin: psycopg.Connection[Any], errors: Errors, registry: CollectorRegistry
) -> None:
    """The other life opens while our batch waits for the ledger's row: ours sees the new epoch, and writes nothing."""
    digits = Digits()
    tracker = Tracker(database, on_error=errors, registry=registry, flush_interval=0.01)
    flush_calls(tracker, digits, 1)
    before = sums(database)
    with psycopg.connect(database) as other:
        other.execute("UPDATE tracker_ledger SET epoch = epoch + 1")
        assert tracker.record_turn("t-0", "agent", digits.tokens("t-0"))
        waiting = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        wait_until(lambda: admin.execute(waiting).fetchone(), "a batch that waits")  # type: ignore[call-overload]
        other.commit()
    errors.wait_for(lambda error: isinstance(error, Fenced))
    assert tracker.close(5).lost == 1
    assert sums(database) == before


def test_flush_after_being_fenced_ends_in_time(database: str, errors: Errors, registry: CollectorRegistry) -> None:
    """A barrier that can never be reached says so at its timeout, with the reason; closing does not wait."""
    tracker = Tracker(database, on_error=errors, registry=registry, flush_interval=0.01)
    assert tracker.record_turn("a")
    tracker.flush(PATIENCE)
    [(producer, _, _)] = ledger(database)
    anyio.run(_open, database, UUID(producer))
    assert tracker.record_turn("a")
    with pytest.raises(TimeoutError, match="has replaced this one's") as caught:
        tracker.flush(1)
    assert isinstance(caught.value.__cause__, Fenced)
    assert tracker.close(60).lost == 1
