"""Consumers, brokers, publishers and the database killed in turn, with the digits oracle: `make soak-stream SECONDS=300`.

Three brokers, two consumers with leases of seconds, four publishers. Two of them are trackers here, on shared threads,
whose sink publishes some messages twice: at once, and again when the brokers' duplicate window has passed. Two are
processes, one with a journal, which is killed and started again.

Killed at once (`kill -9`): a consumer, the broker that leads, all brokers, the publisher with the journal, Postgres
(immediate shutdown). Stopped past its lease and continued: a consumer.

Exit status 0: nothing missing, nothing doubled, and each kind of trouble was really met.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING

import anyio
import psycopg
from prometheus_client import CollectorRegistry

from tests.conftest import run_migrate
from tests.daemon.harness import ROOT
from tests.daemon.kills import Worker, main, sums_of
from tests.digits import CALLS_PER_THREAD, Digits, Verdict, of_lives
from tests.helpers import wait_until
from tests.stream.cluster import Cluster
from tracker_daemon import Tracker
from tracker_daemon.embedded import EmbeddedPostgres
from tracker_daemon.stream import operations
from tracker_daemon.stream.address import address
from tracker_daemon.stream.broker import Broker
from tracker_daemon.stream.facts import Limits
from tracker_daemon.stream.sink import NatsSink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from uuid import UUID

    from tracker_daemon.stream.messages import Message

PARTITIONS = 3
LEASE = 2.0
WINDOW = 2.0
"""The brokers' duplicate window, seconds."""
_PAUSE = 1.5
_MOST_LATE = 500


class TwiceSink(NatsSink):
    """Publishes one message in fifty twice, and one in fifty again when the duplicate window has passed."""

    def __init__(self, url: str, seed: int, met: Counter[str]) -> None:
        super().__init__(address(url), publish_timeout=2.0)
        self._chance, self._met = random.Random(seed), met
        self._late: list[tuple[float, int, Message]] = []

    async def _publish_in_order(self, broker: Broker, partition: int, messages: list[Message]) -> None:
        now = time.monotonic()
        for due in [late for late in self._late if late[0] < now and late[1] == partition]:
            self._late.remove(due)
            await broker.publish(partition, due[2], 2.0)
            self._met["published again late"] += 1
        for message in list(messages):
            await super()._publish_in_order(broker, partition, [message])
            del messages[0]
            self._met["published"] += 1
            if self._chance.random() < 0.02:
                await broker.publish(partition, message, 2.0)
                self._met["published twice"] += 1
            if self._chance.random() < 0.02 and len(self._late) < _MOST_LATE:
                self._late.append((now + WINDOW * 2, partition, message))


class ConsumerProcess:
    """`tracker-daemon consume` through its lives."""

    def __init__(self, url: str, database: str, name: str, folder: Path, lease: float = LEASE) -> None:
        self.name, self._file = name, folder / f"{name}.log"
        self._command = [sys.executable, "-m", "tracker_daemon", "consume", "--stream", url, "--database", database]
        self._command += ["--lease", str(lease), "--flush-interval", "0.05"]
        self.process: subprocess.Popen[bytes]

    def start(self) -> None:
        """Begin another life."""
        with self._file.open("a") as log:
            self.process = subprocess.Popen(self._command, stderr=log, cwd=ROOT, env={**os.environ, "PYTHONPATH": "."})

    def kill(self) -> None:
        """End this life at once."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """End this life by SIGTERM; return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    @property
    def log(self) -> str:
        """What it has logged."""
        return self._file.read_text()


