"""What the server refuses, holds up or forgets: nothing is lost, nothing doubled, and a fresh call goes through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import sql

from tests.conftest import run_migrate
from tests.faults.harness import Errors, tracking
from tracker_daemon import FlushTimeout, SchemaError, Tracker
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.dead_letters import from_json
from tracker_daemon.postgres.sink import PostgresSink
from tracker_daemon.sink import LedgerMissing, LedgerRegressed, SinkFault

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from tracker_daemon.embedded import EmbeddedPostgres


def rows(admin: psycopg.Connection[Any]) -> dict[str, tuple[int, int]]:
    """Return turns and tokens by thread, without the closing call of `tracking`."""
    found = admin.execute("SELECT thread_id, turn_count, total_tokens FROM conversations").fetchall()
    return {row[0]: (row[1], row[2]) for row in found if row[0] != "afterwards"}


def letters(admin: psycopg.Connection[Any]) -> list[tuple[str, str]]:
    """Return thread and SQLSTATE of every dead letter."""
    return admin.execute("SELECT thread_id, sqlstate FROM tracker_dead_letters ORDER BY thread_id").fetchall()


def turns(tracker: Tracker, *threads: str, tokens: int = 1) -> None:
    """One turn for each thread."""
    for thread in threads:
        assert tracker.record_turn(thread, "agent", tokens)


def test_tables_missing_then_made(empty_database: str, errors: Errors, registry: CollectorRegistry) -> None:
    """Without the tables a flush fails with what to run; once they are made it goes through without a restart."""
    with tracking(empty_database, errors, registry) as tracker:
        turns(tracker, "a")
        with pytest.raises(FlushTimeout, match="tracker-daemon migrate") as caught:
            tracker.flush(0.5)
        assert isinstance(caught.value.__cause__, SchemaError)
        assert "conversations does not exist" in str(caught.value)
        run_migrate(empty_database)
        tracker.flush(60)
    with psycopg.connect(empty_database) as connection:
        assert rows(connection) == {"a": (1, 1)}


@pytest.mark.parametrize(
    ("breaking", "mending", "named"),
    [
        ("DROP TABLE tracker_ledger", None, "tracker_ledger"),
        (
            "ALTER TABLE conversations RENAME COLUMN turn_count TO turns",
            "ALTER TABLE conversations RENAME COLUMN turns TO turn_count",
            "turn_count",
        ),
        (
            "ALTER TABLE conversations ALTER COLUMN total_tokens TYPE text",
            "ALTER TABLE conversations ALTER COLUMN total_tokens TYPE bigint USING total_tokens::bigint",
            "total_tokens is text",
        ),
        (
            "ALTER TABLE conversations DROP CONSTRAINT conversations_pkey",
            "ALTER TABLE conversations ADD PRIMARY KEY (thread_id)",
            "unique index",
        ),
    ],
)
def test_schema_broken_before_the_first_flush(
    database: str,
    admin: psycopg.Connection[Any],
    errors: Errors,
    registry: CollectorRegistry,
    breaking: Any,
    mending: Any,
    named: str,
) -> None:
    """The error names the object; after the mend the calls go through without a restart."""
    admin.execute(breaking)
    with tracking(database, errors, registry) as tracker:
        turns(tracker, "a", "b")
        errors.wait_for(lambda error: isinstance(error, SchemaError) and named in str(error))
        if mending is None:
            run_migrate(database)
        else:
            admin.execute(mending)
        tracker.flush(60)
    assert rows(admin) == {"a": (1, 1), "b": (1, 1)}


def test_schema_broken_in_the_middle(
    database: str, admin: psycopg.Connection[Any], errors: Errors, registry: CollectorRegistry
) -> None:
    """A column that goes while we write is a schema fault that names it; once it is back all of it is applied."""
    with tracking(database, errors, registry) as tracker:
        turns(tracker, "a")
        tracker.flush(30)
        admin.execute("ALTER TABLE conversations RENAME COLUMN agents_used TO gone")
        turns(tracker, "a", "b")
        errors.wait_for(lambda error: isinstance(error, SchemaError) and "agents_used is missing" in str(error))
        admin.execute("ALTER TABLE conversations RENAME COLUMN gone TO agents_used")
        tracker.flush(60)
    assert rows(admin) == {"a": (2, 2), "b": (1, 1)}


def test_permission_missing_then_granted(
    database: str, admin: psycopg.Connection[Any], errors: Errors, registry: CollectorRegistry
) -> None:
    """A role without the right to write is a schema fault that says what to grant."""
    role = sql.Identifier("writer_" + admin.info.dbname)
    admin.execute(sql.SQL("CREATE ROLE {} LOGIN").format(role))
    grant = "GRANT SELECT, INSERT, UPDATE, DELETE ON conversations, tracker_ledger, tracker_dead_letters TO {}"
    try:
        conninfo = psycopg.conninfo.make_conninfo(database, user="writer_" + admin.info.dbname)
        with tracking(conninfo, errors, registry) as tracker:
            turns(tracker, "a")
            errors.wait_for(lambda error: isinstance(error, SinkFault) and "grant" in str(error))
            admin.execute(sql.SQL(grant).format(role))
            tracker.flush(60)
        assert rows(admin) == {"a": (1, 1)}
    finally:
        admin.execute(sql.SQL("DROP OWNED BY {}").format(role))
        admin.execute(sql.SQL("DROP ROLE {}").format(role))


def test_ledger_truncated(
    database: str, admin: psycopg.Connection[Any], errors: Errors, registry: CollectorRegistry
) -> None:
    """A ledger row that is gone stops the writing: whether a batch was applied must not be guessed."""
    tracker = Tracker(database, on_error=errors, registry=registry, flush_interval=0.01)
    turns(tracker, "a")
    tracker.flush(30)
    admin.execute("TRUNCATE tracker_ledger")
    turns(tracker, "b")
    errors.wait_for(lambda error: isinstance(error, LedgerMissing))
    assert registry.get_sample_value("tracker_fenced") == 1
    report = tracker.close(5)
    assert (report.applied, report.lost) == (0, 1)
    assert registry.get_sample_value("tracker_calls_lost_total", {"reason": "halted"}) == 1
    assert rows(admin) == {"a": (1, 1)}


def test_terminated_and_cancelled_backends(
    database: str, admin: psycopg.Connection[Any], errors: Errors, registry: CollectorRegistry
) -> None:
    """Twenty times the operator ends or cancels what we run; every turn is there once."""
    with tracking(database, errors, registry) as tracker:
        for i in range(20):
            turns(tracker, f"t-{i % 3}", tokens=4**i)
            what = "pg_terminate_backend" if i % 2 else "pg_cancel_backend"
            admin.execute(
                f"SELECT {what}(pid) FROM pg_stat_activity"  # type: ignore[arg-type]
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            tracker.flush(60)
    found = rows(admin)
    assert sum(tokens for _, tokens in found.values()) == sum(4**i for i in range(20))


def test_table_locked_for_a_while(
    database: str, admin: psycopg.Connection[Any], errors: Errors, registry: CollectorRegistry
) -> None:
    """Under ACCESS EXCLUSIVE the flush gives up by its lock timeout and comes again; calls go on coalescing."""
    sink = PostgresSink(Connector(database), (None, "conversations"), statement_timeout=0.4)
    with tracking(sink, errors, registry) as tracker, psycopg.connect(database) as locker:
        turns(tracker, "a")
        tracker.flush(30)
        locker.execute("LOCK TABLE conversations IN ACCESS EXCLUSIVE MODE")
        turns(tracker, "a", "b")
        errors.wait_for_kind("lock", count=2)
        turns(tracker, "a", "c")
        assert tracker.stats().pending == 4
        locker.rollback()
        tracker.flush(60)
        assert rows(admin) == {"a": (3, 3), "b": (1, 1), "c": (1, 1)}


def test_slow_server_gets_more_time(
    database: str, admin: psycopg.Connection[Any], errors: Errors, registry: CollectorRegistry
) -> None:
    """A flush that needs longer than the statement timeout comes again with twice the time until it goes through."""
    admin.execute(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.5); RETURN NEW; END $$"
    )
    admin.execute(
        "CREATE TRIGGER slow BEFORE INSERT ON conversations FOR EACH ROW WHEN (NEW.thread_id = 'slow') EXECUTE FUNCTION slow()"
    )
    sink = PostgresSink(Connector(database), (None, "conversations"), statement_timeout=0.2)
    with tracking(sink, errors, registry) as tracker:
        turns(tracker, "slow", "quick")
        tracker.flush(60)
    assert any(isinstance(error, SinkFault) and error.kind == "timeout" for error in errors.seen)
    assert rows(admin) == {"slow": (1, 1), "quick": (1, 1)}


def test_serializable_by_default(
    database: str, admin: psycopg.Connection[Any], errors: Errors, registry: CollectorRegistry
) -> None:
    """The transaction says READ COMMITTED itself: two writers under a SERIALIZABLE default do not fail each other."""
    name = sql.Identifier(admin.info.dbname)
    admin.execute(sql.SQL("ALTER DATABASE {} SET default_transaction_isolation = 'serializable'").format(name))
    other = Tracker(database, on_error=errors, registry=registry, flush_interval=0.01)
    with tracking(database, errors, registry) as tracker:
        for _ in range(30):
            turns(tracker, "a", "b")
            turns(other, "b", "a")
            tracker.flush(30)
        other.close()
    assert errors.seen == []
    assert rows(admin) == {"a": (60, 60), "b": (60, 60)}


def test_read_only_then_writable(
    database: str, admin: psycopg.Connection[Any], errors: Errors, registry: CollectorRegistry
) -> None:
    """A database made read-only refuses us by class readonly; when it is writable again, all of it is applied."""
    name = sql.Identifier(admin.info.dbname)
    admin.execute(sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(name))
    with tracking(database, errors, registry) as tracker:
        turns(tracker, "a")
        errors.wait_for_kind("readonly")
        admin.execute("SET default_transaction_read_only = off")
        admin.execute(sql.SQL("ALTER DATABASE {} RESET default_transaction_read_only").format(name))
        tracker.flush(60)
    assert rows(admin) == {"a": (1, 1)}


def test_deadlock_with_a_writer_of_another_order(
    database: str, admin: psycopg.Connection[Any], errors: Errors, registry: CollectorRegistry
) -> None:
    """A writer that locks rows the other way round costs a retry at most."""
    admin.execute("INSERT INTO conversations (thread_id) VALUES ('a'), ('b')")
    with tracking(database, errors, registry) as tracker, psycopg.connect(database) as other:
        other.execute("UPDATE conversations SET resolution_type = 'x' WHERE thread_id = 'b'")
        turns(tracker, "a", "b")
        waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        for _ in range(1_000_000):
            if admin.execute(waits).fetchone() != (0,):
                break
        try:
            other.execute("UPDATE conversations SET resolution_type = 'x' WHERE thread_id = 'a'")
            other.commit()
        except psycopg.errors.DeadlockDetected:
            other.rollback()
        tracker.flush(60)
    assert rows(admin) == {"a": (1, 1), "b": (1, 1)}


def test_connections_exhausted(
    database: str, admin: psycopg.Connection[Any], errors: Errors, registry: CollectorRegistry
) -> None:
    """A role without a free connection is a capacity fault, and waits for one."""
    role = "few_" + admin.info.dbname
    admin.execute(sql.SQL("CREATE ROLE {} LOGIN CONNECTION LIMIT 1").format(sql.Identifier(role)))
    admin.execute(sql.SQL("GRANT ALL ON ALL TABLES IN SCHEMA public TO {}").format(sql.Identifier(role)))
    conninfo = psycopg.conninfo.make_conninfo(database, user=role)
    try:
        with psycopg.connect(conninfo) as holder, tracking(conninfo, errors, registry) as tracker:
            turns(tracker, "a")
            errors.wait_for_kind("capacity")
            holder.close()
            tracker.flush(60)
        assert rows(admin) == {"a": (1, 1)}
    finally:
        admin.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(role)))
        admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


def test_no_server_at_start(errors: Errors, registry: CollectorRegistry, postgres: EmbeddedPostgres) -> None:
    """Nobody listens: calls are taken and added up, the log and the metrics say so, close reports what it lost."""
    tracker = Tracker(
        f"postgresql://postgres@127.0.0.1:{postgres.port}/no_such_database", on_error=errors, registry=registry
    )
    turns(tracker, "a", "b")
    errors.wait_for_kind("auth")
    assert "no_such_database" in str(errors.seen[0])
    assert tracker.close(0.2).lost == 2


BAD = [
    ("CHECK (total_tokens < 1000)", 5_000, "23514"),
    ("CHECK (thread_id <> 'bad')", 1, "23514"),
]


@pytest.mark.parametrize("copy_from", [1, 10**9])
@pytest.mark.parametrize(("check", "tokens", "state"), BAD)
def test_one_bad_row_among_many(
    database: str,
    admin: psycopg.Connection[Any],
    errors: Errors,
    registry: CollectorRegistry,
    check: Any,
    tokens: int,
    state: str,
    copy_from: int,
) -> None:
    """A CHECK violated by one thread sets that one aside, with its reason; the other 299 commit with it."""
    admin.execute(f"ALTER TABLE conversations ADD CHECK {check.removeprefix('CHECK ')}")  # type: ignore[arg-type]
    sink = PostgresSink(Connector(database), (None, "conversations"), copy_from=copy_from)
    with tracking(sink, errors, registry) as tracker:
        turns(tracker, *(f"t-{i}" for i in range(299)))
        turns(tracker, "bad", tokens=tokens)
        tracker.flush(60)
    assert letters(admin) == [("bad", state)]
    assert len(rows(admin)) == 299
    assert registry.get_sample_value("tracker_calls_dead_lettered_total", {"reason": "constraint"}) == 1
    assert errors.seen == []


def _trigger(admin: psycopg.Connection[Any], body: str) -> None:
    admin.execute(f"CREATE FUNCTION act() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} END $$")  # type: ignore[arg-type]
    admin.execute("CREATE TRIGGER act BEFORE INSERT OR UPDATE ON conversations FOR EACH ROW EXECUTE FUNCTION act()")


@pytest.mark.parametrize(
    ("body", "state", "words"),
    [
        ("IF NEW.thread_id = 'bad' THEN RAISE 'not this one'; END IF; RETURN NEW;", "P0001", "not this one"),
        ("IF NEW.thread_id = 'bad' THEN RETURN NULL; END IF; RETURN NEW;", "22P02", "skipped in silence"),
    ],
)
def test_trigger_that_refuses_one_thread(
    database: str,
    admin: psycopg.Connection[Any],
    errors: Errors,
    registry: CollectorRegistry,
    body: str,
    state: str,
    words: str,
) -> None:
    """A trigger that raises for one thread, or drops its row in silence, costs that thread alone, and it is told."""
    _trigger(admin, body)
    with tracking(database, errors, registry) as tracker:
        turns(tracker, "a", "bad", "c")
        tracker.flush(60)
    assert letters(admin) == [("bad", state)]
    assert words in str(admin.execute("SELECT error FROM tracker_dead_letters").fetchone())
    assert rows(admin) == {"a": (1, 1), "c": (1, 1)}


def test_counter_overflow_in_one_row(
    database: str, admin: psycopg.Connection[Any], errors: Errors, registry: CollectorRegistry
) -> None:
    """A sum beyond the column sets that delta aside; the row keeps what it had, the others are written."""
    admin.execute("INSERT INTO conversations (thread_id, turn_count) VALUES ('full', 2147483647)")
    with tracking(database, errors, registry) as tracker:
        turns(tracker, "a", "full", "z")
        for _ in range(2):
            turns(tracker, "tokens", tokens=2**63 - 1)
        tracker.flush(60)
    assert letters(admin) == [("full", "22003"), ("tokens", "22003")]
    assert rows(admin) == {"a": (1, 1), "full": (2147483647, 0), "z": (1, 1)}
    assert registry.get_sample_value("tracker_calls_dead_lettered_total", {"reason": "overflow"}) == 3


def test_deferred_constraint(
    database: str, admin: psycopg.Connection[Any], errors: Errors, registry: CollectorRegistry
) -> None:
    """A constraint that is checked at commit is found by the halving as well."""
    admin.execute("CREATE TABLE allowed (name text PRIMARY KEY)")
    admin.execute("INSERT INTO allowed VALUES ('yes')")
    admin.execute(
        "ALTER TABLE conversations ADD FOREIGN KEY (resolution_type) REFERENCES allowed DEFERRABLE INITIALLY DEFERRED"
    )
    with tracking(database, errors, registry) as tracker:
        turns(tracker, "a", "bad", "c")
        tracker.resolve("bad", "no")
        tracker.resolve("c", "yes")
        tracker.flush(60)
    assert letters(admin) == [("bad", "23503")]
    assert rows(admin) == {"a": (1, 1), "c": (1, 1)}


def test_row_level_security(
    database: str, admin: psycopg.Connection[Any], errors: Errors, registry: CollectorRegistry
) -> None:
    """A policy that refuses one thread's row sets that one aside."""
    role = "rls_" + admin.info.dbname
    name = sql.Identifier(role)
    admin.execute(sql.SQL("CREATE ROLE {} LOGIN").format(name))
    admin.execute(sql.SQL("GRANT ALL ON ALL TABLES IN SCHEMA public TO {}").format(name))
    admin.execute("ALTER TABLE conversations ENABLE ROW LEVEL SECURITY")
    admin.execute("CREATE POLICY mine ON conversations USING (thread_id <> 'bad')")
    try:
        with tracking(psycopg.conninfo.make_conninfo(database, user=role), errors, registry) as tracker:
            turns(tracker, "a", "bad", "c")
            tracker.flush(60)
        assert letters(admin) == [("bad", "42501")]
        assert rows(admin) == {"a": (1, 1), "c": (1, 1)}
    finally:
        admin.execute(sql.SQL("DROP OWNED BY {}").format(name))
        admin.execute(sql.SQL("DROP ROLE {}").format(name))


