"""Recovery of much: `make soak-journal-recovery CALLS=5000000`.

A process makes calls that no database takes, and is killed. The next one applies them all, is killed in the middle, and
the one after it goes on where that was: nothing missing, nothing doubled, and memory as for one window.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.conftest import run_migrate
from tests.helpers import command, query, running, wait_until
from tracker_daemon.embedded import EmbeddedPostgres

if TYPE_CHECKING:
    from collections.abc import Callable

NOWHERE = "host=127.0.0.1 port=1 user=postgres dbname=postgres"
CALLS_PER_THREAD = 5
MIB = 1 << 20


@dataclass
class Recovery:
    """One run, and what was seen.

    Args:
        folder: for the server and the journal; it must be reachable by the server's user.
        calls: how many are written.
        kill_at: how many of them the first recoverer may apply, about, before it is killed.
        settings: of the tracker that writes.
    """

    folder: Path
    calls: int
    kill_at: int
    settings: dict[str, Any]
    say: Callable[[str], None]
    patience: float = 1_800.0
    grown: int = 0
    """Bytes of memory that the last recoverer took beyond what it began with."""
    applied_before_the_kill: int = 0
    exact: bool = False

    def run(self) -> bool:
        """Run it; return whether every call counts once."""
        journal, threads = str(self.folder / "journal"), self.calls // CALLS_PER_THREAD
        with EmbeddedPostgres(self.folder / "pg", settings={"fsync": "off"}) as server:
            run_migrate(server.conninfo)
            arguments = [NOWHERE, journal, str(self.calls), str(threads), json.dumps(self.settings)]
            with running(command("journal_recovery.py", "write", *arguments)) as writer:
                written = writer.end(self.patience).by("writer")
            files = len(list(Path(journal).iterdir()))
            self.say(
                f"written: {self.calls:,} calls on {threads:,} threads in {written['seconds']:.1f} s, "
                f"{written['bytes'] / MIB:.0f} MiB in {files} files, peak {written['peak'] / MIB:.0f} MiB"
            )
            with running(command("journal_recovery.py", "recover", server.conninfo, journal)) as first:
                wait_until(lambda: turns(server) >= self.kill_at, "the first calls applied", self.patience)
                first.kill()
            self.applied_before_the_kill = turns(server)
            self.say(f"killed in the middle: {self.applied_before_the_kill:,} calls applied")
            with running(command("journal_recovery.py", "recover", server.conninfo, journal)) as second:
                recovered = second.end(self.patience).by("recovered")
            self.grown = recovered["peak"] - recovered["before"]
            self.say(
                f"recovered: {recovered['calls']:,} calls in {recovered['seconds']:.1f} s, "
                f"peak {recovered['peak'] / MIB:.0f} MiB, of which {self.grown / MIB:.0f} MiB for it"
            )
            # Each digit once: the sum of five calls on each thread.
            found = query(server.conninfo, "SELECT total_tokens, turn_count, count(*) FROM conversations GROUP BY 1, 2")
        self.exact = found == [((4**CALLS_PER_THREAD - 1) // 3, CALLS_PER_THREAD, threads)]
        self.say(f"each of {self.calls:,} calls counts once: {self.exact}" if self.exact else f"wrong: {found[:20]}")
        return self.exact and not written["degraded"] and 0 < self.applied_before_the_kill < self.calls


def turns(server: EmbeddedPostgres) -> int:
    """Return the turns in the table."""
    [(found,)] = query(server.conninfo, "SELECT coalesce(sum(turn_count), 0)::bigint FROM conversations")
    return int(found)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Write calls, kill, recover, kill, recover; print seconds and memory.")
    parser.add_argument("--calls", type=int, default=5_000_000)
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="tracker-soak-"))
    folder.chmod(0o755)
    try:
        soak = Recovery(folder, options.calls, options.calls // 3, {}, lambda line: print(line, flush=True))  # noqa: T201
        exact = soak.run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if exact else 1


if __name__ == "__main__":
    logging.basicConfig(level=logging.CRITICAL)
    sys.exit(main())
