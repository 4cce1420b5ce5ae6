"""After a fork: the parent's calls are applied once, the child starts empty and is a producer of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers import Outcome, ledger, run_program, turns, watchdog

if TYPE_CHECKING:
    from collections.abc import Iterator

NOTHING = [0, 0, 0, 0, 0, 0]


@pytest.fixture(autouse=True)
def _deadline() -> Iterator[None]:
    """No test waits for ever."""
    with watchdog(45):
        yield


def play(scene: str, database: str, *arguments: str) -> Outcome:
    """Run a scene to its end; every process in it ends well and says nothing on standard error."""
    outcome = run_program("fork_scenes.py", scene, database, *arguments)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert not [line for line in outcome.said if "failed" in line or line.get("lost")]
    return outcome


def starts_empty(view: dict[str, Any]) -> bool:
    """Say whether a process saw an unused tracker."""
    return (view["stats"], view["pending"], view["counted"], view["closed"]) == (NOTHING, False, 0, False)


def producers(database: str) -> list[str]:
    """Return the ledger's producers, each in its first life."""
    rows = ledger(database)
    assert {epoch for _, epoch, _ in rows} == {1}
    return [producer for producer, _, _ in rows]


@pytest.mark.parametrize("leave", ["os._exit", "sys.exit"])
def test_fork_of_a_running_tracker(database: str, leave: str) -> None:
    """Both go on, apart: books, metrics, identity and connection are each one's own."""
    outcome = play("running", database, leave)
    at_first, child = outcome.by("child at first"), outcome.by("child")
    parent = outcome.by("parent")
    assert starts_empty(at_first)
    assert outcome.by("child with calls")["stats"] == [50, 0, 0, 0, 50, 0]
    assert outcome.by("child with calls")["pending"] is True
    assert child["stats"] == [50, 50, 0, 0, 0, 0]
    assert outcome.by("parent at first")["stats"] == [100, 60, 0, 0, 40, 0]
    assert parent["stats"] == [125, 125, 0, 0, 0, 0]
    assert parent["kept_connection"] is True
    assert at_first["producer"] == child["producer"] != parent["producer"]
    assert sorted(producers(database)) == sorted([child["producer"], parent["producer"]])
    assert turns(database) == outcome.accepted == 175


@pytest.mark.parametrize("leave", ["os._exit", "sys.exit"])
def test_fork_of_a_child_that_makes_no_call(database: str, leave: str) -> None:
    """A child's end, with all its destructors, says no word on the parent's connection."""
    outcome = play("idle_child", database, leave)
    assert outcome.by("parent")["kept_connection"] is True
    assert turns(database) == outcome.accepted == 65
    assert len(producers(database)) == 1


def test_fork_while_a_flush_is_in_flight(database: str) -> None:
    """What the parent has under way is applied by the parent alone."""
    outcome = play("in_flight", database)
    assert turns(database) == outcome.accepted == 155
    assert len(producers(database)) == 2


def test_fork_right_behind_the_first_call(database: str) -> None:
    """A worker that is only starting up in the parent does not spoil the child."""
    outcome = play("at_once", database)
    assert turns(database) == outcome.accepted == 90
    assert len(set(producers(database))) == 12


def test_fork_before_the_first_call(database: str) -> None:
    """Children of a tracker not used yet are producers of their own, whichever of their threads calls first."""
    outcome = play("not_started", database)
    assert turns(database) == outcome.accepted == 1_000
    children = [line for line in outcome.said if line["who"] == "child"]
    assert [line["stats"][0] for line in children] == [320] * 3
    assert outcome.by("parent")["same_producer"] is True
    assert sorted(producers(database)) == sorted(line["producer"] for line in outcome.said)


def test_fork_in_a_thread(database: str) -> None:
    """It does not matter which thread forks."""
    outcome = play("in_thread", database)
    assert turns(database) == outcome.accepted > 50
    assert len(producers(database)) == 2


def test_nested_forks(database: str) -> None:
    """Each generation starts empty, under an identity of its own."""
    outcome = play("nested", database)
    assert len(outcome.said) == 4
    assert all(starts_empty(line["at_first"]) for line in outcome.said)
    assert {line["accepted"] for line in outcome.said} == {11, 21, 31, 41}
    assert sorted(producers(database)) == sorted({line["producer"] for line in outcome.said})
    assert turns(database) == outcome.accepted == 104


def test_twenty_forks_beside_calls(database: str) -> None:
    """Whatever the parent's threads are in the middle of, no child hangs and no call is counted twice."""
    outcome = play("many", database)
    assert [line["accepted"] for line in outcome.said if line["who"] == "child"] == [30] * 20
    assert turns(database) == outcome.accepted
    assert len(set(producers(database))) == 21


def test_fork_while_locks_are_held(database: str) -> None:
    """A lock that a thread of the parent holds is not the child's: its own are new."""
    outcome = play("locks_held", database)
    assert starts_empty(outcome.by("child")["at_first"])
    assert outcome.by("child")["locks"] >= 2
    assert outcome.by("child")["stats"] == [50, 50, 0, 0, 0, 1]
    assert turns(database) == outcome.accepted == 115


def test_fork_inside_a_with_block(database: str) -> None:
    """Parent and child each drain their own at the end of the block."""
    outcome = play("in_with", database)
    assert outcome.by("parent")["stats"] == [90, 90, 0, 0, 0, 0]
    assert outcome.by("child")["stats"] == [50, 50, 0, 0, 0, 0]
    assert turns(database) == outcome.accepted == 140


def test_fork_while_closing(database: str) -> None:
    """The drain in the parent goes on; another tracker works in the child."""
    outcome = play("closing", database)
    assert (outcome.by("child")["memory"], outcome.by("child")["turns"]) == (50, 50)
    assert turns(database) == outcome.accepted == 80
