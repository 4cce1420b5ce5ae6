"""Faults for as long as asked, on a real Postgres, with the digits oracle: `make soak SECONDS=300`.

Two trackers on overlapping threads, called from six threads, behind a proxy that fails messages, in front of a server
(fsync and synchronous_commit on) that is restarted, stopped, locked and made read-only. At the end the server is put back to an
earlier copy of itself, as a restored backup does, so that it has forgotten commits: what is missing then must be
exactly what was in them.

Exit status 0: nothing lost, nothing doubled, and each kind of trouble was really met.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from prometheus_client import CollectorRegistry

from tests.conftest import run_migrate
from tests.digits import CALLS_PER_THREAD, Digits, Verdict
from tests.faults.proxy import Blackhole, Cut, CutAfter, Delay, FaultProxy, Refuse
from tracker_daemon import Tracker
from tracker_daemon.embedded import EmbeddedPostgres
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.sink import PostgresSink
from tracker_daemon.sink import Applied, LedgerRegressed, SinkFault

if TYPE_CHECKING:
    from collections.abc import Callable

    from tracker_daemon.batch import Batch

TIMEOUT = 1.0
POISON = "poison"


class WatchedSink(PostgresSink):
    """Counts what a flush met, and keeps which calls each applied batch held."""

    def __init__(self, conninfo: str, met: Counter[str], applied: dict[tuple[str, int, int], Batch]) -> None:
        super().__init__(Connector(conninfo), (None, "conversations"), statement_timeout=TIMEOUT, copy_from=400)
        self._met, self._batches = met, applied

    async def apply(self, batch: Batch) -> Applied:
        """Apply, and count how it went."""
        try:
            applied = await super().apply(batch)
        except SinkFault as fault:
            self._met[f"error {fault.kind}"] += 1
            if fault.kind in ("connection", "timeout"):
                self._met["in doubt"] += 1
            raise
        except LedgerRegressed:
            self._met["regressions"] += 1
            raise
        self._met["batches"] += 1
        self._met["found done"] += applied.duplicate
        self._met["dead letters"] += len(applied.dead_letters)
        self._batches[str(batch.producer), batch.epoch, batch.sequence] = batch
        return applied

    async def _flush_apart(self, session: Any, batch: Batch) -> Applied:
        self._met["splits"] += 1
        return await super()._flush_apart(session, batch)


class Soak:
    """One run.

    Args:
        folder: for the server; it must be reachable by the server's user.
        seconds: how long faults are injected.
        seed: of the faults and the traffic.
    """

    def __init__(self, folder: Path, seconds: float, seed: int, say: Callable[[str], None]) -> None:
        self.folder, self.seconds, self.say = folder, seconds, say
        self.random = random.Random(seed)
        self.met: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.batches: dict[tuple[str, int, int], Batch] = {}
        self.digits = Digits()
        self.poisoned: set[str] = set()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._deck: list[str] = []
        self.registry = CollectorRegistry()
        self.forgotten_exactly = False
        self.verdict = Verdict()
        self.calls = 0

    def run(self) -> bool:
        """Run it; return whether everything was exact and every kind of trouble was met."""
        with EmbeddedPostgres(self.folder / "pg", settings={"deadlock_timeout": "200ms"}) as server:
            run_migrate(server.conninfo)
            with psycopg.connect(server.conninfo, autocommit=True) as admin:
                admin.execute(f"ALTER TABLE conversations ADD CHECK (thread_id NOT LIKE '{POISON}%')")
            with FaultProxy(server.conninfo) as proxy:
                self._storm(server, proxy)
            self.verdict = self.digits.read(self._sums(server))
            self.forgotten_exactly = self._forget(server)
        return self._judge()

    # -- traffic -----------------------------------------------------------------------------------

    def _trackers(self, conninfo: str) -> list[Tracker]:
        options: dict[str, Any] = {"flush_interval": 0.05, "max_batch_size": 800, "registry": self.registry}
        return [Tracker(WatchedSink(conninfo, self.met, self.batches), **options) for _ in range(2)]

    def _storm(self, server: EmbeddedPostgres, proxy: FaultProxy) -> None:
        trackers = self._trackers(proxy.conninfo)
        seeds = [self.random.random() for _ in range(6)]
        callers = [
            threading.Thread(target=self._call, args=[trackers[i % 2], random.Random(seed)])
            for i, seed in enumerate(seeds)
        ]
        for caller in callers:
            caller.start()
        self._poison(trackers[0], f"{POISON}-first")
        end = time.monotonic() + self.seconds
        next_word = time.monotonic() + 10
        while time.monotonic() < end:
            before = self.met["batches"]
            self._inject(server, proxy)
            proxy.disarm()
            # Let a batch through: faults on top of nothing but faults meet only reconnects.
            patience = time.monotonic() + 6
            while self.met["batches"] == before and time.monotonic() < patience:
                self._over.wait(0.01)
            if time.monotonic() > next_word:
                next_word += 10
                self.say(f"{max(0, end - time.monotonic()):4.0f} s left: {self.calls} calls, {dict(self.faults)}")
        self._over.set()
        for caller in callers:
            caller.join()
        proxy.disarm()
        proxy.release()
        for tracker in trackers:
            tracker.flush(120)
            report = tracker.close(30)
            self.met["reported lost"] += report.lost

    def _call(self, tracker: Tracker, chance: random.Random) -> None:
        while not self._over.is_set():
            for _ in range(chance.randrange(1, 200)):
                if chance.random() < 0.00002:
                    self._poison(tracker, f"{POISON}-{chance.randrange(10**9)}")
                    continue
                with self._lock:
                    thread_id = f"t-{int(chance.paretovariate(0.7)) % 2_000}-{self.calls // 20_000}"
                    if self.digits.made.get(thread_id, 0) >= CALLS_PER_THREAD:
                        continue
                    tokens = self.digits.tokens(thread_id)
                    self.calls += 1
                if not tracker.record_turn(thread_id, f"agent-{chance.randrange(5)}", tokens, 0.001):
                    self.met["rejected"] += 1
            self._over.wait(0.01)

    def _poison(self, tracker: Tracker, thread_id: str) -> None:
        """Call for a thread that the table will refuse."""
        if tracker.record_turn(thread_id):
            with self._lock:
                self.poisoned.add(thread_id)
                self.calls += 1

    # -- faults ------------------------------------------------------------------------------------

    def _inject(self, server: EmbeddedPostgres, proxy: FaultProxy) -> None:
        chance = self.random
        direction, n = chance.choice(["client", "server"]), chance.randrange(1, 25)
        quick: list[tuple[str, Any]] = [
            ("message cut", Cut(direction, n)),
            ("message cut in the middle", Cut(direction, n, after=chance.randrange(1, 30))),
            ("answer lost", CutAfter(direction, n)),
            ("answer of the flush lost", Cut("server", 1, kind="C", contains=b"SELECT 1")),
            ("answer of COMMIT lost", Cut("server", 1, kind="C", contains=b"COMMIT")),
            ("message late", Delay(direction, n, seconds=0.3)),
            ("peer deaf", Blackhole(direction, n, seconds=3)),
            ("connections refused", Refuse(repeat=3)),
        ]
        slow: list[tuple[str, Callable[[EmbeddedPostgres], None]]] = [
            ("backends terminated", self._terminate),
            ("statements cancelled", self._cancel),
            ("table locked", self._lock_table),
            ("server stopped and continued", self._pause),
            ("database read-only", self._read_only),
            ("server restarted at once", self._restart),
        ]
        if not self._deck:
            # Each kind in every round, the quick ones twice.
            self._deck = [name for name, _ in [*quick, *quick, *slow]]
            chance.shuffle(self._deck)
        name = self._deck.pop()
        if name in dict(slow):
            with suppress(psycopg.Error):
                dict(slow)[name](server)
                self.faults[name] += 1
            return
        proxy.arm(dict(quick)[name])
        if name == "connections refused":
            proxy.sever_all()
        with suppress(TimeoutError):
            proxy.wait_fired(3)
            self.faults[name] += 1

    def _admin(self, server: EmbeddedPostgres) -> psycopg.Connection[Any]:
        return psycopg.connect(server.conninfo, autocommit=True)

    def _terminate(self, server: EmbeddedPostgres) -> None:
        with self._admin(server) as admin:
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'tracker-daemon'"
            )

    def _cancel(self, server: EmbeddedPostgres) -> None:
        with self._admin(server) as admin:
            admin.execute(
                "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE application_name = 'tracker-daemon'"
            )

    def _lock_table(self, server: EmbeddedPostgres) -> None:
        with psycopg.connect(server.conninfo) as admin:
            admin.execute("LOCK TABLE conversations IN ACCESS EXCLUSIVE MODE")
            admin.execute("SELECT pg_sleep(1)")

    def _pause(self, server: EmbeddedPostgres) -> None:
        with self._admin(server) as admin:
            found = admin.execute(
                "SELECT pid FROM pg_stat_activity WHERE application_name = 'tracker-daemon'"
            ).fetchall()
        pids = [server.pid, *(row[0] for row in found)]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        try:
            self._over.wait(2 * TIMEOUT)
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def _read_only(self, server: EmbeddedPostgres) -> None:
        with self._admin(server) as admin:
            try:
                admin.execute("ALTER DATABASE postgres SET default_transaction_read_only = on")
                admin.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'tracker-daemon'"
                )
                self._over.wait(0.5)
            finally:
                admin.execute("SET default_transaction_read_only = off")
                admin.execute("ALTER DATABASE postgres RESET default_transaction_read_only")

    def _restart(self, server: EmbeddedPostgres) -> None:
        server.restart("immediate")

    # -- the database forgets ----------------------------------------------------------------------

    def _forget(self, server: EmbeddedPostgres) -> bool:
        """Put the server back to a copy of itself; return whether exactly the commits since then are missing."""
        digits, data = Digits(), self.folder / "pg" / "data"
        trackers = self._trackers(server.conninfo)

        def call(round_: int) -> None:
            for tracker in trackers:
                for i in range(300):
                    thread_id = f"f-{round_}-{i % 150}"
                    tracker.record_turn(thread_id, "agent", digits.tokens(thread_id))
                tracker.flush(60)

        call(0)
        server.stop()
        copy = self.folder / "copy"
        shutil.copytree(data, copy, symlinks=True)
        for folder, names, files in os.walk(data):
            for name in ["", *names, *files]:
                original = Path(folder) / name
                twin = copy / original.relative_to(data)
                owner = original.lstat()
                os.chown(twin, owner.st_uid, owner.st_gid, follow_symlinks=False)
        server.start()
        known = set(self.batches)
        call(1)
        forgotten = [self.batches[key] for key in set(self.batches) - known]
        server.stop("immediate")
        shutil.rmtree(data)
        copy.rename(data)
        server.start()
        call(2)
        for tracker in trackers:
            tracker.close()
        verdict = digits.read({k: v for k, v in self._sums(server).items() if k.startswith("f-")})
        expected = Counter({delta.thread_id: 0 for batch in forgotten for delta in batch.deltas})
        for batch in forgotten:
            for delta in batch.deltas:
                expected[delta.thread_id] += delta.turns
        missing = Counter(thread_id for thread_id, _ in verdict.missing)
        self.met["calls forgotten by the database"] = missing.total()
        return not verdict.doubled and missing == expected and missing.total() > 0

    # -- the end -----------------------------------------------------------------------------------

    def _sums(self, server: EmbeddedPostgres) -> dict[str, int]:
        with psycopg.connect(server.conninfo) as connection:
            found = connection.execute("SELECT thread_id, total_tokens FROM conversations").fetchall()
            dead = connection.execute("SELECT thread_id FROM tracker_dead_letters").fetchall()
        self.met["poisoned threads without a dead letter"] = len(self.poisoned - {row[0] for row in dead})
        return {row[0]: row[1] for row in found}

    def _judge(self) -> bool:
        needed = ["in doubt", "found done", "splits", "dead letters", "regressions"]
        unmet = [name for name in needed if not self.met[name]]
        identity = self._identity()
        self.say("")
        self.say("faults injected")
        for name, count in self.faults.most_common():
            self.say(f"  {name:32} {count:>9,}")
        self.say("met")
        for name, count in sorted(self.met.items()):
            self.say(f"  {name:48} {count:>9,}")
        self.say("verdict")
        self.say(f"  calls made                       {self.calls:>9,}")
        self.say(f"  counted once                     {self.verdict.once:>9,}")
        self.say(f"  lost                             {len(self.verdict.missing):>9,}")
        self.say(f"  doubled                          {len(self.verdict.doubled):>9,}")
        self.say(f"  metrics add up                   {identity!s:>9}")
        self.say(f"  forgotten by the database: exactly those missing {self.forgotten_exactly!s:>9}")
        if unmet:
            self.say(f"  never met: {', '.join(unmet)}: the run proves nothing about it")
        lost = self.met["reported lost"] + self.met["rejected"] + self.met["poisoned threads without a dead letter"]
        return self.verdict.exact and self.forgotten_exactly and identity and not unmet and not lost

    def _identity(self) -> bool:
        total: Counter[str] = Counter()
        for family in self.registry.collect():
            for sample in family.samples:
                total[sample.name] += sample.value  # type: ignore[assignment]
        gone = ("calls_applied_total", "calls_dead_lettered_total", "calls_lost_total", "queue_calls")
        return total["tracker_calls_accepted_total"] == sum(total[f"tracker_{name}"] for name in gone)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Inject faults and count what is lost and what is doubled.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="tracker-soak-"))
    folder.chmod(0o755)
    print(f"seed {options.seed}, {options.seconds:g} s, PostgreSQL with fsync=on synchronous_commit=on", flush=True)  # noqa: T201
    try:
        exact = Soak(folder, options.seconds, options.seed, lambda line: print(line, flush=True)).run()  # noqa: T201
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if exact else 1


if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.CRITICAL)
    sys.exit(main())
