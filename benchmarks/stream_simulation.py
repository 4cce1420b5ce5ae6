"""How many rows a second reach Postgres from 1,000 hosts of 10,000 calls/s each: a simulation, event by event.

    hosts ──window──> one message a partition ──log──> a consumer a partition ──window──> Postgres

What is simulated: which thread each call is for (every one drawn), what each host's window folds, the messages that it
publishes, what each partition's consumer finds when it turns to its log, and how long its transaction takes. What is
not: the broker, whose latency is a constant, and faults.

Each partition's consumer has one transaction under way and takes all that has come meanwhile, so that windows grow when
Postgres is slow: fewer rows for the same calls. That loop is why this is simulated and not computed.

Postgres is modelled by two numbers: `fixed` seconds a transaction and `rows_per_second` in all, shared by the
transactions under way; one alone reaches `alone` of it (its client's part of the time is not Postgres's).

`--check FILE` runs the model on the cases that `stream_throughput.py` measured, and prints both.
"""

from __future__ import annotations

import argparse
import heapq
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is simulated. Times in seconds, rates a second."""

    hosts: int = 1_000
    calls_per_second: float = 10_000.0
    """Of each host."""
    threads: int = 200_000
    """Live at once, each as busy as the others; a multiple of `hosts`."""
    homes: int = 1_000
    """How many hosts a thread's calls come to, in turn: 1 is a sticky balancer; all of them is none."""
    host_window: float = 1.0
    window: float = 1.0
    """Of the consumers: how long a partition waits from one transaction to the next, at least."""
    partitions: int = 16
    max_batch: int = 100_000
    """Rows in a transaction: no further message is taken once it has as many."""
    rows_per_second: float = 70_000.0
    alone: float = 0.6
    fixed: float = 0.002
    broker: float = 0.005
    """From a window's end to its message's being readable."""
    seconds: float = 25.0
    warm: float = 10.0
    """Left out at the beginning."""
    seed: int = 1


@dataclass
class Outcome:
    """What came of it, a second."""

    calls: float
    deltas: float
    """Of the hosts' windows: what each would write without a stream in between."""
    messages: float
    rows: float
    transactions: float
    lag_p50: float
    lag_p99: float
    """From a window's end to its commit, seconds."""
    backlog: float
    """Seconds of deltas that wait at the end: grows where Postgres cannot follow."""


@dataclass
class Partition:
    """A log and its consumer."""

    waiting: list[tuple[float, np.ndarray]] = field(default_factory=list)
    busy: bool = False
    next_at: float = 0.0


def simulate(case: Case) -> Outcome:
    """Run *case*, event by event."""
    return _Simulation(case).run()


