"""Run the comparisons named, or all of them, each in a process of its own; then their table and their pictures.

python benchmarks/run.py [NAME …] [--quick] [--results DIR]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from harness import folder

HERE = Path(__file__).parent
NAMES = (
    "call_cost",
    "call_under_load",
    "end_to_end",
    "flush_rate",
    "loop_lag",
    "memory",
    "write_ahead_log",
    "commit_lag",
    "growth",
    "lanes",
)


def main() -> None:
    """Run them; one that fails does not keep the others from running, but from success."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--quick", action="store_true", help="Tiny sizes, one round: only to see that all of it runs.")
    parser.add_argument(
        "--results", type=Path, help="default: results/ beside this file, with --quick a temporary folder"
    )
    given = parser.parse_args()
    if unknown := sorted({*given.names} - {*NAMES}):
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    names = given.names or NAMES
    options = ["--results", str(folder(given.results, quick=given.quick))]
    began, failed = time.monotonic(), []
    for name in names:
        print(f"-- {name}", flush=True)
        command = [sys.executable, str(HERE / f"{name}.py"), *options, *(["--quick"] if given.quick else [])]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    print(f"\n{time.monotonic() - began:.0f} s in all\n", flush=True)
    failed += [
        script
        for script in ("plots", "report")
        if subprocess.run([sys.executable, str(HERE / f"{script}.py"), *options, *names], check=False).returncode
    ]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
