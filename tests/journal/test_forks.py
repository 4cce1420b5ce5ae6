"""Forks, several trackers and several processes on one journal: places of their own, and every call applied once."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests.digits import Digits
from tests.faults.harness import sums
from tests.helpers import Outcome, command, ledger, run_program, running, wait_until, watchdog
from tracker_daemon.backlog import Backlog
from tracker_daemon.call_queue import CallQueue
from tracker_daemon.journal.lock import DirectoryLock, try_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tracker_daemon.generation import Record


@pytest.fixture(autouse=True)
def _deadline() -> Iterator[None]:
    """No test waits for ever."""
    with watchdog(60):
        yield


def play(scene: str, database: str, journal: Path, status: int = 0, *more: str) -> Outcome:
    """Run a scene to its end."""
    outcome = run_program("journal_forks.py", scene, database, str(journal), *more)
    assert (outcome.returncode, outcome.stderr) == (status, "")
    assert not [line for line in outcome.said if "failed" in line or line.get("lost")]
    return outcome


def exact(database: str, *outcomes: Outcome) -> bool:
    """Say whether every call that was accepted counts once, and none else."""
    digits = Digits()
    for outcome in outcomes:
        for line in outcome.said:
            if "made" in line:
                digits.tokens(line["made"])
    assert digits.made
    verdict = digits.read(sums(database))
    assert (verdict.missing, verdict.doubled) == ([], [])
    return verdict.exact


def places(outcome: Outcome) -> dict[str, str]:
    """Return where each process had its files."""
    return {line["who"]: line["place"] for line in outcome.said if "place" in line}


@pytest.mark.parametrize("scene", ["preload", "called_before"])
def test_children_have_their_own_places(database: str, tmp_path: Path, scene: str) -> None:
    """Three children at once and their parent: four places, four producers, every call once."""
    outcome = play(scene, database, tmp_path)
    assert exact(database, outcome)
    found = places(outcome)
    assert found.pop("parent") == "."
    # A place is free again when its process has ended.
    assert set(found) == {"a", "b", "c"}
    assert set(found.values()) <= {"forks/0", "forks/1", "forks/2"}
    assert {line["stats"][0] - line["stats"][1] for line in outcome.said if "stats" in line} == {0}
    assert len({producer for producer, _, _ in ledger(database)}) == 4


def test_children_of_children(database: str, tmp_path: Path) -> None:
    """A grandchild takes a place beside its parent's."""
    outcome = play("nested", database, tmp_path)
    assert exact(database, outcome)
    assert places(outcome) == {"child": "forks/0", "grandchild": "forks/1"}


@pytest.mark.parametrize(
    "scene", ["killed_child_next_child", "killed_child_next_child_inside_with", "killed_child_parent"]
)
def test_killed_child(database: str, tmp_path: Path, scene: str) -> None:
    """What a killed child had accepted is applied by whoever works next: another child, or the parent."""
    outcome = play(scene, database, tmp_path)
    assert exact(database, outcome)
    assert [line["applied"] for line in outcome.said if "applied" in line] == [40]


@pytest.mark.parametrize("scene", ["parent_that_only_forks", "parent_that_works"])
def test_parent_and_children_killed(database: str, tmp_path: Path, scene: str) -> None:
    """A server that loads the application first is killed with all its workers: nothing waits for ever in their places."""
    killed = play("group_killed", database, tmp_path, -signal.SIGKILL)
    assert sums(database) == {}
    outcome = play(scene, database, tmp_path)
    if scene == "parent_that_only_forks":
        assert outcome.by("parent")["applied"] == 0
        # The parent has its own directory, and applies what was left there when it works.
        assert len(sums(database)) == 4 * 4
        with_parent = play("again", database, tmp_path)
        assert exact(database, killed, outcome, with_parent)
    else:
        assert exact(database, killed, outcome)


def test_child_that_outlives_its_parent(database: str, tmp_path: Path) -> None:
    """The parent is killed: its directory is free at once, though a child of it lives, and the child's place is its own."""
    journal, over = tmp_path / "journal", tmp_path / "journal-over"
    killed = play("orphan", database, journal, -signal.SIGKILL)
    after = play("parent_that_works", database, journal)
    assert [line["applied"] for line in after.said if "applied" in line] == [40]  # not the child's
    over.touch()
    wait_until(lambda: not over.exists(), "the child's end")
    assert exact(database, killed, after)


def test_several_trackers_in_one_host(database: str, tmp_path: Path) -> None:
    """A directory each below one: both are killed, with a child that used both, and each finds what is its own."""
    killed = play("several", database, tmp_path, -signal.SIGKILL)
    outcome = play("several_again", database, tmp_path)
    assert exact(database, killed, outcome)
    assert {line["who"]: line["applied"] for line in outcome.said} == {"one": 40, "two": 40}


def test_children_that_end_one_after_another(database: str, tmp_path: Path) -> None:
    """Hundreds that call and end without closing, beside a parent that lives: it takes over what they left.

    All places together stay within the quota, and each call counts once.
    """
    outcome = play("one_after_another", database, tmp_path)
    assert exact(database, outcome)
    assert [line["degraded"] for line in outcome.said if "degraded" in line] == [False] * 300
    seen: dict[str, Any] = {}
    for line in outcome.said:
        seen |= line if line["who"] == "parent" else {}
    assert seen["quota"] // 2 < seen["most"] <= seen["quota"]
    assert seen["errors"] == {}
    assert seen["told"] == seen["taken"] <= seen["quota"] // 2
    assert seen["held"] <= 65