class Kills:
    """One run.

    Args:
        folder: whose subfolders the server's user can reach.
        seconds: how long things are killed.
        seed: of what is killed when.
        say: takes a line about what was met.
    """

    def __init__(self, folder: Path, seconds: float, seed: int, say: Callable[[str], object] = print) -> None:
        self._folder, self._seconds, self._say = folder, seconds, say
        self._random = random.Random(seed)
        self.met: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        self._digits, self._lock = Digits(), threading.Lock()
        self._over = threading.Event()
        self.producers: set[UUID] = set()
        self.verdict = Verdict()

    def run(self) -> bool:
        """Kill until the time is up; return whether every call was counted once."""
        with (
            EmbeddedPostgres(self._folder / "pg", settings={"max_connections": "60"}, port=0) as self._postgres,
            Cluster(self._folder / "nats", sync="2m") as self._cluster,
        ):
            run_migrate(self._postgres.conninfo)
            self._url = self._cluster.url("chat")
            limits = Limits(max_bytes=64 << 20, duplicate_window=WINDOW)
            anyio.run(operations.create, address(self._url), PARTITIONS, limits)
            database = self._postgres.conninfo
            self._consumers = [ConsumerProcess(self._url, database, f"c{i}", self._folder) for i in range(2)]
            self._workers = [Worker(self._url, f"w{i}", self._folder, journal=i == 0) for i in range(2)]
            registry = CollectorRegistry()
            self._trackers = [
                Tracker(TwiceSink(self._url, i, self.met), flush_interval=0.05, registry=registry) for i in range(2)
            ]
            try:
                self._storm()
            finally:
                self._over.set()
                for consumer in self._consumers:
                    if consumer.process.poll() is None:
                        consumer.process.send_signal(signal.SIGCONT)
                        consumer.kill()
                for worker in self._workers:
                    if worker.process.poll() is None:
                        worker.kill()
            return self._judge()

    # -- traffic -----------------------------------------------------------------------------------

    def _storm(self) -> None:
        for each in (*self._consumers, *self._workers):
            each.start()
        callers = [threading.Thread(target=self._call, args=(number,)) for number in range(2)]
        for caller in callers:
            caller.start()
        wait_until(lambda: len(self._sums()) > 10, "the first rows", 60)
        self._kill_in_turn()
        self._over.set()
        for caller in callers:
            caller.join()
        for worker in self._workers:
            worker.process.send_signal(signal.SIGTERM)
        statuses = [worker.process.wait(90) for worker in self._workers]
        assert statuses == [0] * len(statuses), statuses
        for tracker in self._trackers:
            assert tracker.close(90).lost == 0
        began = time.monotonic()
        while time.monotonic() - began < 60:
            self.verdict = self._digits.read({name: n for name, n in self._sums().items() if not self._of_worker(name)})
            if self.verdict.exact and not self._missing_of_workers():
                break
            time.sleep(0.5)  # the end may bring more: what was published is still on its way
        # What came twice may still be on its way, too.
        for consumer in self._consumers:
            assert consumer.stop() == 0, consumer.log
        self.verdict = self._digits.read({name: n for name, n in self._sums().items() if not self._of_worker(name)})

    def _call(self, number: int) -> None:
        tracker, calls, group = self._trackers[number], 0, 0
        while not self._over.wait(0.001):
            # Threads of both, and a few at a time, so that batches of both meet in one transaction.
            name = f"t{group}.{calls % 7}"
            with self._lock:
                if self._digits.made.get(name, 0) >= CALLS_PER_THREAD:
                    group += 1
                    continue
                tokens = self._digits.tokens(name)
                assert tracker.record_turn(name, f"a{number}", tokens)
            calls += 1

    def _sums(self) -> dict[str, int]:
        return sums_of(self._postgres.conninfo)

    def _of_worker(self, thread_id: str) -> bool:
        return thread_id.startswith("w")

    # -- trouble -----------------------------------------------------------------------------------

    def _kill_in_turn(self) -> None:
        kinds: list[Callable[[], None]] = [
            self._kill_consumer,
            self._kill_leader,
            self._stop_consumer,
            self._kill_worker,
            self._restart_postgres,
            self._kill_all_brokers,
        ]
        until = time.monotonic() + self._seconds
        deck: list[Callable[[], None]] = []
        while time.monotonic() < until or deck:
            deck = deck or self._random.sample(kinds, len(kinds))
            deck.pop()()
            time.sleep(self._random.uniform(0.3, 1.0) * _PAUSE)  # the length of a run is the point

    def _kill_consumer(self) -> None:
        consumer = self._random.choice(self._consumers)
        self.injected["consumer killed"] += 1
        consumer.kill()
        consumer.start()

    def _stop_consumer(self) -> None:
        consumer = self._random.choice(self._consumers)
        self.injected["consumer stopped past its lease"] += 1
        consumer.process.send_signal(signal.SIGSTOP)
        time.sleep(LEASE * 1.7)  # the lease is real time
        consumer.process.send_signal(signal.SIGCONT)

    def _kill_leader(self) -> None:
        wait_until(lambda: self._leader() is not None, "a leader", 60)
        if (leader := self._leader()) is not None:
            self.injected["leading broker killed"] += 1
            self._cluster.kill(leader)
            time.sleep(self._random.uniform(0.5, 3.0))
            self._cluster.start(leader)

    def _kill_all_brokers(self) -> None:
        self.injected["all brokers killed"] += 1
        self._cluster.kill()
        self._cluster.start()

    def _kill_worker(self) -> None:
        self.injected["publisher killed"] += 1
        self._workers[0].kill()
        self._workers[0].start()

    def _restart_postgres(self) -> None:
        self.injected["Postgres stopped hard"] += 1
        self._postgres.restart("immediate")

    def _leader(self) -> int | None:
        async def ask() -> str:
            broker = Broker(address(self._url))
            try:
                facts = await broker.facts(self._random.randrange(PARTITIONS))
            finally:
                await broker.aclose()
            return facts.leader if facts is not None else ""

        try:
            return self._cluster.names.index(anyio.run(ask))
        except Exception:  # none leads now: there is enough trouble
            return None

    # -- the verdict -------------------------------------------------------------------------------

    def _made(self) -> Iterator[tuple[str, int, set[int]]]:
        """Yield under each worker's life how many calls were made, and which of them may be counted or not."""
        for worker in self._workers:
            for name, calls, _, _, _, killed in worker.numbers():
                # The last call of a killed one may have been taken without having returned.
                yield name, calls, {calls} if killed else set()

    def _of_workers(self) -> tuple[list[str], list[str], int]:
        return of_lives(self._sums(), self._made())

    def _missing_of_workers(self) -> list[str]:
        return self._of_workers()[0]

    def _judge(self) -> bool:
        verdict = self.verdict
        missing, doubled, once = self._of_workers()
        logs = "".join(consumer.log for consumer in self._consumers)
        self.met["ownership lost"] = logs.count("partition_lost")
        self.met["ownership taken"] = logs.count("partition_claimed")
        with psycopg.connect(self._postgres.conninfo) as connection:
            [(rows, messages)] = connection.execute(
                "SELECT (SELECT count(*) FROM conversations),"
                " (SELECT sum(applied_sequence) FROM tracker_ledger WHERE epoch > 0)"
            ).fetchall()
        self._say(f"injected: {dict(self.injected)}")
        self._say(f"met: {dict(self.met)}; {messages} messages in {PARTITIONS} partitions, {rows} rows")
        self._say(
            f"{verdict.once + once} calls counted once, missing {len(verdict.missing) + len(missing)}, "
            f"doubled {len(verdict.doubled) + len(doubled)}"
        )
        if not verdict.exact or missing or doubled:
            self._say(f"{verdict.missing[:3]} {verdict.doubled[:3]} {missing[:3]} {missing[-3:]} {doubled[:3]}")
            self._say(logs[-20_000:])
        return verdict.exact and not missing and not doubled and verdict.once > 0 and once > 0


if __name__ == "__main__":
    sys.exit(main(Kills))
