"""One table of the goals, from the JSON files of whatever was run; `--markdown` as the documentation has it.

python benchmarks/report.py [NAME …] [--results DIR] [--markdown]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


def results(folder: Path, names: Sequence[str] = ()) -> dict[str, Any]:
    """Return what these benchmarks wrote, or all; results of another form have no goals of the table."""
    found = (json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json")))
    made = {each["name"]: each for each in found if isinstance(each, dict) and "goals" in each}
    return {name: each for name, each in made.items() if not names or name in names}


def table(found: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return the rows of the table: what, goal, measured, met or not."""
    goals = sorted((goal for each in found.values() for goal in each["goals"]), key=lambda goal: goal["order"])
    return [(g["what"], g["goal"], g["measured"], "met" if g["met"] else "**not met**") for g in goals]


def settings(found: dict[str, Any]) -> str:
    """Return under what it was measured, in a line."""
    some = next((each for each in found.values() if each["database"]), next(iter(found.values())))
    days = sorted({each["taken_at"][:10] for each in found.values()})
    versions, machine, database = some["versions"], some["machine"], some["database"].copy()
    days_told = " to ".join(dict.fromkeys((days[0], days[-1])))
    told = f"{days_told}, {machine['cores']} cores ({machine['processor']}), Python {versions['python']}"
    if not database:
        return told
    server = database.pop("server_version", "?")
    rest = "".join(f", {name}={value}" for name, value in database.items())
    return f"{told}, PostgreSQL {server}{rest}, psycopg {versions.get('psycopg', '?')}"


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a benchmark; all of them without")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--markdown", action="store_true")
    given = parser.parse_args()
    found = results(given.results, given.names)
    if not found:
        raise SystemExit(f"{given.results} has no results: run the benchmarks first")
    rows = table(found)
    print(settings(found))
    if any(each["quick"] for each in found.values()):
        print("With --quick: these figures mean nothing.")
    if given.markdown:
        print("\n| what | goal | measured | |\n| --- | --- | --- | --- |")
        for row in rows:
            print(f"| {' | '.join(row)} |")
        return
    for what, goal, measured, met in rows:
        print(f"\n{met.strip('*').upper():8}{what}\n{'':8}goal {goal}; measured {measured}")


if __name__ == "__main__":
    main()
