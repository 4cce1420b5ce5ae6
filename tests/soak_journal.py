"""Kills: `make soak-journal KILLS=1000`. What a process was told is accepted survives `kill -9`, and counts once.

One life after the other works on the same journal: several threads call, and note each call, in memory that outlives
the process, after it returned `True`. With `--forks N` each life also forks so many children, one after the other, that
call and end without closing, and takes over what they left. The supervisor, outside, kills the life (SIGKILL) at a random instant, or while it
recovers, flushes or closes, or while the server is stopped or restarts; settings differ from life to life. Now and
then it leaves half a record behind the last one, as a kill in the middle of a copy does. At the end a last life drains,
and the table is compared with the notes by the digits oracle.

A call that was accepted and not noted yet may be there or not: at most one per calling thread and kill.

Exit status 0: nothing missing, nothing doubled, and each kind of trouble was really met.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing, suppress
from enum import IntEnum
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psycopg
from prometheus_client import CollectorRegistry

from tests.conftest import run_migrate
from tests.digits import CALLS_PER_THREAD, Digits, Verdict
from tests.helpers import command, query
from tracker_daemon import Tracker
from tracker_daemon.embedded import EmbeddedPostgres
from tracker_daemon.journal import records

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CALLERS = 3
MOST_CALLS = 2_000  # a caller and life
MOST_FORKS = 40
PLACES = 7
PATIENCE = 60.0
TORN = "half-a-record"
# Each kind in every round, in a random order.
ROUND = [
    "any instant",
    "any instant",
    "any instant",
    "at the start",
    "recovery",
    "recovery",
    "flush",
    "flush",
    "close",
    "close",
    "server away",
    "server restarts",
]
NEEDED = [
    "kills that left something pending",
    "windows recovered",
    "batches found already applied",
    "torn tails",
    "windows spilled",
    "kills in recovery",
    "kills in a flush",
    "kills in a close",
    "kills with the server away",
    "kills with the server restarting",
]


NEEDED_OF_FORKS = ["times taken over from dead children", "calls of children"]
NEEDED_OF_MANY = ["kills while taking over"]
"""Of runs with forks and a hundred kills: in a shorter one it may not come to that."""
NEEDED_OF_FEW = ["kills that left something pending", "windows recovered"]
"""Of runs with fewer than fifty kills: to which others it comes there is chance."""


class Note(IntEnum):
    """Where a life notes what, in words."""

    PRODUCER = 0
    READY = 2
    RECOVERING = 3
    RECOVERED = 4
    """Windows of earlier lives applied, or found applied."""
    FOUND_APPLIED = 5
    """Batches of earlier lives that the ledger had already."""
    TORN = 6
    SPILLED = 7
    """Windows sealed into files alone."""
    SETTLED = 8
    """The sequence of the last batch of its own that this life knows to be applied."""
    FLUSHING = 9
    FLUSHED = 10
    CLOSING = 11
    REFUSED = 12
    RECOVERED_ALL = 13
    CHILD = 14
    """The process id of the last child."""
    TAKING_OVER = 15
    TAKEN_OVER = 16
    CALLS = 17
    """From here on: calls noted, by caller; then by child."""


def call(name: str, caller: int, number: int) -> tuple[str, int]:
    """Return thread and tokens of a caller's call: round over a few threads, then over new ones."""
    block, rest = divmod(number, PLACES * CALLS_PER_THREAD)
    digit, place = divmod(rest, PLACES)
    return f"{name}-{caller}-{block}-{place}", 4**digit


class Notes:
    """The words that one life shares with the supervisor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(8 * (Note.CALLS + CALLERS + MOST_FORKS)))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._words = memoryview(self._map).cast("Q")

    def __getitem__(self, index: int) -> int:
        return int(self._words[index])

    @property
    def producer(self) -> UUID:
        """The life's, once it is ready."""
        return UUID(int=(self[Note.PRODUCER] << 64) + self[Note.PRODUCER + 1])

    @property
    def calls(self) -> list[int]:
        """Calls noted, by caller, and then by child."""
        return [self[Note.CALLS + caller] for caller in range(CALLERS + MOST_FORKS)]

    def close(self) -> None:
        """Let go."""
        self._words.release()
        self._map.close()
        self.path.unlink()


