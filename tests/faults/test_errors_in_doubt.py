"""Errors that may be about the table or about one row of it, as triggers make them without RAISE.

Held and told while nothing goes through; else the row is set aside like any other bad one. Nothing is dropped.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from tests.faults.harness import Errors, tracking
from tests.faults.proxy import Cut, FaultProxy
from tests.helpers import PATIENCE
from tracker_daemon.batch import Batch
from tracker_daemon.delta import ThreadDelta
from tracker_daemon.postgres.apart import Apart
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.sink import PostgresSink
from tracker_daemon.sink import Applied, SinkFault

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import psycopg
    from prometheus_client import CollectorRegistry

NOW = 1_700_000_000_000_000
COPY, ARRAYS = 1, 10**9
QUICK_TRIES = 3
# What a trigger does for a row, and the SQLSTATE and the kind that come of it.
FAULTS = {
    "column that is missing": ("NEW.turn_count := (SELECT gone FROM conversations LIMIT 1);", "42703", "schema"),
    "function that is missing": ("PERFORM gone(NEW.thread_id);", "42883", "schema"),
    "bad SQL": ("EXECUTE 'SELEC 1';", "42601", "schema"),
    "transaction control": ("EXECUTE 'COMMIT';", "0A000", "schema"),
    "sequence not begun": ("PERFORM currval('numbers');", "55000", "other"),
    "no RETURN": ("IF true THEN NULL; ELSE RETURN NEW; END IF;", "2F005", "other"),
}
FORMS = pytest.mark.parametrize("copy_from", [COPY, ARRAYS], ids=["copy", "arrays"])
KINDS = pytest.mark.parametrize("name", ["column that is missing", "no RETURN"])


def break_for(admin: psycopg.Connection[Any], condition: str, statement: str) -> None:
    """Have the table's trigger execute *statement* for the rows of *condition*; it always returns the others."""
    otherwise = "RETURN NEW;" if "ELSE RETURN" not in statement else f"IF NOT ({condition}) THEN RETURN NEW; END IF;"
    body = f"BEGIN IF {condition} THEN {statement} END IF; {otherwise} END"
    admin.execute(f"CREATE OR REPLACE FUNCTION act() RETURNS trigger LANGUAGE plpgsql AS $$ {body} $$")  # type: ignore[call-overload]
    admin.execute("CREATE SEQUENCE IF NOT EXISTS numbers")
    admin.execute(
        "CREATE OR REPLACE TRIGGER act BEFORE INSERT OR UPDATE ON conversations FOR EACH ROW EXECUTE FUNCTION act()"
    )


def mend(admin: psycopg.Connection[Any]) -> None:
    """Take the trigger away."""
    admin.execute("DROP TRIGGER act ON conversations")


def rows(admin: psycopg.Connection[Any]) -> dict[str, int]:
    """Return tokens by thread, without the closing call of `tracking`."""
    found = admin.execute("SELECT thread_id, total_tokens FROM conversations").fetchall()
    return {thread_id: tokens for thread_id, tokens in found if thread_id != "afterwards"}


def letters(admin: psycopg.Connection[Any]) -> list[tuple[str, str]]:
    """Return thread and SQLSTATE of every dead letter."""
    return admin.execute("SELECT thread_id, sqlstate FROM tracker_dead_letters ORDER BY thread_id").fetchall()


def turn(thread_id: str, tokens: int = 1) -> ThreadDelta:
    """Return a delta of one turn."""
    delta = ThreadDelta(thread_id, NOW)
    delta.turn("agent", tokens, 0, NOW)
    return delta