def test_partitioned_and_triggered_table(empty_database: str, errors: Errors, registry: CollectorRegistry) -> None:
    """A table partitioned by hash of the thread, with a trigger and further NOT NULL columns, is used as it is."""
    with psycopg.connect(empty_database, autocommit=True) as admin:
        admin.execute(
            "CREATE TABLE conversations (tenant text NOT NULL DEFAULT 'main', thread_id text PRIMARY KEY,"
            " started_at timestamptz, last_activity timestamptz, turn_count integer NOT NULL DEFAULT 0,"
            " agents_used text[] DEFAULT '{}', total_tokens bigint DEFAULT 0, total_cost_usd numeric DEFAULT 0,"
            " resolution_type text, ended_at timestamptz, touched integer NOT NULL DEFAULT 0)"
            " PARTITION BY HASH (thread_id)"
        )
        for i in range(3):
            admin.execute(
                f"CREATE TABLE part_{i} PARTITION OF conversations FOR VALUES WITH (MODULUS 3, REMAINDER {i})"  # type: ignore[arg-type]
            )
        _trigger(admin, "NEW.touched := NEW.touched + 1; RETURN NEW;")
        run_migrate(empty_database)
        with tracking(empty_database, errors, registry) as tracker:
            for _ in range(2):
                turns(tracker, *(f"t-{i}" for i in range(100)))
                tracker.flush(60)
        assert set(rows(admin).values()) == {(2, 2)}
        assert admin.execute("SELECT min(touched) FROM conversations WHERE thread_id LIKE 't-%'").fetchone() == (2,)
    assert errors.seen == []