def test_children_while_the_database_is_away(database: str, tmp_path: Path) -> None:
    """All places together stay within the quota; who finds it used up goes on in memory, and says so."""
    nowhere = "host=127.0.0.1 port=1 user=postgres dbname=postgres"
    outcome = run_program("journal_forks.py", "database_away", nowhere, str(tmp_path))
    assert outcome.returncode == -signal.SIGKILL
    stored = [line["stored"] for line in outcome.said if "stored" in line]
    assert stored == [True] * 15 + [False] * 25, "16 MiB: one file each, and the parent's"
    assert [line["degraded"] for line in outcome.said if "stored" in line] == [not each for each in stored]
    assert {line["errors"] for line in outcome.said if line.get("degraded")} == {1}
    assert outcome.stderr.count("event=journal_degraded") == 25
    [seen] = [line for line in outcome.said if "most" in line]
    assert seen["most"] == seen["told"] == seen["taken"] == seen["quota"]
    again = play("again", database, tmp_path)
    assert exact(database, outcome, again)


@pytest.mark.parametrize("instant", ["registered", "noted", "committed", "settled", "kept", "moved"])
def test_killed_while_it_takes_over(database: str, tmp_path: Path, instant: str) -> None:
    """A parent is killed in the middle of applying what children left that have died: each call counts once."""
    killed = play("killed_while_it_takes_over", database, tmp_path, -signal.SIGKILL, instant)
    again = play("again", database, tmp_path)
    assert exact(database, killed, again)


def test_second_process_is_refused(database: str, tmp_path: Path) -> None:
    """A second process on a directory is told at once who has it; nothing there changes, and the first goes on."""
    arguments = ["hold", database, str(tmp_path)]
    with running(command("journal_forks.py", *arguments)) as holder:
        holder.wait_for(ready=True)
        before = sorted(path.name for path in tmp_path.iterdir())
        refused = play("intrude", database, tmp_path).by("intruder")
        assert f"is in use by process {holder.process.pid}" in refused["refused"]
        assert refused["files"] == before
        holder.process.send_signal(signal.SIGKILL)
        killed = holder.end()
    # The lock went with its holder: the next one begins, and applies what was left.
    assert exact(database, killed, play("parent_that_works", database, tmp_path))


def test_two_trackers_on_one_directory(database: str, tmp_path: Path) -> None:
    """In one process it is refused all the same, until the first is closed."""
    outcome = play("twice_in_one_process", database, tmp_path)
    assert "is in use by process" in outcome.by("second")["refused"]
    assert outcome.accepted == 1
    assert sums(database) == {"a": 0}


@pytest.mark.parametrize("scene", ["hook_that_calls", "handler_in_the_beginning", "handler_that_calls"])
def test_calls_in_the_middle_of_a_fork(database: str, tmp_path: Path, scene: str) -> None:
    """Whatever calls in the child first, a hook or a signal handler: nothing is written into the parent's files."""
    outcome = play(scene, database, tmp_path, -signal.SIGKILL)
    if scene != "handler_that_calls":
        assert [line["applied"] for line in outcome.said if "applied" in line] == [28], (
            "one life in the child, with the calls that began it"
        )
    again = play("again", database, tmp_path)
    digits = Digits()
    for line in (*outcome.said, *again.said):
        if "made" in line:
            digits.tokens(line["made"])
    found = sums(database)
    found.pop("of a child", None)
    verdict = digits.read(found)
    assert (verdict.missing, verdict.doubled) == ([], [])
    assert len(digits.made) > 5


def test_lock_let_go_of_in_the_middle_of_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler that lets go of it too: its file is closed once, not another that has its number by then."""
    lock, closed, close = DirectoryLock(tmp_path), list[int](), os.close

    def interrupted(file: int) -> None:
        closed.append(file)
        if len(closed) == 1:
            lock.release()
        close(file)

    with monkeypatch.context() as patched:
        patched.setattr(os, "close", interrupted)
        lock.release()
    assert len(closed) == 1
    assert try_lock(tmp_path) is not None


class Forking(CallQueue):
    """A process that forks, when it is told to, right after somebody has looked whether the gate may be raised."""

    def __init__(self) -> None:
        super().__init__()
        self.fork: Callable[[], object] | None = None

    @property
    def on_disk(self) -> bool:  # type: ignore[override]  # a plain attribute there
        """Whether calls go to a file: they do not."""
        if self.fork is not None:
            self.fork()
        return False


@pytest.mark.parametrize("who", ["caller", "worker", "fold"])
def test_gate_that_is_raised_while_the_process_forks(who: str) -> None:
    """A caller or the worker was about to raise the gate: in the child it is shut, and the first call asks whose it is."""
    backlog = Backlog(max_queue_size=100, max_pending=10, max_batch_size=10, create_missing=True)
    queue = backlog.queue = Forking()
    record: Record = ("t", "a", 1, 0.5, 1)
    assert backlog.enter(record) is None
    assert backlog.places + len(queue) > 9, "higher than there is room for once this one is folded"
    queue.fork = backlog.shut_for_fork
    if who == "caller":
        assert backlog.enter(("u", "a", 1, 0.5, 1)) is None
    elif who == "worker":
        backlog.open_gate()
    else:
        assert backlog.drain(1_000) == 1
    assert backlog.places == 0
    queue.fork = None
    backlog.open_gate()
    assert backlog.places == 0, "until the fork is done"
    backlog.forking = False  # and this is the parent
    backlog.open_gate()
    assert backlog.places > 0