class Life:
    """One producer and its sink: sends batches by hand, so that each try is one call.

    Attributes:
        did: merges under a savepoint, and statements by which rows went one by one in the server.
    """

    def __init__(self, conninfo: str, table: tuple[str | None, str] = (None, "conversations"), **options: Any) -> None:
        self.sink = PostgresSink(Connector(conninfo), table, **options)
        self.runner = asyncio.Runner()
        self.producer = uuid4()
        self.opened = self.runner.run(self.sink.open(self.producer, 0))
        self.did = Counter[str]()
        self._merge = self.sink._merge_under_savepoint
        self.sink._merge_under_savepoint = self._counted  # type: ignore[method-assign]

    async def _counted(self, *arguments: Any) -> tuple[int, int]:
        self.did["merges"] += 1
        return await self._merge(*arguments)

    def batch(self, *threads: str, sequence: int = 1) -> Batch:
        """Return a batch of one turn for each thread."""
        return Batch(self.producer, 0, self.opened.epoch, sequence, tuple(map(turn, threads)))

    def send(self, batch: Batch) -> Applied | SinkFault:
        """Apply, once; return how it went."""
        try:
            return self.runner.run(self.sink.apply(batch))
        except SinkFault as fault:
            return fault

    def fail(self, batch: Batch, kind: str, times: int = QUICK_TRIES) -> None:
        """Apply so many times; each fails by an error of *kind*."""
        for _ in range(times):
            found = self.send(batch)
            assert isinstance(found, SinkFault), found
            assert found.kind == kind, found

    def send_on(self, batch: Batch, kind: str) -> Applied:
        """Apply until it goes through: of many rows a few are looked at first, at random, and others at the next try."""
        for _ in range(100):
            found = self.send(batch)
            if isinstance(found, Applied):
                return found
            assert found.kind == kind, found
        raise AssertionError("it did not go through in 100 tries")


@contextmanager
def life(conninfo: str, **options: Any) -> Iterator[Life]:
    """Make a life, and end it."""
    made = Life(conninfo, **options)
    one_by_one = Apart._one_by_one

    async def counted(self: Apart, part: list[ThreadDelta]) -> Any:
        made.did["in server"] += 1
        return await one_by_one(self, part)

    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Apart, "_one_by_one", counted)
            yield made
    finally:
        made.runner.run(made.sink.aclose(made.producer, 0, clean=False))
        made.runner.close()


GOOD = [f"t-{i}" for i in range(299)]


@FORMS
@pytest.mark.parametrize("name", FAULTS)
def test_one_row_of_many(database: str, admin: psycopg.Connection[Any], name: str, copy_from: int) -> None:
    """Three tries fail whole; the fourth sets the one row aside with its SQLSTATE, and the other 299 commit with it."""
    statement, state, kind = FAULTS[name]
    break_for(admin, "NEW.thread_id = 'bad'", statement)
    with life(database, copy_from=copy_from) as one:
        batch = one.batch(*GOOD, "bad")
        one.fail(batch, kind)
        assert rows(admin) == {}
        assert one.did["merges"] == 0
        found = one.send(batch)
        assert isinstance(found, Applied)
        assert (found.rows, found.skipped, found.duplicate) == (299, 0, False)
        [letter] = found.dead_letters
        assert (letter.delta.thread_id, letter.sqlstate, letter.reason) == ("bad", state, "data")
        assert letter.error
        assert letters(admin) == [("bad", state)]
        assert rows(admin) == dict.fromkeys(GOOD, 1)
        # The next batch begins anew.
        following = one.batch("bad", "t-0", sequence=2)
        one.fail(following, kind)
        assert isinstance(one.send(following), Applied)
    assert rows(admin)["t-0"] == 2


def test_through_the_tracker(
    database: str, admin: psycopg.Connection[Any], errors: Errors, registry: CollectorRegistry
) -> None:
    """The tracker is told of three failures, then of nothing more: all others are applied, the one is counted."""
    break_for(admin, "NEW.thread_id = 'bad'", FAULTS["no RETURN"][0])
    with tracking(database, errors, registry, flush_interval=0.1) as tracker:
        for thread_id in (*GOOD, "bad"):
            assert tracker.record_turn(thread_id, "agent", 1)
        tracker.flush(PATIENCE)
    assert [getattr(error, "kind", None) for error in errors.seen] == ["other"] * QUICK_TRIES
    assert registry.get_sample_value("tracker_calls_dead_lettered_total", {"reason": "data"}) == 1
    assert letters(admin) == [("bad", "2F005")]
    assert rows(admin) == dict.fromkeys(GOOD, 1)