def test_halving_costs_two_log_n(
    database: str, admin: psycopg.Connection[Any], errors: Errors, registry: CollectorRegistry
) -> None:
    """One bad row among 1,024 is found with at most 2·log2(n)+1 further merges."""
    admin.execute("ALTER TABLE conversations ADD CHECK (thread_id <> 't-500')")
    merges = 0
    sink = PostgresSink(Connector(database), (None, "conversations"))
    merge = sink._merge_under_savepoint

    async def counted(*arguments: Any) -> tuple[int, int]:
        nonlocal merges
        merges += 1
        return await merge(*arguments)

    sink._merge_under_savepoint = counted  # type: ignore[method-assign]
    with tracking(sink, errors, registry) as tracker:
        turns(tracker, *(f"t-{i}" for i in range(1_024)))
        tracker.flush(60)
    assert letters(admin) == [("t-500", "23514")]
    assert 11 <= merges <= 2 * 10 + 1


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII", "EUC_JP"])
def test_database_that_does_not_hold_every_character(
    postgres: EmbeddedPostgres, errors: Errors, registry: CollectorRegistry, encoding: str
) -> None:
    """What the database's encoding lacks costs that thread alone; its letter is kept, in ASCII, and says all."""
    name = f"enc_{encoding.lower()}"
    with psycopg.connect(postgres.conninfo, autocommit=True) as maker:
        maker.execute(
            sql.SQL("CREATE DATABASE {} ENCODING {} TEMPLATE template0 LOCALE 'C'").format(
                sql.Identifier(name), encoding
            )
        )
    conninfo = psycopg.conninfo.make_conninfo(postgres.conninfo, dbname=name)
    try:
        run_migrate(conninfo)
        with psycopg.connect(conninfo, autocommit=True, client_encoding="UTF8") as admin:
            admin.execute("ALTER TABLE conversations ADD CHECK (thread_id NOT LIKE 'bad%')")
            with tracking(f"{conninfo} client_encoding=LATIN1", errors, registry) as tracker:
                many = [f"bad-{number}-ü" for number in range(30)]  # these go one by one in the server
                turns(tracker, "good", "smile-😀", "bad-\\ü", "bad-\\xfc", *many)
                tracker.flush(60)
            found = [row[0] for row in admin.execute("SELECT delta FROM tracker_dead_letters").fetchall()]
            threads = {from_json(delta).thread_id for delta in found}
            assert {"bad-\\ü", "bad-\\xfc", *many} <= threads
            assert ("smile-😀" in threads) == (encoding != "SQL_ASCII")
            assert rows(admin).keys() >= {"good"}
    finally:
        with psycopg.connect(postgres.conninfo, autocommit=True) as maker:
            maker.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.mark.parametrize(
    "setting",
    [
        "quote_all_identifiers = on",
        "array_nulls = off",
        "transaction_timeout = '40ms'",
        "statement_timeout = '1ms'",
        "lock_timeout = '1ms'",
        "standard_conforming_strings = off",
        "default_transaction_deferrable = on",
        "\"DateStyle\" = 'German'",
        "\"IntervalStyle\" = 'sql_standard'",
        "\"TimeZone\" = 'America/St_Johns'",
        "plan_cache_mode = force_generic_plan",
        "row_security = off",
    ],
)
def test_odd_settings_of_the_database(
    database: str, admin: psycopg.Connection[Any], errors: Errors, registry: CollectorRegistry, setting: Any
) -> None:
    """What a database's settings make of sessions does not reach the flush."""
    name = sql.Identifier(admin.info.dbname)
    admin.execute(sql.SQL("ALTER DATABASE {} SET " + setting).format(name))
    sink = PostgresSink(Connector(database), (None, "conversations"), copy_from=2_000)
    with tracking(sink, errors, registry) as tracker:
        for count in (20, 3_000):
            for i in range(count):
                assert tracker.record_turn(f"t-{i}", None if i % 2 else "agent", 1)
            tracker.resolve("t-0", "done")
            tracker.flush(60)
    assert [error for error in errors.seen if "timeout" not in str(error)] == []
    assert sum(found[0] for found in rows(admin).values()) == 3_020
    assert letters(admin) == []


