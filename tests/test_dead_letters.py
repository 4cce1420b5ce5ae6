"""Dead letters: what they keep, and what an operator does with them."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import a_role, grant_as_the_readme
from tests.strategies import any_costs, names, tokens
from tracker_daemon import ThreadDelta, Tracker
from tracker_daemon.cli import program
from tracker_daemon.postgres.dead_letters import as_json, from_json

if TYPE_CHECKING:
    from click.testing import Result
    from prometheus_client import CollectorRegistry


def run(*arguments: str) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(program, ["dead-letters", *arguments])


def listed(database: str) -> list[dict[str, Any]]:
    """Return what `list` prints."""
    result = run("list", "--database", database)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.output.splitlines()]


@pytest.fixture
def buried(database: str, registry: CollectorRegistry) -> str:
    """A database with two dead letters, of threads `bad-1` and `bad-2`, and one row."""
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute("ALTER TABLE conversations ADD CONSTRAINT no_bad CHECK (thread_id NOT LIKE 'bad%')")
    with Tracker(database, registry=registry) as tracker:
        for thread_id in ("bad-1", "good", "bad-2"):
            tracker.ensure_conversation(thread_id)
            tracker.record_turn(thread_id, 'a"g\\ent', 2**62, Decimal("0.10000000000000000001"))
            tracker.resolve(thread_id, "done")
        tracker.flush(60)
    return database


@given(st.lists(st.tuples(names(), tokens(), any_costs(), st.integers(0, 4 * 10**15)), min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_json_keeps_every_digit(turns: list[tuple[str, int, Any, int]]) -> None:
    """A delta that goes through the letter's JSON comes back equal."""
    delta = ThreadDelta("t", turns[0][3])
    for agent, tokens_, cost, at in turns:
        delta.turn(agent, tokens_, cost, at)
        delta.resolve(agent, at)
    assert from_json(json.loads(json.dumps(as_json(delta)))) == delta


def test_list(buried: str) -> None:
    """Each letter says what was lost, for whom, and why."""
    letters = listed(buried)
    assert [letter["thread_id"] for letter in letters] == ["bad-1", "bad-2"]
    assert letters[0]["sqlstate"] == "23514"
    assert "no_bad" in letters[0]["error"]
    assert letters[0]["delta"]["cost"] == "0.10000000000000000001"
    assert run("list", "--database", buried, "--thread-id", "bad-2").output.count("\n") == 1
    some = run("list", "--database", buried, "--limit", "1")
    assert (some.stdout.count("\n"), some.stderr) == (1, "1 of 2 shown; --limit shows more\n")
    assert run("list", "--database", buried, "--limit", "2").stderr == ""


def test_retry_applies_each_once(buried: str) -> None:
    """A retry before the mend changes nothing; after it every letter becomes its row, and a further one finds none."""
    refused = run("retry", "--database", buried, "--all")
    assert (refused.exit_code, refused.stdout) == (1, "applied 0, refused again 2\n")
    told = refused.stderr.splitlines()
    assert [line.split(": ")[:2] for line in told] == [["refused", "'bad-1'"], ["refused", "'bad-2'"]]
    assert all("no_bad" in line and line.endswith("[23514]") for line in told)
    assert len(listed(buried)) == 2
    with psycopg.connect(buried, autocommit=True) as admin:
        admin.execute("ALTER TABLE conversations DROP CONSTRAINT no_bad")
        for expected in ("applied 1, refused again 0\n", "applied 0, refused again 0\n"):
            assert run("retry", "--database", buried, "--thread-id", "bad-1").stdout == expected
        assert run("retry", "--database", buried, "--all").output == "applied 1, refused again 0\n"
        columns = "turn_count, total_tokens, total_cost_usd, agents_used, resolution_type"
        rows = admin.execute(f"SELECT DISTINCT {columns} FROM conversations").fetchall()  # type: ignore[arg-type]
    assert rows == [(1, 2**62, Decimal("0.10000000000000000001"), ['a"g\\ent'], "done")]
    assert listed(buried) == []


