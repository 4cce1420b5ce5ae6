r"""Rows a second of the flush, beside psql with the same COPY and merge, and beside one UPDATE an entity.

1,000,000 rows, random UUIDs; a round flushes the same number of rows in each case. psql runs one script: for each batch
BEGIN, the ledger's advance, \\copy from a file that is ready in COPY's binary format, the merge, COMMIT; its start and
connection are not counted. LiteLLM's shape is one UPDATE an entity, in the order of the ids, 1,000 in a transaction, by
psycopg, each waited for, as its engine does; in a pipeline (executemany) it is shown beside.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from databases import database, fill, psql, thread_ids
from flushes import Flushes, batch_of
from harness import Run, started
from psycopg import sql

from tracker_daemon.postgres.statements import Statements

if TYPE_CHECKING:
    from collections.abc import Callable

    from tracker_daemon.batch import Batch
    from tracker_daemon.embedded import EmbeddedPostgres

ENTITY = "UPDATE conversations SET total_cost_usd = total_cost_usd + %s, total_tokens = total_tokens + %s WHERE thread_id = %s"
STAGE = "tracker_stage_v1"


def main() -> None:
    """Measure, print, write."""
    run = started(__file__, __doc__)
    rows = thread_ids(run.size(1_000_000, 20_000))
    total = run.size(30_000, 2_000)
    with database(run) as server, tempfile.TemporaryDirectory() as folder, asyncio.Runner() as loop:
        fill(server.conninfo, rows)
        flushes = Flushes(server.conninfo)
        cases: dict[str, Callable[[], float]] = {}
        for size in (1_000, 10_000) if not run.quick else (200, 1_000):
            batches = [batch_of(rows[start : start + size]) for start in range(0, total, size)]
            script = ready(server, Path(folder), batches)
            # psql first: it warms the rows for the other.
            cases[f"psql, {size:,} a batch"] = lambda script=script: total / scripted(server, script)
            cases[f"flush, {size:,} a batch"] = lambda batches=batches: total / loop.run(flushed(flushes, batches))
        sizes = list(cases)
        entities = rows[:total]
        cases["one UPDATE an entity"] = lambda: total / updated(server.conninfo, entities, pipeline=False)
        cases["one UPDATE an entity, pipelined"] = lambda: total / updated(server.conninfo, entities, pipeline=True)
        for name in sizes[::2]:
            cases[name]()
        run.measure("rows/s", cases, rounds=1 if run.quick else 7)
        loop.run(flushes.close())
    tell(run, sizes)
    run.finish()


async def flushed(flushes: Flushes, batches: list[Batch]) -> float:
    """Return the seconds of flushing *batches* one by one."""
    began = time.perf_counter()
    for batch in batches:
        await flushes.apply(batch)
    return time.perf_counter() - began


def ready(server: EmbeddedPostgres, folder: Path, batches: list[Batch]) -> Path:
    """Write what psql needs to flush *batches*: a script, and a file for each."""
    size = len(batches[0].deltas)
    stage = Statements("public", "conversations")
    with psycopg.connect(server.conninfo, autocommit=True) as connection:
        row = connection.execute("SELECT gen_random_uuid()").fetchone()
        assert row is not None
        key: dict[str, Any] = {"producer": row[0], "lane": 0, "epoch": 1, "sequence": 0}
        connection.execute(stage["open"], {"producer": row[0], "lane": 0, "known": 0, "seen": 0, "after": 0})
        names = {"agent_lists": '{"{\\"billing\\"}"}', "resolutions": "{}"}
        # The sequences of a script's second run go on where the first one's ended: read from the ledger.
        advance = sql.SQL(
            "UPDATE tracker_ledger SET applied_sequence = applied_sequence + 1, updated_at = now()"
            " WHERE producer = {} AND lane = 0 AND epoch = 1"
        ).format(sql.Literal(key["producer"]))
        merge = psycopg.ClientCursor(connection).mogrify(stage["merge_stage"], names)
        lines = [
            "SET jit = off;",
            "\\o /dev/null",
            stage["stage"].as_string(connection) + ";",
            "\\o",
            "SELECT clock_timestamp();",
        ]
        for number, batch in enumerate(batches):
            file = folder / f"{size}-{number}.copy"
            write_copy(connection, stage, file, batch)
            lines += [
                "\\o /dev/null",
                "BEGIN;",
                f"\\copy {STAGE} FROM '{file}' WITH (FORMAT BINARY)",
                advance.as_string(connection) + ";",
                " ".join(merge.split("\n")) + ";",
                "COMMIT;",
                "\\o",
            ]
        lines.append("SELECT clock_timestamp();")
    script = folder / f"{size}.sql"
    script.write_text("\n".join(lines), encoding="utf-8")
    return script


def write_copy(connection: psycopg.Connection[Any], statements: Statements, file: Path, batch: Batch) -> None:
    """Write *file*: the deltas as COPY's binary format, by the server itself."""
    with connection.transaction():
        connection.execute(statements["stage"])
        with connection.cursor().copy(f"COPY {STAGE} FROM STDIN") as copy:
            for d in batch.deltas:
                copy.write_row(
                    (d.thread_id, False, d.first_at, d.last_turn_at, d.turns, 1, d.tokens, d.cost_units, None, None)
                )
        with connection.cursor().copy(f"COPY {STAGE} TO STDOUT (FORMAT BINARY)") as copy, file.open("wb") as out:
            for data in copy:
                out.write(data)


def scripted(server: EmbeddedPostgres, script: Path) -> float:
    """Return the seconds between the two instants that psql prints."""
    from datetime import datetime  # noqa: PLC0415

    first, last = psql(server, script).split("\n")[:2]
    return (datetime.fromisoformat(last) - datetime.fromisoformat(first)).total_seconds()


def updated(conninfo: str, ids: list[str], *, pipeline: bool) -> float:
    """Return the seconds of one UPDATE for each of *ids*, 1,000 a transaction."""
    with psycopg.connect(conninfo) as connection:
        cursor = connection.cursor()
        cursor.execute(ENTITY, (0, 0, "none"))
        began = time.perf_counter()
        for start in range(0, len(ids), 1_000):
            parameters = [(0.0041, 812, thread_id) for thread_id in sorted(ids[start : start + 1_000])]
            if pipeline:
                cursor.executemany(ENTITY, parameters)
            else:
                for each in parameters:
                    cursor.execute(ENTITY, each)
            connection.commit()
        return time.perf_counter() - began


def tell(run: Run, sizes: list[str]) -> None:
    """Say what the goals make of it."""
    small, large = run.ratio(sizes[1], sizes[0]), run.ratio(sizes[3], sizes[2])
    run.goal(
        6,
        "rows/s of the flush beside psql with the same COPY and merge, batches of 1,000 / 10,000",
        "≥ 90 %",
        f"{small:.0%} / {large:.0%} ({run.cases[sizes[1]].median:,.0f} / {run.cases[sizes[3]].median:,.0f})",
        met=min(small, large) >= 0.9,
    )
    one = run.ratio(sizes[3], "one UPDATE an entity")
    pipelined = run.ratio(sizes[3], "one UPDATE an entity, pipelined")
    run.goal(
        7,
        "entities/s beside LiteLLM's statement shape",
        "≥ 4×",
        f"{one:.1f}× (pipelined: {pipelined:.1f}×)",
        met=one >= 4,
    )


if __name__ == "__main__":
    main()