@pytest.mark.parametrize("state", ["TR001", "P0002", "23514", "42703"])
def test_trigger_with_a_sqlstate_of_its_own(
    database: str, admin: psycopg.Connection[Any], errors: Errors, registry: CollectorRegistry, state: str
) -> None:
    """What a trigger raises is about the row, under whatever SQLSTATE."""
    _trigger(admin, f"IF NEW.thread_id = 'bad' THEN RAISE 'no' USING errcode = '{state}'; END IF; RETURN NEW;")
    with tracking(database, errors, registry) as tracker:
        turns(tracker, "a", "bad", "c")
        tracker.flush(60)
    assert letters(admin) == [("bad", state)]
    assert rows(admin) == {"a": (1, 1), "c": (1, 1)}


def test_role_without_temporary_tables(
    database: str, admin: psycopg.Connection[Any], errors: Errors, registry: CollectorRegistry
) -> None:
    """Large batches go as arrays where temporary tables are not allowed."""
    role = "plain_" + admin.info.dbname
    name, base = sql.Identifier(role), sql.Identifier(admin.info.dbname)
    admin.execute(sql.SQL("CREATE ROLE {} LOGIN").format(name))
    admin.execute(sql.SQL("GRANT ALL ON ALL TABLES IN SCHEMA public TO {}").format(name))
    admin.execute(sql.SQL("REVOKE TEMPORARY ON DATABASE {} FROM PUBLIC").format(base))
    try:
        with tracking(psycopg.conninfo.make_conninfo(database, user=role), errors, registry) as tracker:
            turns(tracker, *(f"t-{i}" for i in range(6_000)))
            tracker.flush(60)
        assert len(rows(admin)) == 6_000
        assert errors.seen == []
    finally:
        admin.execute(sql.SQL("DROP OWNED BY {}").format(name))
        admin.execute(sql.SQL("DROP ROLE {}").format(name))


def test_close_notices_what_the_database_forgot(
    database: str, admin: psycopg.Connection[Any], errors: Errors, registry: CollectorRegistry
) -> None:
    """A ledger set back while nothing was pending is told at the end."""
    tracker = Tracker(database, on_error=errors, registry=registry)
    turns(tracker, "a")
    tracker.flush(60)
    admin.execute("UPDATE tracker_ledger SET applied_sequence = 0")
    tracker.close(10)
    assert [type(error) for error in errors.seen] == [LedgerRegressed]
    assert registry.get_sample_value("tracker_ledger_regressions_total") == 1
