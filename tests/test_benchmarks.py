"""The benchmarks run: tiny sizes, no figure is looked at."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NAMES = (
    "call_cost",  # without the peers, which only `make bench` installs
    "call_under_load",
    "end_to_end",
    "flush_rate",
    "loop_lag",
    "memory",
    "write_ahead_log",
    "commit_lag",
    "growth",
)


def run(name: str, *arguments: str) -> str:
    """Run one file of the benchmarks; return what it printed."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_runs_alone(name: str, tmp_path: Path) -> None:
    """Each comparison runs by itself, writes down what it ran on and how, and has a line for the table."""
    run(name, "--quick", "--results", str(tmp_path))
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["cases"]
    assert found["quick"]
    assert found["how"]
    assert name == "call_cost" or {"fsync", "synchronous_commit", "server_version"} <= found["database"].keys()
    table = run("report", "--results", str(tmp_path))
    assert all(goal["what"] in table for goal in found["goals"])
    assert "these figures mean nothing" in table


def test_the_results_kept_are_whole() -> None:
    """What the repository shows comes from full runs, and every goal has its line."""
    found = [json.loads(file.read_text()) for file in (BENCHMARKS / "results").glob("*.json")]
    kept = [each for each in found if "goals" in each]
    assert kept
    assert not any(each["quick"] for each in kept)
    assert {goal["order"] for each in kept for goal in each["goals"]} == set(range(1, 14))


def test_a_quick_run_is_no_result() -> None:
    """What is run only to see that it runs does not take the place of what was measured."""
    kept = {file: file.read_bytes() for file in (BENCHMARKS / "results").iterdir()}
    run("call_cost", "--quick")
    assert {file: file.read_bytes() for file in (BENCHMARKS / "results").iterdir()} == kept


def test_a_table_of_some(tmp_path: Path) -> None:
    """What was run alone is told alone, not among results of another day."""
    for name in ("memory", "commit_lag"):
        shutil.copy(BENCHMARKS / "results" / f"{name}.json", tmp_path)
    assert "memory of a pending thread" in run("report", "memory", "--results", str(tmp_path))
    assert "from call to commit" not in run("report", "memory", "--results", str(tmp_path))
