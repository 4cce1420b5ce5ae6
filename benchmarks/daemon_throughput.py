"""Calls a second that a daemon takes over its Unix socket from eight workers, and what a call costs them meanwhile.

The same workers with the same pace write into the same database in process, for comparison. Prints the versions and
what the server does for durability.

    python benchmarks/daemon_throughput.py [--seconds 10] [--workers 8] [--rate 0]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psycopg

from tracker_daemon.embedded import EmbeddedPostgres

WORKER = """
import json, os, sys, time
from prometheus_client import CollectorRegistry
from tracker_daemon import Tracker
url, name, seconds, rate = sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
names = [f"{name}-{i}" for i in range(500)]
clock, costs, made = time.perf_counter_ns, [], 0
with Tracker(url, registry=CollectorRegistry(), max_queue_size=10**6) as tracker:
    tracker.record_turn(names[0]); tracker.flush(60)
    print("ready", flush=True); sys.stdin.readline()
    began = time.perf_counter()
    until = began + seconds
    while (now := time.perf_counter()) < until:
        for i in range(100):
            before = clock()
            taken = tracker.record_turn(names[(made + i) % 500], "billing", 12, 0.5)
            costs.append(clock() - before)
            assert taken
        made += 100
        pause = began + made / rate - now if rate else 0
        if pause > 0:
            time.sleep(pause)  # the pace asked for
    tracker.flush(120)
    took = time.perf_counter() - began
costs.sort()
print(json.dumps({"made": made, "took": took, "p50": costs[len(costs) // 2], "p99": costs[len(costs) * 99 // 100]}))
"""


def measure(url: str, workers: int, seconds: float, rate: float) -> dict[str, float]:
    """Return calls a second until all are committed, and the median and p99 of a call in nanoseconds."""
    arguments = [str(seconds), str(rate)]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, url, f"w{number}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(workers)
    ]
    for each in started:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    for each in started:
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    found = [json.loads(each.communicate()[0]) for each in started]
    return {
        "calls/s": sum(each["made"] for each in found) / max(each["took"] for each in found),
        "p50 ns": sorted(each["p50"] for each in found)[workers // 2],
        "p99 ns": max(each["p99"] for each in found),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--rate", type=float, default=0, help="Calls a second of each worker; 0: as many as it can.")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="trk-"))
    folder.chmod(0o755)
    try:
        with EmbeddedPostgres(folder / "pg", port=0) as server:
            _run(server, folder, given)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(server: EmbeddedPostgres, folder: Path, given: argparse.Namespace) -> None:
    command = [sys.executable, "-m", "tracker_daemon"]
    subprocess.run([*command, "migrate", "--database", server.conninfo], check=True, stdout=subprocess.DEVNULL)
    with psycopg.connect(server.conninfo) as connection:
        shown = {
            name: connection.execute(f"SHOW {name}").fetchone()
            for name in ("server_version", "fsync", "synchronous_commit", "full_page_writes")
        }
    settings = ", ".join(f"{name}={value[0]}" for name, value in shown.items() if value)
    cores = len(os.sched_getaffinity(0))
    print(f"Python {platform.python_version()}, {settings}, {cores} cores (load {os.getloadavg()[0]:.1f})")
    print(
        f"{given.workers} workers, {given.seconds:g} s, {given.rate or 'as many as they can'} calls/s each, no journal"
    )
    socket = f"unix:{folder}/s"
    daemon = subprocess.Popen(
        [*command, "serve", "--database", server.conninfo, "--listen", socket, "--log-level", "error"]
    )
    try:
        while subprocess.run([*command, "health", "--listen", socket], check=False, capture_output=True).returncode:
            time.sleep(0.2)  # between two looks
        for name, url in (("in process", server.conninfo), ("daemon", socket)):
            found = measure(url, given.workers, given.seconds, given.rate)
            print(f"{name:12}" + ", ".join(f"{key} {value:,.0f}" for key, value in found.items()))
    finally:
        daemon.terminate()
        daemon.wait(60)


if __name__ == "__main__":
    main()
