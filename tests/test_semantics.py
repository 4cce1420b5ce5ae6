"""What the database shows: the reference's statements, one a call, are the oracle on a real Postgres."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal
from itertools import permutations, product
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from psycopg import sql

from tests import reference_oracle as oracle
from tests.conftest import run_migrate
from tests.strategies import LONG, NOW, History, Process, histories, play, processes_of, short_names
from tracker_daemon import SchemaError
from tracker_daemon.delta import ThreadDelta, rows_of
from tracker_daemon.errors import ConfigError
from tracker_daemon.generation import ENSURE, RESOLVE, ensure, method_of, resolve
from tracker_daemon.memory_sink import MemoryRow, MemorySink
from tracker_daemon.postgres import encoding
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.sink import PostgresSink
from tracker_daemon.postgres.statements import Statements
from tracker_daemon.settings import split_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from tracker_daemon.embedded import EmbeddedPostgres
    from tracker_daemon.generation import Record
    from tracker_daemon.sink import Applied

ALWAYS_ARRAYS, ALWAYS_COPY = 10**9, 1
SECOND = 10**9
# One world serves every example of a property: it is emptied before each.
PROPERTY = settings(
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


class World:
    """One database with the tables of three writers, the memory sink, and a loop that keeps their connections."""

    def __init__(self, conninfo: str) -> None:
        self.runner = asyncio.Runner()
        self.connection = psycopg.connect(conninfo, autocommit=True)
        for schema in ("reference", "arrays", "copied"):
            run_migrate(conninfo, schema)
        connector = Connector(conninfo)
        self._sinks = {
            schema: PostgresSink(connector, (schema, "conversations"), copy_from=copy_from)
            for schema, copy_from in (("arrays", ALWAYS_ARRAYS), ("copied", ALWAYS_COPY))
        }
        self.memory = MemorySink()

    def close(self) -> None:
        """Close every connection."""
        for sink in self._sinks.values():
            self.runner.run(sink.aclose(uuid4(), 0, clean=False))
        self.connection.close()
        self.runner.close()

    def empty(self) -> None:
        """Forget every row and every producer."""
        for schema in ("reference", "arrays", "copied"):
            for table in ("conversations", "tracker_ledger", "tracker_dead_letters"):
                self.connection.execute(sql.SQL("DELETE FROM {}").format(sql.Identifier(schema, table)))

    def sinks(self) -> list[Any]:
        """Return both forms and a new memory sink."""
        self.memory = MemorySink()
        return [*self._sinks.values(), self.memory]

    def play(self, history: History, *, create_missing: bool = True) -> list[Process]:
        """Send *history* to every sink."""
        return self.runner.run(play(history, self.sinks(), create_missing=create_missing))

    def reference(self, records: Iterable[Record]) -> dict[str, oracle.Row]:
        """Return what the reference leaves of *records*."""
        oracle.write_through(self.connection, "reference.conversations", records)
        return oracle.rows(self.connection, "reference.conversations")

    def shown(self) -> dict[str, dict[str, oracle.Row]]:
        """Return what each sink shows."""
        memory = {thread_id: as_row(row) for thread_id, row in self.memory.rows.items()}
        tables = {name: oracle.rows(self.connection, f"{name}.conversations") for name in ("arrays", "copied")}
        return {**tables, "memory": memory}


@contextmanager
def new_database(postgres: EmbeddedPostgres) -> Iterator[str]:
    """Make a database for a module's tests, dropped afterwards."""
    name = f"m_{uuid4().hex[:12]}"
    with psycopg.connect(postgres.conninfo, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        try:
            yield psycopg.conninfo.make_conninfo(postgres.conninfo, dbname=name)
        finally:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture(scope="module")
def shared_world(postgres: EmbeddedPostgres) -> Iterator[World]:
    """One world for this module."""
    with new_database(postgres) as conninfo:
        found = World(conninfo)
        yield found
        found.close()


@pytest.fixture
def world(shared_world: World) -> World:
    """The world, empty."""
    shared_world.empty()
    return shared_world


def as_row(row: MemoryRow) -> oracle.Row:
    """Return a row in memory as the table shows it."""
    return (
        oracle.instant(row.started_at * 1_000),
        oracle.instant(row.last_activity * 1_000),
        row.turn_count,
        list(row.agents_used),
        row.total_tokens,
        row.total_cost_usd,
        row.resolution_type,
        None if row.ended_at is None else oracle.instant(row.ended_at * 1_000),
    )


def with_ensures(records: Sequence[Record]) -> list[Record]:
    """Return *records*, each thread's first call preceded by an `ensure` of the same instant.

    Where that call is an `ensure` already, the second one changes nothing.
    """
    seen, found = set[str](), list["Record"]()
    for record in records:
        if record[0] not in seen:
            seen.add(record[0])
            found.append(ensure(record[0], record[-1]))
        found.append(record)
    return found


def without_arrival(rows: dict[str, oracle.Row]) -> dict[str, oracle.Row]:
    """Return *rows* without what depends on which of several processes comes first: the order of the agents."""
    return {thread_id: (*row[:3], sorted(row[3]), *row[4:]) for thread_id, row in rows.items()}


def contested(history: History) -> set[str]:
    """Return the threads that two processes resolve in one and the same last microsecond: either may win."""
    found: dict[str, dict[int, set[int]]] = {}
    for record, process in zip(history.records, history.process, strict=True):
        if method_of(record) == RESOLVE:
            found.setdefault(record[0], {}).setdefault(record[-1] // 1_000, set()).add(process)
    return {thread_id for thread_id, instants in found.items() if len(instants[max(instants)]) > 1}


def assert_as_reference(world: World, history: History, expected: dict[str, oracle.Row]) -> None:
    """Compare every sink's rows with the reference's, column by column."""
    shown = world.shown()
    assert shown["arrays"] == shown["copied"] == shown["memory"]
    found = shown["arrays"]
    for rows in (found, expected):
        for thread_id, row in rows.items():
            assert len(set(row[3])) == len(row[3]), "an agent stands twice"
            if thread_id in contested(history):
                either = {r[1] for r in history.records if method_of(r) == RESOLVE and oracle.instant(r[-1]) == row[7]}
                assert row[6] in either
                rows[thread_id] = (*row[:6], None, row[7])
    if history.processes > 1:
        found, expected = without_arrival(found), without_arrival(expected)
    assert found == expected


def one_window(*records: Record, seals: Sequence[int] = (), batch_size: int = 100) -> History:
    """Return a history of one process; *seals*: the calls that end a window."""
    return History(records, (0,) * len(records), tuple(i in seals for i in range(len(records))), (), batch_size)


# -- random histories ------------------------------------------------------------------------------


@settings(PROPERTY, max_examples=100)
@given(history=histories(ensure_first=True))
@example(
    history=one_window(
        ensure("t", NOW), ("t", "\\.", 1, 0.1, NOW), ("t", "\\N", 1, 0.2, NOW), resolve("t", "NULL", NOW)
    )
)
@example(history=one_window(*(ensure(name, NOW) for name in LONG), *((name, name, 1, 5e-324, NOW) for name in LONG)))
def test_any_history(world: World, history: History) -> None:
    """However calls fall into windows, batches and processes, and whichever arrive first: the reference's rows."""
    world.empty()
    expected = world.reference(history.records)
    world.play(history)
    assert_as_reference(world, history, expected)


@settings(PROPERTY, max_examples=60)
@given(history=histories())
def test_any_history_without_ensure(world: World, history: History) -> None:
    """A thread whose first call is none of `ensure` shows what it would, had an `ensure` come at that instant."""
    world.empty()
    expected = world.reference(with_ensures(history.records))
    world.play(history)
    assert_as_reference(world, history, expected)


@settings(PROPERTY, max_examples=60)
@given(history=histories(name=short_names(), cost=st.decimals(-1_000, 1_000, places=12)))
def test_any_history_by_copy(world: World, history: History) -> None:
    """The same with nothing that makes COPY fall back to arrays."""
    world.empty()
    expected = world.reference(with_ensures(history.records))
    for process in world.play(history):
        assert all(encoding.fits_stage(rows_of(batch.deltas)) for batch in process.sent)
    assert_as_reference(world, history, expected)


@settings(PROPERTY, max_examples=80)
@given(history=histories(processes=1))
@example(history=one_window(("t", "a", 5, 0.5, NOW), ensure("t", NOW), ("t", "b", 1, 0.1, NOW)))
@example(
    history=one_window(
        resolve("t", "x", NOW), ensure("t", NOW), ("u", "b", 1, 0.1, NOW), ensure("u", NOW), batch_size=1
    )
)
def test_only_existing_rows(world: World, history: History) -> None:
    """`create_missing=False`, one process: exactly the reference, in any order of calls and with any windows.

    What found no row is counted: a thread's calls of a window before its first `ensure` of it, once.
    """
    world.empty()
    expected = world.reference(history.records)
    (process,) = world.play(history, create_missing=False)
    assert_as_reference(world, history, expected)
    books = process.backlog.books()
    assert books.rows_skipped == sum(each.skipped for each in process.outcomes) == skipped(history.windows(0))
    assert sum(books.applied.values()) == len(history.records)
    assert books.queue_calls == books.threads == 0


def skipped(windows: list[list[Record]]) -> int:
    """Count the deltas that find no row: one a window and thread whose calls begin before the thread exists."""
    existing, found = set[str](), 0
    for window in windows:
        early = set[str]()
        for record in window:
            if method_of(record) == ENSURE:
                existing.add(record[0])
            elif record[0] not in existing:
                early.add(record[0])
        found += len(early)
    return found


@settings(PROPERTY, max_examples=60)
@given(history=histories())
def test_row_and_pending(history: History) -> None:
    """At every step of every process, row + pending = all calls so far; so it is after the row's own commit."""
    asyncio.run(_row_and_pending(history))


async def _row_and_pending(history: History) -> None:
    sink, processes = MemorySink(), processes_of(history)
    for process in processes:
        process.opened = await sink.open(process.producer, 0)
    for pick in [*history.picks, *(n for n in range(len(processes)) for _ in range(5 * len(history.records)))]:
        await step(processes[pick % len(processes)], sink)
        made = sorted((record for each in processes for record in each.made), key=_at)
        for thread_id in {record[0] for record in history.records}:
            expected = row_of([record for record in made if record[0] == thread_id])
            row = sink.rows.get(thread_id)
            found = total(row, [each.backlog.pending(thread_id) for each in processes])
            if found is not None and expected is not None and len(processes) > 1:
                found, expected = (
                    replace(each, agents_used=tuple(sorted(each.agents_used)), resolution_type=None)
                    for each in (found, expected)
                )
            assert found == expected
    assert all(process.is_done for process in processes)


async def step(process: Process, sink: MemorySink) -> None:
    """Make one call, or drain one, or seal, or send one batch."""
    backlog = process.backlog
    if backlog.queue:
        backlog.drain(1)
    elif batch := process.next_batch() if backlog.head() else None:
        process.settle(batch, await sink.apply(batch))
    elif process.windows and process.windows[0]:
        process.made.append(process.windows[0][0])
        backlog.queue.put(process.windows[0].pop(0))
    elif process.windows:
        process.windows.pop(0)
        backlog.seal()


def row_of(records: list[Record]) -> MemoryRow | None:
    """Return the row of all *records*, of one thread, as of one window."""
    if not records:
        return None
    process = Process([records])
    process.make_window()
    return total(None, [*process.backlog.head()])  # type: ignore[misc]


def total(row: MemoryRow | None, parts: list[ThreadDelta | None]) -> MemoryRow | None:
    """Return *row* with *parts* added."""
    found = row and replace(row)
    for part in parts:
        if part is not None:
            found = found or MemoryRow(part.first_at, part.first_at)
            found.add(part)
    return found


def _at(record: Record) -> int:
    return record[-1]


NUMBERS = {
    "the widest that COPY takes": (Decimal("9223372.036854775807"), 2**63 - 1, True),
    "the lowest that COPY takes": (Decimal("-9223372.036854775807"), -(2**63) + 1, True),
    "a cost past COPY's column": (Decimal("9223372.036854775808"), 0, False),
    "thirteen digits after the point": (Decimal("0.0000000000001"), 0, False),
    "the highest": (Decimal("9E+1999"), 0, False),
    "the highest int": (10**2_000 - 1, 0, False),
    "the finest": (Decimal("-1E-16383"), 0, False),
    "the smallest float": (5e-324, 0, False),
    "the largest float": (1.7976931348623157e308, 0, False),
}


@pytest.mark.parametrize(("cost", "tokens", "fits"), NUMBERS.values(), ids=NUMBERS)
def test_numbers_at_the_edges(world: World, cost: Any, tokens: int, fits: bool) -> None:
    """What does not fit the columns of COPY goes as arrays, with everything else of its batch; rows are the same."""
    history = one_window(ensure("t", NOW), ensure("u", NOW), ("t", "a", tokens, cost, NOW), ("u", "b", 1, 0.1, NOW))
    (process,) = world.play(history)
    assert [encoding.fits_stage(rows_of(batch.deltas)) for batch in process.sent] == [fits]
    assert_as_reference(world, history, world.reference(history.records))


@pytest.mark.parametrize("thread_id", LONG, ids=lambda name: f"{len(name)} characters, {len(name.encode())} bytes")
def test_long_names(world: World, thread_id: str) -> None:
    """Ids that are longer than COPY's column go as arrays; rows are the same."""
    history = one_window(
        ensure(thread_id, NOW), (thread_id, thread_id, 1, 1, NOW), resolve(thread_id, thread_id, NOW), ensure("t", NOW)
    )
    (process,) = world.play(history)
    assert [encoding.fits_stage(rows_of(batch.deltas)) for batch in process.sent] == [len(thread_id) <= 120]
    assert_as_reference(world, history, world.reference(history.records))


def test_a_sum_that_no_column_takes(world: World) -> None:
    """Tokens past bigint: either form sets that thread aside as the same dead letter, and applies the rest."""
    history = one_window(("t", "a", 2**63 - 1, 1, NOW), ("t", "a", 1, 1, NOW), ("u", "b", 1, 0.1, NOW))
    arrays, copied, _ = world.sinks()
    (process,) = world.runner.run(play(history, [arrays, copied]))
    (outcome,) = process.outcomes
    assert (outcome.rows, outcome.skipped) == (1, 0)
    assert [(letter.delta.thread_id, letter.reason) for letter in outcome.dead_letters] == [("t", "overflow")]
    shown = world.shown()
    assert shown["arrays"] == shown["copied"]
    assert list(shown["arrays"]) == ["u"]
    books = process.backlog.books()
    assert (sum(books.applied.values()), books.dead_lettered, books.queue_calls) == (1, {"overflow": 2}, 0)
    letters = [
        world.connection.execute(
            sql.SQL("SELECT thread_id, sequence, sqlstate, delta FROM {}").format(
                sql.Identifier(schema, "tracker_dead_letters")
            )
        ).fetchall()
        for schema in ("arrays", "copied")
    ]
    assert letters[0] == letters[1]
    assert letters[0][0][:3] == ("t", 1, "22003")
    assert letters[0][0][3]["tokens"] == str(2**63)


# -- every order of calls --------------------------------------------------------------------------

KINDS = ("ensure", "turn", "resolve")
ORDERS = [*product(KINDS, repeat=2), *product(KINDS, repeat=3)]


def call(thread_id: str, kind: str, number: int) -> Record:
    """Return the call number *number* of a thread: each turn's tokens are a digit of their own in base 4."""
    at = NOW + number * SECOND
    if kind == "ensure":
        return ensure(thread_id, at)
    if kind == "turn":
        return (thread_id, f"agent{number}", 4**number, Decimal(4**number).scaleb(-6), at)
    return resolve(thread_id, f"type{number}", at)


def orders(suffix: str = "") -> dict[str, list[Record]]:
    """Return, for each order of two and three calls, a thread with it."""
    found = {}
    for kinds in ORDERS:
        thread_id = "-".join(kinds) + suffix
        found[thread_id] = [call(thread_id, kind, number) for number, kind in enumerate(kinds)]
    return found


def by_time(threads: dict[str, list[Record]]) -> list[Record]:
    """Return the calls of all threads in order of time."""
    return sorted((record for records in threads.values() for record in records), key=_at)


@pytest.mark.parametrize("create_missing", [True, False])
@pytest.mark.parametrize("cuts", [(), (0,), (1,), (0, 1)], ids=str)
def test_orders_in_windows(world: World, cuts: tuple[int, ...], create_missing: bool) -> None:
    """Every pair and triple of calls, in one window and in several, shows what the reference shows.

    `create_missing=True` differs by the row that it creates at the first call.
    """
    threads = orders()
    records = by_time(threads)
    # The calls number 0 (1) of all threads stand together: the last of them ends a window.
    ends = {max(i for i, record in enumerate(records) if record[-1] == NOW + cut * SECOND) for cut in cuts}
    history = one_window(*records, seals=sorted(ends))
    (process,) = world.play(history, create_missing=create_missing)
    # What follows an `ensure` that stands behind other calls of its window goes in a batch of its own.
    assert len(process.sent) == len(cuts) + 1 if create_missing else len(process.sent) > len(cuts)
    assert_as_reference(world, history, world.reference(with_ensures(records) if create_missing else records))
    assert sum(each.skipped for each in process.outcomes) == (0 if create_missing else skipped(history.windows(0)))


@pytest.mark.parametrize("arrival", list(permutations(range(3))), ids=str)
def test_orders_across_processes(world: World, arrival: tuple[int, ...]) -> None:
    """Every pair and triple of calls, each call from another process, in every order of arrival."""
    records = by_time(orders())
    made_by = tuple((record[-1] - NOW) // SECOND for record in records)
    history = History(tuple(records), made_by, (False,) * len(records), arrival, 100)
    world.play(history)
    assert_as_reference(world, history, world.reference(with_ensures(records)))


# -- tables that exist already ---------------------------------------------------------------------

EXISTING = {
    "bigint turn_count, double cost, integer tokens": """
        CREATE TABLE {table} (thread_id text PRIMARY KEY, started_at timestamptz, last_activity timestamptz,
        turn_count bigint DEFAULT 0, agents_used text[] DEFAULT '{{}}', total_tokens integer DEFAULT 0,
        total_cost_usd double precision DEFAULT 0, resolution_type text, ended_at timestamptz)""",
    "other columns, another order, varchar, numeric(12,6)": """
        CREATE TABLE {table} (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tenant text NOT NULL DEFAULT 'none',
        ended_at timestamptz, resolution_type varchar(600), total_cost_usd numeric(12,6) NOT NULL DEFAULT 0.0,
        created timestamptz NOT NULL DEFAULT now(), total_tokens bigint NOT NULL DEFAULT 0,
        agents_used text[] NOT NULL DEFAULT '{{}}', turn_count integer NOT NULL DEFAULT 0,
        last_activity timestamptz NOT NULL DEFAULT now(), started_at timestamptz NOT NULL DEFAULT now(),
        thread_id varchar(600) NOT NULL UNIQUE, note text CHECK (note IS NULL))""",
    "partitioned": """
        CREATE TABLE {table} (thread_id text PRIMARY KEY, started_at timestamptz, last_activity timestamptz,
        turn_count int DEFAULT 0, agents_used text[] DEFAULT '{{}}', total_tokens bigint DEFAULT 0,
        total_cost_usd numeric DEFAULT 0, resolution_type text, ended_at timestamptz) PARTITION BY HASH (thread_id);
        CREATE TABLE part0 PARTITION OF {table} FOR VALUES WITH (MODULUS 2, REMAINDER 0);
        CREATE TABLE part1 PARTITION OF {table} FOR VALUES WITH (MODULUS 2, REMAINDER 1)""",
}


def flush_calls(
    conninfo: str, table: str, records: Sequence[Record], *, create_missing: bool = True, **options: Any
) -> list[Applied]:
    """Apply *records*, all of one window, to *table* as a tracker would; return the outcomes."""
    process = Process([list(records)], create_missing)

    async def run() -> None:
        sink = PostgresSink(Connector(conninfo), split_table(table), **options)
        try:
            while await process.send([sink]):
                pass
        finally:
            await sink.aclose(process.producer, 0, clean=True)

    asyncio.run(run())
    return process.outcomes


def execute(conninfo: str, text: str) -> list[Any]:
    """Run one or more statements; return the rows of the last one."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        cursor = connection.execute(text)
        return cursor.fetchall() if cursor.description else []


def some_calls() -> list[Record]:
    """Return calls on every order of calls whose first is an `ensure`, with costs of six digits after the point."""
    return by_time({key: records for key, records in orders().items() if key.startswith("ensure")})


@pytest.mark.parametrize("copy_from", [ALWAYS_ARRAYS, ALWAYS_COPY], ids=["arrays", "copy"])
@pytest.mark.parametrize("ddl", EXISTING.values(), ids=EXISTING)
def test_existing_table(empty_database: str, ddl: str, copy_from: int) -> None:
    """A table that exists is used as it is, and shows what the reference leaves in one of the same kind."""
    for schema in ("ours", "theirs"):
        execute(empty_database, f"CREATE SCHEMA {schema}; SET search_path = {schema};" + ddl.format(table="c"))
    run_migrate(empty_database, "ours", "c")
    records = some_calls()
    flush_calls(empty_database, "ours.c", records[: len(records) // 2], copy_from=copy_from)
    flush_calls(empty_database, "ours.c", records[len(records) // 2 :], copy_from=copy_from)
    with psycopg.connect(empty_database, autocommit=True) as connection:
        oracle.write_through(connection, "theirs.c", records)
        found, expected = oracle.rows(connection, "ours.c"), oracle.rows(connection, "theirs.c")
    assert [float(row[5]) for row in found.values()] == pytest.approx([float(expected[key][5]) for key in found])
    if "double precision" in ddl:  # adds in the order of arrival, and not exactly
        found, expected = ({key: (*row[:5], *row[6:]) for key, row in rows.items()} for rows in (found, expected))
    assert found == expected


def test_existing_rows(database: str) -> None:
    """Rows that the reference left before are continued: names kept, sums added, the later resolution kept."""
    execute(
        database,
        "INSERT INTO conversations VALUES"
        " ('t', '2020-01-01Z', '2020-01-02Z', 3, '{b,a}', 30, 0.3, 'old', '2020-01-03Z'),"
        " ('late', '2020-01-01Z', '2099-01-02Z', 1, '{}', 1, 1, 'future', '2099-01-03Z')",
    )
    calls: list[Record] = [ensure("t", NOW), ("t", "a", 1, 0.1, NOW), ("t", "c", 1, 0.1, NOW), resolve("t", "new", NOW)]
    flush_calls(database, "conversations", [*calls, *(("late", *record[1:]) for record in calls)])
    with psycopg.connect(database) as connection:
        rows = oracle.rows(connection, "conversations")
    assert rows["t"][1:] == (
        oracle.instant(NOW),
        5,
        ["b", "a", "c"],
        32,
        Decimal("0.5"),
        "new",
        oracle.instant(NOW),
    )
    assert rows["t"][0].year == 2020
    assert (rows["late"][1].year, rows["late"][6], rows["late"][7].year) == (2099, "future", 2099)


@pytest.mark.parametrize("copy_from", [ALWAYS_ARRAYS, ALWAYS_COPY], ids=["arrays", "copy"])
def test_null_in_existing_columns(empty_database: str, copy_from: int) -> None:
    """A row whose columns are NULL, all but its key, counts as one without turns."""
    execute(
        empty_database,
        "CREATE TABLE conversations (thread_id text PRIMARY KEY, started_at timestamptz, last_activity timestamptz,"
        " turn_count int, agents_used text[], total_tokens bigint, total_cost_usd numeric, resolution_type text,"
        " ended_at timestamptz); INSERT INTO conversations (thread_id) VALUES ('ensured'), ('turned'), ('resolved');"
        " INSERT INTO conversations (thread_id, agents_used) VALUES ('hole', '{NULL,a}')",
    )
    run_migrate(empty_database)
    calls: list[Record] = [
        ensure("ensured", NOW),
        ("turned", "a", 1, 0.1, NOW),
        resolve("resolved", "done", NOW),
        ("hole", "a", 1, 0, NOW),
        ("hole", "b", 1, 0, NOW),
    ]
    flush_calls(empty_database, "conversations", calls, copy_from=copy_from)
    with psycopg.connect(empty_database) as connection:
        rows = oracle.rows(connection, "conversations")
    now = oracle.instant(NOW)
    assert rows["turned"][1:] == (now, 1, ["a"], 1, Decimal("0.1"), None, None)
    assert rows["resolved"][6:] == ("done", now)
    assert rows["hole"][2:5] == (2, [None, "a", "b"], 2)
    assert rows["ensured"][6:] == (None, None)


OLD_AGENTS = {
    "null": None,
    "empty": [],
    "few": ["b3", "a1"],
    "twice": ["a1", "a1", "x", "x"],
    "hole": [None, "a2", None, "x"],
    "every other": [f"a{i}" for i in range(0, 60, 2)],
    "all": [f"a{i}" for i in range(60)],
}


@pytest.mark.parametrize("copy_from", [ALWAYS_ARRAYS, ALWAYS_COPY], ids=["arrays", "copy"])
def test_many_agents_in_one_delta(database: str, copy_from: int) -> None:
    """The old array stays as it is, new names follow in first-use order, each once, whatever either size is."""
    sizes = (1, 8, 9, 60)
    old = {f"{name} {size}": agents for name, agents in OLD_AGENTS.items() for size in sizes}
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("ALTER TABLE conversations ALTER agents_used DROP NOT NULL")
        connection.cursor().executemany(
            "INSERT INTO conversations (thread_id, agents_used) VALUES (%s, %s)", list(old.items())
        )
    calls: list[Record] = [
        (thread_id, f"a{i}", 1, 0, NOW) for thread_id in old for i in reversed(range(int(thread_id.split()[-1])))
    ]
    flush_calls(database, "conversations", calls, copy_from=copy_from)
    with psycopg.connect(database) as connection:
        rows = oracle.rows(connection, "conversations")
    for thread_id, agents in old.items():
        new = [f"a{i}" for i in reversed(range(int(thread_id.split()[-1])))]
        assert rows[thread_id][3] == [*(agents or []), *(name for name in new if name not in (agents or []))], thread_id


@pytest.mark.parametrize("used", [1, 8, 9, 2_000])
def test_known_agents_write_no_array(database: str, used: int) -> None:
    """An array that is stored out of line and gains nothing is not written again."""
    names = [f"{i:x}-{uuid4()}" for i in range(2_000)]
    stored = "SELECT pg_column_toast_chunk_id(agents_used) FROM conversations"
    flush_calls(database, "conversations", [("t", name, 1, 0, NOW) for name in names])
    before = execute(database, stored)
    assert before != [(None,)]
    flush_calls(database, "conversations", [("t", name, 1, 0, NOW) for name in names[-used:]])
    assert execute(database, stored) == before
    flush_calls(database, "conversations", [("t", name, 1, 0, NOW) for name in [*names[-used:], "new"]])
    assert execute(database, stored) != before


def test_many_agents_are_looked_up_by_hash(world: World) -> None:
    """The plan hashes the row's agents: names compared each with each hold locks for a second at some thousands."""
    statements, parameters = Statements("arrays", "conversations"), encoding.arrays([ThreadDelta("t", 1)])
    world.connection.execute(statements["stage"])
    for name in ("merge_arrays", "merge_stage"):
        plan = world.connection.execute(sql.SQL("EXPLAIN ") + statements[name], parameters).fetchall()
        assert any("hashed SubPlan" in line for (line,) in plan)


@pytest.mark.parametrize("table", ['"odd ""name"" {x}"', 'tenant_1."Conversations"', '"My.Schema"."select"'])
@pytest.mark.parametrize("copy_from", [ALWAYS_ARRAYS, ALWAYS_COPY], ids=["arrays", "copy"])
def test_names_of_tables(empty_database: str, table: str, copy_from: int) -> None:
    """A table may be schema-qualified and have any name in quotes; ledger and dead letters stand beside it."""
    schema, name = split_table(table)
    run_migrate(empty_database, schema, name)
    run_migrate(empty_database, schema, name)
    records = some_calls()
    outcomes = flush_calls(empty_database, table, records, copy_from=copy_from)
    assert sum(each.rows for each in outcomes) == len({record[0] for record in records})
    with psycopg.connect(empty_database, autocommit=True) as connection:
        run_migrate(empty_database, "reference")
        oracle.write_through(connection, "reference.conversations", records)
        whole = sql.Identifier(schema or "public", name).as_string()
        found = connection.execute(f"SELECT thread_id, total_tokens, turn_count FROM {whole}").fetchall()
        expected = oracle.rows(connection, "reference.conversations")
        ledger = sql.Identifier(schema or "public", "tracker_ledger")
        moved = connection.execute(sql.SQL("SELECT applied_sequence FROM {}").format(ledger)).fetchall()
    assert {row[0]: row[1:] for row in found} == {key: (row[4], row[2]) for key, row in expected.items()}
    assert moved == [(1,)]


def test_percent_in_a_name() -> None:
    """A name that the driver would take for a parameter is refused at once, not at every flush."""
    for table in ('"100%"', '"%s".conversations'):
        with pytest.raises(ConfigError, match="must not contain %"):
            split_table(table)


def test_two_tables_of_one_schema(empty_database: str) -> None:
    """Two tables share a ledger; what is written to one is not seen in the other."""
    run_migrate(empty_database, None, "one")
    run_migrate(empty_database, None, "two")
    flush_calls(empty_database, "one", [ensure("a", NOW)])
    flush_calls(empty_database, "two", [ensure("b", NOW)])
    assert execute(empty_database, "SELECT thread_id FROM one") == [("a",)]
    assert execute(empty_database, "SELECT thread_id FROM two") == [("b",)]


def test_search_path(empty_database: str) -> None:
    """A table without a schema is found by the search path, and its ledger beside it."""
    execute(empty_database, "CREATE SCHEMA app")
    conninfo = psycopg.conninfo.make_conninfo(empty_database, options="-c search_path=app,public")
    run_migrate(conninfo)
    flush_calls(conninfo, "conversations", [ensure("t", NOW)])
    assert execute(empty_database, "SELECT thread_id FROM app.conversations") == [("t",)]
    assert execute(empty_database, "SELECT applied_sequence FROM app.tracker_ledger") == [(1,)]


# -- tables that will not do -----------------------------------------------------------------------

BROKEN = {
    "DROP TABLE conversations": ("public.conversations does not exist", "tracker-daemon migrate"),
    "DROP TABLE tracker_ledger": ("public.tracker_ledger does not exist", "tracker-daemon migrate"),
    "DROP TABLE tracker_dead_letters": ("public.tracker_dead_letters does not exist", "tracker-daemon migrate"),
    "ALTER TABLE conversations DROP total_tokens": ("public.conversations.total_tokens is missing", "bigint"),
    "ALTER TABLE conversations ALTER turn_count TYPE text": ("turn_count is text", "integer or bigint"),
    "ALTER TABLE conversations ALTER total_cost_usd TYPE real": (
        "total_cost_usd is real",
        "numeric or double precision",
    ),
    "ALTER TABLE conversations ALTER started_at TYPE timestamp": (
        "started_at is timestamp without time zone",
        "timestamp with time zone",
    ),
    "ALTER TABLE conversations ALTER agents_used DROP DEFAULT, ALTER agents_used TYPE jsonb USING '[]'": (
        "agents_used is jsonb",
        "text[]",
    ),
    "ALTER TABLE conversations DROP CONSTRAINT conversations_pkey": ("no primary key or unique index", "(thread_id)"),
    "ALTER TABLE conversations DROP CONSTRAINT conversations_pkey, ADD PRIMARY KEY (thread_id, started_at)": (
        "no primary key or unique index",
        "(thread_id) alone",
    ),
    "ALTER TABLE conversations DROP CONSTRAINT conversations_pkey; CREATE INDEX ON conversations (thread_id)": (
        "no primary key or unique index",
        "(thread_id)",
    ),
    "ALTER TABLE conversations DROP CONSTRAINT conversations_pkey;"
    "CREATE UNIQUE INDEX ON conversations (thread_id) WHERE turn_count > 0": ("no primary key or unique index", ""),
    "ALTER TABLE conversations DROP CONSTRAINT conversations_pkey;"
    "CREATE UNIQUE INDEX ON conversations (lower(thread_id))": ("no primary key or unique index", ""),
    "ALTER TABLE conversations DROP CONSTRAINT conversations_pkey;"
    "ALTER TABLE conversations ADD UNIQUE (thread_id) DEFERRABLE": ("no primary key or unique index", ""),
    "ALTER TABLE tracker_ledger DROP epoch": ("public.tracker_ledger.epoch is missing", ""),
    "ALTER TABLE tracker_dead_letters DROP sqlstate": ("public.tracker_dead_letters.sqlstate is missing", ""),
}


@pytest.mark.parametrize(("ddl", "words"), BROKEN.items(), ids=BROKEN)
def test_schema_error(database: str, ddl: str, words: tuple[str, ...]) -> None:
    """A table, column, type or index that the flush needs and does not find is named, with what to do."""
    execute(database, ddl)
    with pytest.raises(SchemaError) as found:
        flush_calls(database, "conversations", [ensure("t", NOW)])
    for word in (*words, "To mend it"):
        assert word in str(found.value)
    assert execute(database, "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'tracker-daemon'")


def test_schema_error_of_a_table_elsewhere(empty_database: str) -> None:
    """What to run names the table that was asked for."""
    with pytest.raises(SchemaError, match=r"--table tenant\.c"):
        flush_calls(empty_database, "tenant.c", [ensure("t", NOW)])


def test_migrate_refuses_what_will_not_do(empty_database: str) -> None:
    """`migrate` on a table that cannot be used says so and leaves nothing behind."""
    execute(empty_database, "CREATE TABLE conversations (thread_id text PRIMARY KEY)")
    with pytest.raises(SchemaError, match="started_at is missing"):
        run_migrate(empty_database)
    assert execute(empty_database, "SELECT relname::text FROM pg_class WHERE relname LIKE 'tracker%'") == []
