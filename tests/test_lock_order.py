"""Any number of processes flush overlapping threads, new and old, by either form, without a deadlock.

Every flush takes its row locks in one order, that of the thread ids. A version of the merge without its sort deadlocks
here within the first flushes.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import psycopg
import pytest

from tests.strategies import NOW
from tests.test_semantics import ALWAYS_ARRAYS, ALWAYS_COPY
from tracker_daemon.batch import Batch
from tracker_daemon.delta import ThreadDelta
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.sink import PostgresSink

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.synchronize import Barrier

# A child imports what it needs and shares nothing with the loops and connections here.
SPAWN = multiprocessing.get_context("spawn")
PATIENCE = 60.0
AGENTS = ("a", "b", "c")


def names(flushes: int) -> list[str]:
    """Return the threads that all flush: few enough to meet, mixed in case and script, for collations to differ on."""
    shapes = ("t{}", "T{}", "é{}", "_{}", "日{}", "t-{}", "\U0001f600{}")
    return [shapes[number % len(shapes)].format(number) for number in range(20 * flushes)]


def batches(producer: UUID, seed: int, flushes: int, size: int) -> Iterator[Batch]:
    """Yield batches of random threads in random order; the first ones see mostly new keys, the last ones few."""
    chance = random.Random(seed)
    known = names(flushes)
    for number in range(1, flushes + 1):
        deltas = []
        for thread_id in chance.sample(known[: max(size, 20 * number)], size):
            delta = ThreadDelta(thread_id, NOW // 1_000 + chance.randrange(10**6))
            delta.turn(chance.choice(AGENTS), chance.randrange(1_000), 0.01, delta.first_at)
            deltas.append(delta)
        yield Batch(producer, 0, 1, number, tuple(deltas))


def flush_all(conninfo: str, job: tuple[UUID, int, int, int, int, bool], start: Barrier, faults: Any) -> None:
    """Be one process: apply every batch, and put what went wrong into *faults*."""
    producer, seed, flushes, size, copy_from, create_missing = job

    async def run() -> None:
        sink = PostgresSink(Connector(conninfo), (None, "conversations"), copy_from=copy_from)
        await sink.open(producer, 0)
        start.wait(PATIENCE)
        for batch in batches(producer, seed, flushes, size):
            while True:
                try:
                    applied = await sink.apply(replace(batch, create_missing=create_missing))
                except Exception as error:
                    faults.put(str(error))
                else:
                    assert applied.rows + applied.skipped == size
                    break
        await sink.aclose(producer, 0, clean=True)

    asyncio.run(run())


def flush_from(conninfo: str, jobs: list[tuple[UUID, int, int, int, int, bool]]) -> list[str]:
    """Run every job in a process of its own, all at once; return what went wrong."""
    start, faults = SPAWN.Barrier(len(jobs)), SPAWN.SimpleQueue()
    processes = [SPAWN.Process(target=flush_all, args=(conninfo, job, start, faults), daemon=True) for job in jobs]
    for process in processes:
        process.start()
    found = []
    try:
        for process in processes:
            process.join(PATIENCE)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
            process.join()
            process.close()
    while not faults.empty():
        found.append(faults.get())
    faults.close()
    return found


def deadlocks(conninfo: str) -> int:
    """Return how many deadlocks the server has counted in this database."""
    with psycopg.connect(conninfo) as connection:
        row = connection.execute("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()").fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.parametrize(
    ("forms", "flushes", "size", "create_missing"),
    [
        pytest.param([ALWAYS_ARRAYS, ALWAYS_COPY], 60, 200, True, id="two"),
        pytest.param([ALWAYS_ARRAYS, ALWAYS_COPY] * 4, 15, 200, True, id="eight"),
        pytest.param([ALWAYS_ARRAYS, ALWAYS_COPY], 30, 200, False, id="two, only existing rows"),
    ],
)
def test_no_deadlock(database: str, forms: list[int], flushes: int, size: int, create_missing: bool) -> None:
    """Processes on overlapping threads, some new: no deadlock, no fault of any kind, and every sum exact."""
    jobs = [(uuid4(), seed, flushes, size, copy_from, create_missing) for seed, copy_from in enumerate(forms)]
    deltas = [
        delta
        for producer, seed, *_ in jobs
        for batch in batches(producer, seed, flushes, size)
        for delta in batch.deltas
    ]
    existing = {delta.thread_id for delta in deltas} if create_missing else set(names(flushes)[::2])
    if not create_missing:
        with psycopg.connect(database) as connection:
            insert = "INSERT INTO conversations (thread_id) VALUES (%s)"
            connection.cursor().executemany(insert, [[name] for name in existing])
    expected = dict.fromkeys(existing, (0, 0))
    for delta in deltas:
        if delta.thread_id in existing:
            tokens, turns = expected[delta.thread_id]
            expected[delta.thread_id] = (tokens + delta.tokens, turns + 1)
    before = deadlocks(database)
    faults = flush_from(database, jobs)
    assert Counter(faults) == {}
    assert deadlocks(database) == before == 0
    with psycopg.connect(database) as connection:
        rows = connection.execute(
            "SELECT thread_id, total_tokens, turn_count, total_cost_usd * 100 = turn_count FROM conversations"
        ).fetchall()
        ledger = connection.execute("SELECT producer, applied_sequence FROM tracker_ledger").fetchall()
    assert {row[0]: row[1:3] for row in rows} == expected
    assert all(row[3] for row in rows)
    assert dict(ledger) == {job[0]: flushes for job in jobs}
    assert max(turns for _, turns in expected.values()) >= 4, "the processes hardly met"