class _Simulation:
    def __init__(self, case: Case) -> None:
        self.case, self.random = case, np.random.default_rng(case.seed)
        self.partitions = [Partition() for _ in range(case.partitions)]
        self.events: list[tuple[float, int, str, object]] = []
        self.number = 0
        self.seen = np.zeros(case.threads, dtype=np.int64)
        """The last transaction that each thread was in."""
        self.place = np.zeros(case.threads, dtype=np.int64)
        self.transaction = 0
        self.now = self.work_done_at = 0.0
        self.running: dict[int, float] = {}
        """Rows still to be written, by partition, of the transactions under way."""
        self.calls = self.deltas = self.messages = 0
        self.number_of_finish = 0
        self.in_flight: dict[int, tuple[list[float], int]] = {}
        self.lags: list[float] = []
        self.commits: dict[int, list[tuple[float, int]]] = {}
        """When each transaction was committed and its rows, by partition."""

    def at(self, when: float, what: str, which: object) -> None:
        self.number += 1
        heapq.heappush(self.events, (when, self.number, what, which))

    @property
    def counts(self) -> bool:
        return self.now >= self.case.warm

    def run(self) -> Outcome:
        case = self.case
        for host in range(case.hosts):
            self.at(float(self.random.random()) * case.host_window, "window", host)
        while self.events and self.events[0][0] < case.seconds:
            when, number, what, which = heapq.heappop(self.events)
            self.progress(when)
            if what == "window":
                self.end_window(which)
            elif what == "message":
                self.arrive(*which)
            elif what == "turn":
                self.turn(which)
            elif self.number_of_finish == number:  # else the shares have changed since
                self.finish()
        return self.outcome()

    # -- the hosts ---------------------------------------------------------------------------------

    def end_window(self, host: int) -> None:
        case = self.case
        calls = int(self.random.poisson(case.calls_per_second * case.host_window))
        threads = self.draw(host, calls)
        # Distinct ones without a sort: each has the place of its last call.
        places = np.arange(len(threads))
        self.place[threads] = places
        threads = threads[self.place[threads] == places]
        parts = (threads % case.partitions).astype(np.int16)
        order = np.argsort(parts, kind="stable")
        threads, parts = threads[order], parts[order]
        cuts = np.searchsorted(parts, np.arange(case.partitions + 1))
        for partition in range(case.partitions):
            part = threads[cuts[partition] : cuts[partition + 1]]
            if len(part):
                self.at(self.now + case.broker, "message", (partition, self.now, part))
                self.messages += self.counts
        if self.counts:
            self.calls += calls
            self.deltas += len(threads)
        self.at(self.now + case.host_window, "window", host)

    def draw(self, host: int, calls: int) -> np.ndarray:
        """Return the thread of each call: those that have this host among their homes, all alike."""
        case = self.case
        homes = min(case.homes, case.hosts)
        # Thread t is at home at hosts (t + k) mod hosts, k < homes: a host's threads are known by arithmetic.
        residues = (host - self.random.integers(0, homes, calls)) % case.hosts
        each = -(-case.threads // case.hosts)
        return (residues + case.hosts * self.random.integers(0, each, calls)) % case.threads

    # -- the consumers -----------------------------------------------------------------------------

    def arrive(self, number: int, sealed_at: float, threads: np.ndarray) -> None:
        partition = self.partitions[number]
        partition.waiting.append((sealed_at, threads))
        if not partition.busy and len(partition.waiting) == 1:
            self.at(max(self.now, partition.next_at), "turn", number)

    def turn(self, number: int) -> None:
        partition = self.partitions[number]
        if partition.busy or not partition.waiting:
            return
        self.transaction += 1
        rows, taken, sealed = 0, 0, []
        for sealed_at, threads in partition.waiting:
            if taken and rows >= self.case.max_batch:
                break
            fresh = self.seen[threads] != self.transaction
            rows += int(fresh.sum())
            self.seen[threads] = self.transaction
            sealed.append(sealed_at)
            taken += 1
        del partition.waiting[:taken]
        partition.busy = True
        partition.next_at = self.now + (self.case.window if rows < self.case.max_batch else 0.0)
        self.running[number] = rows + self.case.fixed * self.case.rows_per_second * self.case.alone
        self.in_flight[number] = (sealed, rows)
        self.plan()

    # -- Postgres: rows are written at one rate in all, in equal shares -------------------------------

    @property
    def share(self) -> float:
        """Rows a second of each transaction under way."""
        case, running = self.case, len(self.running)
        return min(case.rows_per_second * case.alone, case.rows_per_second / running) if running else 0.0

    def progress(self, now: float) -> None:
        done = self.share * (now - self.now)
        for number in self.running:
            self.running[number] -= done
        self.now = now

    def plan(self) -> None:
        """Foresee the next end of a transaction."""
        if self.running:
            self.at(self.now + max(0.0, min(self.running.values())) / self.share, "finish", None)
            self.number_of_finish = self.number

    def finish(self) -> None:
        for number in [number for number, left in self.running.items() if left <= 1e-6]:
            del self.running[number]
            sealed, rows = self.in_flight.pop(number)
            partition = self.partitions[number]
            partition.busy = False
            if self.counts:
                self.commits.setdefault(number, []).append((self.now, rows))
                self.lags += [self.now - at for at in sealed]
            if partition.waiting:
                self.at(max(self.now, partition.next_at), "turn", number)
        self.plan()

    @staticmethod
    def _rate(commits: list[tuple[float, int]], *, rows: bool) -> float:
        """Return what a partition writes a second, over whole cycles: from its first commit to its last."""
        if len(commits) < 2:
            return 0.0
        between = commits[-1][0] - commits[0][0]
        return sum(count if rows else 1 for _, count in commits[1:]) / between

    def outcome(self) -> Outcome:
        span = self.case.seconds - self.case.warm
        waiting = sum(len(threads) for partition in self.partitions for _, threads in partition.waiting)
        lags = np.array(self.lags or [float("nan")])
        deltas = self.deltas / span
        return Outcome(
            calls=self.calls / span,
            deltas=deltas,
            messages=self.messages / span,
            rows=sum(self._rate(commits, rows=True) for commits in self.commits.values()),
            transactions=sum(self._rate(commits, rows=False) for commits in self.commits.values()),
            lag_p50=float(np.percentile(lags, 50)),
            lag_p99=float(np.percentile(lags, 99)),
            backlog=waiting / deltas if deltas else 0.0,
        )


# -- the study ---------------------------------------------------------------------------------------

WINDOWS = (0.5, 2.0, 5.0, 10.0)
PARTITIONS = (2, 4, 16)


def study(partitions: int) -> list[dict[str, Any]]:
    """Simulate every window with so many partitions."""
    found: list[dict[str, Any]] = []
    for window in WINDOWS:
        warm = 12.0
        case = Case(window=window, partitions=partitions, warm=warm, seconds=warm + max(16.0, 3.5 * window))
        outcome = simulate(case)
        found.append({"case": asdict(case), "outcome": asdict(outcome)})
        print(
            f"{partitions:3} partitions, {window:5.2f} s: {outcome.rows:9,.0f} rows/s in {outcome.transactions:5.2f}"
            f" transactions/s; lag {outcome.lag_p50:5.2f} s, p99 {outcome.lag_p99:5.2f} s; {outcome.messages:7,.0f}"
            f" messages/s of {outcome.deltas:10,.0f} deltas/s; waiting {outcome.backlog:4.1f} s",
            flush=True,
        )
    return found


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Plot rows a second and lag by window."""
    import matplotlib as mpl  # noqa: PLC0415 - the simulation itself needs none

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    case = Case()
    for partitions in PARTITIONS:
        runs = [run for run in found if run["case"]["partitions"] == partitions]
        windows = [run["case"]["window"] for run in runs]
        label = f"{partitions} partition{'s' if partitions > 1 else ''}"
        left.plot(windows, [run["outcome"]["rows"] for run in runs], marker="o", label=label)
        right.plot(windows, [run["outcome"]["lag_p99"] for run in runs], marker="o", label=label)
    deltas = float(np.mean([run["outcome"]["deltas"] for run in found]))
    calls = float(np.mean([run["outcome"]["calls"] for run in found]))
    left.axhline(calls, color="black", linestyle=":", label="a statement a call")
    left.axhline(deltas, color="grey", linestyle="--", label=f"each host on its own, {case.host_window:g} s windows")
    left.axhline(case.rows_per_second, color="red", linewidth=0.8, label="what this Postgres takes")
    left.set(xscale="log", yscale="log", xlabel="consumers' window, s", ylabel="rows/s that reach Postgres")
    right.set(
        xscale="log", yscale="log", xlabel="consumers' window, s", ylabel="p99 from a host's window to its commit, s"
    )
    for axes in (left, right):
        axes.grid(visible=True, which="both", alpha=0.25)
        axes.set_xticks(WINDOWS, [f"{window:g}" for window in WINDOWS])
    left.legend(fontsize=8)
    figure.suptitle(
        f"Simulation: {case.hosts:,} hosts of {case.calls_per_second:,.0f} calls/s, {case.threads:,} live threads,"
        " no sticky balancer",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def check(path: Path) -> list[dict[str, Any]]:
    """Simulate the cases that were measured; return measured and simulated rows and transactions."""
    compared: list[dict[str, Any]] = []
    for run in json.loads(path.read_text(encoding="utf-8")):
        if run["saturated"]:
            continue  # by the brokers' and the publishers' own use of the processors, which is not simulated
        seconds, hosts = run["calling_seconds"], run["publishers"]
        case = Case(
            hosts=hosts,
            calls_per_second=run["calls"] / seconds / hosts,
            threads=run["threads"] // hosts * hosts,
            homes=hosts,
            host_window=run["flush_interval"],
            window=run["window"],
            partitions=run["partitions"],
            seconds=seconds + 2.0,
            warm=2.0,
        )
        outcome = simulate(case)
        line = {
            "partitions": run["partitions"],
            "window": run["window"],
            "measured_deltas": run["deltas"],
            "simulated_deltas": round(outcome.deltas * seconds),
            "measured_rows": run["rows"],
            "simulated_rows": round(outcome.rows * seconds),
            "measured_transactions": run["transactions"],
            "simulated_transactions": round(outcome.transactions * seconds),
        }
        compared.append(line)
        print(json.dumps(line))
    return compared


def main() -> None:
    """Run the study, or compare with what was measured."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    arguments.add_argument("--check", type=Path, help="what stream_throughput.py wrote")
    arguments.add_argument(
        "--partitions", type=int, nargs="*", default=PARTITIONS, choices=PARTITIONS, help="only these; others stay"
    )
    asked = arguments.parse_args()
    RESULTS.mkdir(exist_ok=True)
    if asked.check is not None:
        compared = check(asked.check)
        (RESULTS / "stream_simulation_check.json").write_text(json.dumps(compared, indent=1) + "\n", encoding="utf-8")
        return
    path = RESULTS / "stream_simulation.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    found = [run for run in before if run["case"]["partitions"] not in asked.partitions]
    for partitions in asked.partitions:
        found += study(partitions)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found, RESULTS / "stream_simulation.png")


if __name__ == "__main__":
    main()