def test_drop(buried: str) -> None:
    """Dropping wants to be told which; what is dropped is gone, the rest stays."""
    assert run("drop", "--database", buried).exit_code == 2
    assert run("drop", "--database", buried, "--all", "--thread-id", "x").exit_code == 2
    assert run("drop", "--database", buried, "--thread-id", "bad-1").output == "dropped 1\n"
    assert [letter["thread_id"] for letter in listed(buried)] == ["bad-2"]
    assert run("drop", "--database", buried, "--all").output == "dropped 1\n"


def test_nothing_found(buried: str) -> None:
    """A thread without letters, as after a typing error, is told."""
    for command in ("retry", "drop"):
        result = run(command, "--database", buried, "--thread-id", "nope")
        assert (result.exit_code, result.stderr) == (0, "there is no dead letter of thread 'nope'\n")
    assert len(listed(buried)) == 2


def test_retry_tells_a_bounded_number(buried: str) -> None:
    """Of many that are refused again the first twenty are told, and how many more there are."""
    with psycopg.connect(buried, autocommit=True) as admin:
        admin.execute(
            "INSERT INTO tracker_dead_letters (producer, lane, sequence, thread_id, delta, sqlstate, error, at)"
            " SELECT producer, lane, n, thread_id, delta, sqlstate, error, at"
            " FROM tracker_dead_letters, generate_series(100, 114) AS n"
        )
    result = run("retry", "--database", buried, "--all")
    assert result.stdout == "applied 0, refused again 32\n"
    assert len(result.stderr.splitlines()) == 21
    assert result.stderr.endswith("and 12 more: tracker-daemon dead-letters list\n")


def test_by_the_server_s_role(buried: str) -> None:
    """A role with the rights of the README lists; without the further ones it is told what to grant, and changes nothing."""
    with a_role(buried) as (admin, name):
        grant_as_the_readme(admin, name)
        own = ("--database", psycopg.conninfo.make_conninfo(buried, user=name))
        before = listed(buried)
        assert [json.loads(line) for line in run("list", *own).stdout.splitlines()] == before
        told = {command: run(command, *own, "--all") for command in ("retry", "drop")}
        assert listed(buried) == before
        grants = {command: re.findall(r"GRANT [^;]+", result.stderr) for command, result in told.items()}
        for command, result in told.items():
            assert result.exit_code == 1
            assert result.stderr.startswith(
                "Error: permission denied for table tracker_dead_letters: run it as the owner"
            )
            assert result.stderr.count("\n") == 1
            assert grants[command][0].startswith("GRANT SELECT, ")
        for grant in grants["retry"]:
            admin.execute(grant)
        refused = run("retry", *own, "--all")
        assert (refused.exit_code, refused.stdout) == (1, "applied 0, refused again 2\n")
        admin.execute("ALTER TABLE conversations DROP CONSTRAINT no_bad")
        assert run("retry", *own, "--thread-id", "bad-1").output == "applied 1, refused again 0\n"
        assert run("drop", *own, "--all").output == "dropped 1\n"


def test_a_missing_right_is_no_reason_of_a_letter(buried: str) -> None:
    """A role that may take letters and not merge them is told so; the letters keep the reason for which they are there."""
    with a_role(buried) as (admin, name):
        admin.execute(f"GRANT SELECT, UPDATE, DELETE ON tracker_dead_letters TO {name}")  # type: ignore[call-overload]
        before = listed(buried)
        result = run("retry", "--database", psycopg.conninfo.make_conninfo(buried, user=name), "--all")
        assert result.exit_code == 1
        assert f'GRANT SELECT, INSERT, UPDATE ON "public"."conversations" TO "{name}"' in result.stderr
        assert listed(buried) == before


def test_without_tables(empty_database: str) -> None:
    """A database without the tables is one line that says what to run."""
    result = run("list", "--database", empty_database)
    assert result.exit_code == 1
    assert "tracker-daemon migrate" in result.output
    assert result.output.count("\n") == 1