class Victims:
    """The program that begins lives: everything is loaded in it, a life is a fork."""

    def __init__(self, errors: Path) -> None:
        self._errors = errors.open("w")
        self._life = 0
        self.process = subprocess.Popen(
            command("journal_victim.py"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )

    def begin(self, **life: Any) -> int:
        """Begin a life; return its process id."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{json.dumps(life)}\n")
        self.process.stdin.flush()
        self._life = int(self._answer()["pid"])
        return self._life

    def end(self, pid: int) -> int:
        """Kill a life, and the child it has; return the status it ended with."""
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        return int(self._answer()["status"])

    def _answer(self) -> dict[str, int]:
        assert self.process.stdout is not None
        answer: dict[str, int] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        """End the program and whatever it began."""
        for group in (self.process.pid, self._life):
            with suppress(ProcessLookupError):
                if group:
                    os.killpg(group, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            assert stream is not None
            stream.close()


class KillSoak:
    """One run.

    Args:
        folder: for the server and the journal; it must be reachable by the server's user.
        kills: how many.
        forks: how many children each life forks.
        seed: of the instants and the settings.
        say: told how it goes.
    """

    def __init__(self, folder: Path, kills: int, seed: int, say: Callable[[str], None], forks: int = 0) -> None:
        self.folder, self.kills, self.say, self.forks = folder, kills, say, forks
        self.random = random.Random(seed)
        self.journal = folder / "journal"
        self.met: Counter[str] = Counter()
        self.noted: dict[str, list[int]] = {}
        """Calls noted by caller, by life."""
        self.verdict = Verdict()
        self.in_doubt = 0
        """Calls accepted and not noted that are there."""
        self.seconds = 0.0
        self._url = ""
        self._deck: list[str] = []
        self._pause = Event()

    def run(self) -> bool:
        """Run it; return whether everything was exact and every kind of trouble was met."""
        began = time.monotonic()
        errors = self.folder / "errors.log"
        with EmbeddedPostgres(self.folder / "pg", settings={"fsync": "off", "max_connections": "50"}) as server:
            run_migrate(server.conninfo)
            self._url = server.conninfo
            with closing(Victims(errors)) as victims:
                for number in range(self.kills):
                    self._life(server, victims, f"{number}", self._next_kind())
                    if number % 50 == 49:
                        self.say(f"{number + 1} kills: {sum(map(sum, self.noted.values())):,} calls, {dict(self.met)}")
            if not server.running:
                server.start()
            self._drain(server)
            self._compare(server)
        self.seconds = time.monotonic() - began
        self._told = [line for line in errors.read_text().splitlines() if "event=calls_rejected" not in line]
        return self._judge()

    # -- lives -------------------------------------------------------------------------------------

    def _next_kind(self) -> str:
        if not self._deck:
            self._deck = list(ROUND)
            self.random.shuffle(self._deck)
        return self._deck.pop()

    def _life(self, server: EmbeddedPostgres, victims: Victims, name: str, kind: str) -> None:
        chance = self.random
        if not server.running:
            kind = "server away"  # still
        elif kind == "server away":
            server.stop("immediate")
        with closing(Notes(self.folder / "notes")) as notes:
            pid = victims.begin(
                url=self._url,
                journal=str(self.journal),
                name=name,
                notes=str(notes.path),
                callers=CALLERS,
                close_within=chance.choice([0.05, 5.0]),
                forks=self.forks,
                **self._settings(kind),
            )
            restart = Thread(target=server.restart, args=("immediate",)) if kind == "server restarts" else None
            self._await_instant(kind, pid, notes, restart)
            status = victims.end(pid)
            assert status in (-signal.SIGKILL, 0), f"life {name} ended with {status}"
            self._until(lambda: not notes[Note.CHILD] or has_ended(notes[Note.CHILD]), notes)
            self._until(self._is_free, notes)
            self._look(notes, name, kind, killed=status != 0, server=server if server.running else None)
        if restart is not None and restart.ident:
            restart.join()
        self._maybe_tear()
        if not server.running and (kind != "server away" or chance.random() < 0.6):
            server.start()

    def _is_free(self) -> bool:
        """Whether nobody holds the journal: a child that dies right behind its fork has its parent's lock until then."""
        with suppress(FileNotFoundError, BlockingIOError), (self.journal / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return not (self.journal / "lock").exists()

    def _settings(self, kind: str) -> dict[str, Any]:
        chance = self.random
        small = kind == "server away" or chance.random() < 0.2
        return {
            "tracker": {
                "create_missing": chance.random() < 0.5,
                "lanes": chance.choice([1, 1, 2, 3]),
                "max_batch_size": chance.choice([3, 100, 100, 10_000, 10_000]),
                "flush_interval": chance.choice([0.002, 0.02, 0.25]),
                "journal_sync": chance.choice([0, 0.1]),
                # Each start looks at what is kept of every child: at so many that lives end before they are through.
                "journal_retain": chance.choice([0, 0, 1] if self.forks else [0, 1, 10]),
                "max_pending": 40 if small else 1_000_000,
                "max_queue_size": 200 if small else 100_000,
                "journal_quota": 256 << 20,
            },
        }

    def _await_instant(self, kind: str, pid: int, notes: Notes, restart: Thread | None) -> None:
        """Return when the life is to be killed."""
        chance = self.random
        if kind == "at the start":
            self._pause.wait(chance.uniform(0, 0.03))
            return
        if kind == "recovery":
            # Begun, or there is nothing to recover.
            self._until(lambda: notes[Note.RECOVERING] or notes[Note.SETTLED], notes)
            self._pause.wait(chance.uniform(0, 0.01))
            return
        self._until(lambda: notes[Note.READY], notes)
        if restart is not None:
            self._pause.wait(chance.uniform(0, 0.1))
            restart.start()
        elif kind != "server away" and chance.random() < 0.4:
            self._until(lambda: notes[Note.RECOVERED_ALL], notes)
        self._pause.wait(chance.uniform(0, 1.5 if self.forks else 0.3))
        if kind == "flush":
            done = [MOST_CALLS] * CALLERS
            self._until(lambda: notes[Note.FLUSHING] > notes[Note.FLUSHED] or notes.calls[:CALLERS] == done, notes)
            self._pause.wait(chance.uniform(0, 0.003))
        elif kind == "close":
            os.kill(pid, signal.SIGTERM)
            self._until(lambda: notes[Note.CLOSING], notes)
            self._pause.wait(chance.uniform(0, 0.05))

    def _until(self, condition: Callable[[], object], notes: Notes) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                words = {note.name: notes[note] for note in Note}
                raise AssertionError(f"{words}\n{(self.folder / 'errors.log').read_text()[-5_000:]}")
            self._pause.wait(0.0002)

    def _look(self, notes: Notes, name: str, kind: str, *, killed: bool, server: EmbeddedPostgres | None) -> None:
        """Take down what a life noted."""
        self.noted[name] = notes.calls
        met = self.met
        met["kills"] += killed
        met["ended before the kill"] += not killed
        met["windows recovered"] += notes[Note.RECOVERED]
        met["kills that left something pending"] += bool(notes[Note.RECOVERED])
        met["batches found already applied"] += notes[Note.FOUND_APPLIED]
        met["torn tails"] += notes[Note.TORN]
        met["windows spilled"] += notes[Note.SPILLED]
        met["calls refused"] += notes[Note.REFUSED]
        met["calls of children"] += sum(notes.calls[CALLERS:])
        met["times taken over from dead children"] += notes[Note.TAKEN_OVER]
        met["kills while taking over"] += killed and notes[Note.TAKING_OVER] > notes[Note.TAKEN_OVER]
        if not killed:
            return
        met["kills in recovery"] += not notes[Note.RECOVERED_ALL]
        met["kills in a flush"] += notes[Note.FLUSHING] > notes[Note.FLUSHED]
        met["kills in a close"] += bool(notes[Note.CLOSING])
        met["kills with the server away"] += kind == "server away"
        met["kills with the server restarting"] += kind == "server restarts"
        if server is not None and notes[Note.READY]:
            with suppress(psycopg.Error), psycopg.connect(server.conninfo) as connection:
                statement = "SELECT applied_sequence FROM tracker_ledger WHERE producer = %s"
                row = connection.execute(statement, [notes.producer]).fetchone()
                met["commits that the life did not live to hear of"] += bool(row and row[0] > notes[Note.SETTLED])

    def _maybe_tear(self) -> None:
        """Leave half a record behind the last one of the newest open file: nobody was told that it is accepted."""
        if self.random.random() > 0.3:
            return
        files = sorted(self.journal.glob("*-open-*.journal"), key=lambda path: path.stat().st_mtime_ns)
        if not files:
            return
        record = records.encode((TORN, "agent", 1, 0.5, time.time_ns()))
        with files[-1].open("r+b") as file:
            data, end = file.read(), 0
            if not data.strip(b"\0"):
                return  # it was only being made
            with suppress(records.Damaged):
                end = end_of_records(data)
            if not end:
                return  # torn already
            file.seek(end)
            file.write(record[: self.random.randrange(1, len(record))])
        self.met["tails torn by hand"] += 1

    # -- the end -----------------------------------------------------------------------------------

    def _drain(self, server: EmbeddedPostgres) -> None:
        with Tracker(server.conninfo, journal=self.journal, registry=CollectorRegistry()) as tracker:
            tracker.flush(PATIENCE)
            self.met["calls recovered at the end"] = tracker.stats().applied
            assert tracker.stats().pending == 0

    def _compare(self, server: EmbeddedPostgres) -> None:
        found = query(server.conninfo, "SELECT thread_id, total_tokens FROM conversations WHERE turn_count > 0")
        self.verdict, self.in_doubt = compare(self.noted, dict(found))

    def _judge(self) -> bool:
        needed = (NEEDED_OF_FEW if self.kills < 50 else NEEDED) + (NEEDED_OF_FORKS if self.forks else [])
        needed += NEEDED_OF_MANY if self.forks and self.kills >= 100 else []
        unmet = [name for name in needed if not self.met[name]]
        accepted = sum(map(sum, self.noted.values()))
        self.say("")
        for name, count in sorted(self.met.items()):
            self.say(f"  {name:48} {count:>12,}")
        self.say("verdict")
        self.say(f"  {'seconds':48} {self.seconds:>12,.0f}")
        self.say(f"  {'calls noted as accepted':48} {accepted:>12,}")
        self.say(f"  {'accepted, killed before the note, and there':48} {self.in_doubt:>12,}")
        self.say(f"  {'counted once':48} {self.verdict.once:>12,}")
        self.say(f"  {'missing':48} {len(self.verdict.missing):>12,}")
        self.say(f"  {'doubled':48} {len(self.verdict.doubled):>12,}")
        for what in ("missing", "doubled"):
            if found := getattr(self.verdict, what):
                self.say(f"  {what}: {found[:20]}")
        for line in self._told[:20]:
            self.say(f"  told: {line}")
        if unmet:
            self.say(f"  never met: {', '.join(unmet)}: the run proves nothing about it")
        return self.verdict.exact and self.verdict.once == accepted and not unmet and not self._told


def has_ended(pid: int) -> bool:
    """Say whether a process is no more, or waits only for somebody to ask how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def end_of_records(data: bytes) -> int:
    """Return where the records in a file's bytes end."""
    offset = records.HEADER_SIZE
    while (payload := records.payload_at(data, offset, len(data))) is not None:
        offset += records.FRAME.size + len(payload)
    return offset


def compare(noted: dict[str, list[int]], sums: dict[str, int]) -> tuple[Verdict, int]:
    """Compare the table's sums with what was noted; return the verdict and how many calls in doubt are there."""
    digits, in_doubt = Digits(), 0
    for name, callers in noted.items():
        for caller, calls in enumerate(callers):
            for thread_id, made in threads(name, caller, calls):
                digits.made[thread_id] = made
            thread_id, tokens = call(name, caller, calls)
            if sums.get(thread_id, 0) // tokens % 4 == 1:
                in_doubt += 1
                sums[thread_id] -= tokens
                if not sums[thread_id]:
                    del sums[thread_id]
    return digits.read(sums), in_doubt


def threads(name: str, caller: int, calls: int) -> Iterator[tuple[str, int]]:
    """Yield each thread of a caller's first *calls* calls, and how many were made on it."""
    full, rest = divmod(calls, PLACES * CALLS_PER_THREAD)
    for block in range(full + 1):
        for place in range(PLACES):
            made = CALLS_PER_THREAD if block < full else (rest + PLACES - 1 - place) // PLACES
            if made:
                yield f"{name}-{caller}-{block}-{place}", made


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Kill a process over and over; count what is missing and doubled.")
    parser.add_argument("--kills", type=int, default=1_000)
    parser.add_argument("--forks", type=int, default=0, choices=range(MOST_FORKS + 1), metavar="N")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="tracker-soak-"))
    folder.chmod(0o755)
    print(f"seed {options.seed}, {options.kills} kills, {CALLERS} callers", flush=True)  # noqa: T201
    try:
        exact = KillSoak(folder, options.kills, options.seed, lambda line: print(line, flush=True), options.forks).run()  # noqa: T201
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if exact else 1


if __name__ == "__main__":
    logging.basicConfig(level=logging.CRITICAL)
    sys.exit(main())