@FORMS
@KINDS
def test_every_row(database: str, admin: psycopg.Connection[Any], name: str, copy_from: int) -> None:
    """When nothing goes through the table is at fault: the batch is held, at a bounded cost, until that is mended."""
    statement, state, kind = FAULTS[name]
    break_for(admin, "true", statement)
    with life(database, copy_from=copy_from) as one:
        batch = one.batch(*GOOD)
        one.fail(batch, kind, times=8)
        assert one.did["merges"] == 5 * 16
        fault = one.send(batch)
        assert isinstance(fault, SinkFault)
        assert state in fault.message
        assert letters(admin) == []
        [sequence] = admin.execute("SELECT applied_sequence FROM tracker_ledger").fetchall()
        assert sequence == (0,)
        mend(admin)
        assert one.send(batch) == Applied(rows=299)
    assert rows(admin) == dict.fromkeys(GOOD, 1)
    assert letters(admin) == []


@KINDS
def test_alone_in_its_batch(database: str, admin: psycopg.Connection[Any], name: str) -> None:
    """A row that fails alone, with nothing behind it, cannot be told from a table at fault: it is held and told."""
    statement, _, kind = FAULTS[name]
    break_for(admin, "NEW.thread_id = 'bad'", statement)
    with life(database) as one:
        assert one.send(one.batch("t-0")) == Applied(rows=1)  # that the table worked is no proof that it does
        batch = one.batch("bad", sequence=2)
        one.fail(batch, kind, times=12)
        assert letters(admin) == []
        mend(admin)
        assert one.send(batch) == Applied(rows=1)
    assert rows(admin) == {"t-0": 1, "bad": 1}
    assert letters(admin) == []


@pytest.mark.parametrize("journal", [False, True], ids=["memory", "journal"])
def test_what_waits_behind_it_proves_the_table(
    database: str,
    admin: psycopg.Connection[Any],
    errors: Errors,
    registry: CollectorRegistry,
    tmp_path: Path,
    *,
    journal: bool,
) -> None:
    """A row alone in its batch is held while nothing else comes; the first good call behind it frees both."""
    break_for(admin, "NEW.thread_id = 'bad'", FAULTS["function that is missing"][0])
    with tracking(database, errors, registry, journal=tmp_path / "j" if journal else None) as tracker:
        assert tracker.record_turn("bad", "agent", 1)
        errors.wait_for_kind("schema", QUICK_TRIES + 1)
        assert letters(admin) == []
        assert tracker.record_turn("good", "agent", 1)
        tracker.flush(PATIENCE)
        assert letters(admin) == [("bad", "42883")]
        assert rows(admin) == {"good": 1}
    assert tracker.stats().dead_lettered == 1


def test_a_table_at_fault_with_calls_behind(
    database: str, admin: psycopg.Connection[Any], errors: Errors, registry: CollectorRegistry
) -> None:
    """Where what waits behind fails as well, nothing is set aside, and all of it is written once the table is mended."""
    break_for(admin, "true", FAULTS["function that is missing"][0])
    with tracking(database, errors, registry) as tracker:
        assert tracker.record_turn("t-0", "agent", 1)
        errors.wait_for_kind("schema")
        for thread_id in GOOD[1:]:
            assert tracker.record_turn(thread_id, "agent", 1)
        errors.wait_for_kind("schema", QUICK_TRIES + 2)
        mend(admin)
    assert letters(admin) == []
    assert rows(admin) == dict.fromkeys(GOOD, 1)


def test_trying_what_waits_leaves_nothing(database: str, admin: psycopg.Connection[Any]) -> None:
    """The row that proves the table is rolled back: it is written by its own batch alone."""
    break_for(admin, "NEW.thread_id = 'bad'", FAULTS["bad SQL"][0])
    with life(database) as one:
        batch, later = one.batch("bad"), one.batch("good", sequence=2)
        one.sink.following = lambda _: later.deltas
        one.fail(batch, "schema")
        found = one.send(batch)
        assert isinstance(found, Applied)
        assert (found.rows, len(found.dead_letters)) == (0, 1)
        assert rows(admin) == {}
        assert one.send(later) == Applied(rows=1)
    assert rows(admin) == {"good": 1}


def test_rows_that_are_only_skipped_prove_nothing(database: str, admin: psycopg.Connection[Any]) -> None:
    """With `create_missing=False` a row that is left alone did not go through."""
    admin.execute("INSERT INTO conversations (thread_id, total_tokens) VALUES ('bad', 0), ('good', 0)")
    break_for(admin, "NEW.thread_id = 'bad'", FAULTS["no RETURN"][0])
    with life(database) as one:
        held = replace(one.batch("bad", *GOOD), create_missing=False)
        one.fail(held, "other", times=10)
        assert letters(admin) == []
        mend(admin)
        assert one.send(held) == Applied(rows=1, skipped=299)
        break_for(admin, "NEW.thread_id = 'bad'", FAULTS["no RETURN"][0])
        proven = replace(one.batch("bad", "good", *GOOD, sequence=2), create_missing=False)
        one.fail(proven, "other")
        found = one.send_on(proven, "other")
        assert (found.rows, found.skipped, len(found.dead_letters)) == (1, 299, 1)
    assert rows(admin) == {"bad": 1, "good": 1}


def test_beside_rows_that_are_bad(database: str, admin: psycopg.Connection[Any]) -> None:
    """A row that violates a CHECK and one in doubt: both are set aside beside a good one, neither without."""
    admin.execute("ALTER TABLE conversations ADD CHECK (thread_id <> 'refused')")
    break_for(admin, "NEW.thread_id = 'bad'", FAULTS["bad SQL"][0])
    with life(database) as one:
        batch = one.batch("refused", "bad", "good")
        one.fail(batch, "schema")
        assert isinstance(one.send(batch), Applied)
        assert letters(admin) == [("bad", "42601"), ("refused", "23514")]
        assert rows(admin) == {"good": 1}
        one.fail(one.batch("refused", "bad", sequence=2), "schema", times=8)
    assert len(letters(admin)) == 2


def test_more_bad_rows_than_good(database: str, admin: psycopg.Connection[Any]) -> None:
    """One row in ten is good: it is found within a few tries, and the nine are set aside."""
    break_for(admin, "NEW.thread_id NOT LIKE '%0'", FAULTS["no RETURN"][0])
    with life(database) as one:
        batch = one.batch(*(f"t-{i}" for i in range(200)))
        one.fail(batch, "other")
        found = one.send_on(batch, "other")
        assert (found.rows, len(found.dead_letters)) == (20, 180)
    assert rows(admin).keys() == {f"t-{i}" for i in range(0, 200, 10)}


def test_costs_two_log_n(database: str, admin: psycopg.Connection[Any]) -> None:
    """One row in doubt among 1,024 is found with 2·log2(n)+1 merges, and one or two to see that others go through."""
    break_for(admin, "NEW.thread_id = 't-500'", FAULTS["function that is missing"][0])
    with life(database) as one:
        batch = one.batch(*(f"t-{i}" for i in range(1_024)))
        one.fail(batch, "schema")
        assert one.did["merges"] == 0
        assert isinstance(one.send(batch), Applied)
        assert 12 <= one.did["merges"] <= 2 * 10 + 1 + 2
    assert letters(admin) == [("t-500", "42883")]


def test_only_tries_on_a_sound_connection_count(admin: psycopg.Connection[Any], proxy: FaultProxy) -> None:
    """A connection that is lost says nothing about the rows, however often."""
    break_for(admin, "NEW.thread_id = 'bad'", FAULTS["no RETURN"][0])
    with life(proxy.conninfo) as one:
        batch = one.batch("bad", "good")
        for kind in ("connection", "other") * QUICK_TRIES:
            if kind == "connection":
                proxy.arm(Cut("client", 1, contains=b"INSERT INTO"))
            one.fail(batch, kind, times=1)
        proxy.disarm()
        assert one.did["merges"] == 0
        assert isinstance(one.send(batch), Applied)
    assert letters(admin) == [("bad", "2F005")]


def test_answer_lost(admin: psycopg.Connection[Any], proxy: FaultProxy) -> None:
    """The commit with the letter is done and its answer lost: the next try finds both, and tells the same letter."""
    break_for(admin, "NEW.thread_id = 'bad'", FAULTS["column that is missing"][0])
    with life(proxy.conninfo) as one:
        batch = one.batch("bad", "good")
        one.fail(batch, "schema")
        proxy.arm(Cut("server", 1, kind="C", contains=b"COMMIT"))
        one.fail(batch, "connection", times=1)
        assert proxy.fired
        proxy.disarm()
        found = one.send(batch)
        assert isinstance(found, Applied)
        assert found.duplicate
        [letter] = found.dead_letters
        assert (letter.delta.thread_id, letter.sqlstate, letter.reason) == ("bad", "42703", "data")
    assert letters(admin) == [("bad", "42703")]
    assert rows(admin) == {"good": 1}
