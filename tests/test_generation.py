"""Windows: rows that say what the deltas say, calls that are in one place, and nothing for the garbage collector."""

from __future__ import annotations

import gc
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.strategies import any_costs, names
from tracker_daemon.backlog import Backlog
from tracker_daemon.delta import Deltas, ThreadDelta, calls_of, earliest, packed, rows_of, unpacked
from tracker_daemon.generation import ENSURE, Generation, add, ensure, method_of, resolve

if TYPE_CHECKING:
    from tracker_daemon.generation import Record

PROPERTY = settings(deadline=None, database=None)
NOW = 1_700_000_000_000_000_000

threads = st.sampled_from(["t", "u", "v"])
instants = st.one_of(st.integers(NOW, NOW + 3_000), st.integers(-(10**18), 2 * 10**18))
agents = st.none() | st.sampled_from("abcdefghijkl") | names()
turns = st.tuples(threads, agents, st.integers(-(2**63) + 1, 2**63 - 1), st.floats(0, 100) | any_costs(), instants)
records = st.one_of(turns, turns, st.builds(ensure, threads, instants), st.builds(resolve, threads, names(), instants))
histories = st.lists(records, min_size=1, max_size=40)


def by_thread(calls: list[Any], *, create_missing: bool) -> dict[tuple[str, bool], ThreadDelta]:
    """Return the sums of *calls* as rule 3 of `generation` says, added one by one; by thread and whether it follows."""
    found: dict[tuple[str, bool], ThreadDelta] = {}
    for call in calls:
        thread_id, at = call[0], call[-1] // 1_000
        first = found.get((thread_id, False))
        late = first is not None and not create_missing and not first.ensures
        late = late and ((thread_id, True) in found or method_of(call) == ENSURE)
        add(found.setdefault((thread_id, late), ThreadDelta(thread_id, at)), call)
    return found


@settings(PROPERTY, max_examples=400)
@given(calls=histories, create_missing=st.booleans())
@example(calls=[("t", None, 1, 0.1, NOW), ("t", "a", 1, 0.1, NOW), ("t", "b", 1, 0.1, NOW)], create_missing=True)
@example(calls=[("t", None, 1, 0.1, 0), ("u", None, 1, 0.1, NOW)], create_missing=True)
@example(calls=[ensure("t", NOW), ("t", "a", 1, 1e-13, NOW - 1), ("t", "a", 1, 2, NOW)], create_missing=False)
def test_rows_say_what_deltas_say(calls: list[Any], create_missing: bool) -> None:
    """The short way of an ordinary turn gives what `ThreadDelta` gives, for any calls in any order."""
    generation, new, counts = Generation(create_missing=create_missing), list[str](), Counter[str]()
    generation.fold_all(iter(calls), new.append, counts)
    expected = by_thread(calls, create_missing=create_missing)
    assert {(delta.thread_id, late): delta for delta, late in generation.sums()} == expected
    assert new == list(dict.fromkeys(call[0] for call in calls))
    assert +counts == Counter(map(method_of, calls))
    assert generation.calls == len(calls)
    firsts = {call[0]: call[-1] for call in reversed(calls)}
    assert generation.oldest_at == next((firsts[thread] for thread in new if firsts[thread]), 0)  # 0: none yet


@settings(PROPERTY, max_examples=200)
@given(calls=histories)
def test_there_and_back(calls: list[Any]) -> None:
    """A row made of a delta gives it back, as often as it is asked for; neither changes with the other."""
    [*deltas] = by_thread(calls, create_missing=True).values()
    rows = [packed(delta) for delta in deltas]
    assert [unpacked(row) for row in rows] == deltas
    for row in rows:
        delta = unpacked(row)
        for number in range(20):
            delta.turn(f"new {number}", 1, 1, 0)
    assert [unpacked(row) for row in rows] == deltas
    assert [calls_of(row) for row in rows] == [delta.calls for delta in deltas]
    assert earliest(rows_of(deltas)) == min(delta.first_at for delta in deltas)


def test_deltas_are_a_sequence() -> None:
    """A sealed batch is a sequence like a tuple of its deltas; each one taken out of it is its own."""
    made = tuple(ThreadDelta(f"t{number}", number) for number in range(5))
    deltas = Deltas(rows_of(made))
    assert len(deltas) == 5
    assert deltas == made
    assert deltas[1:3] == made[1:3]
    assert deltas[-1] == made[-1]
    assert made[2] in deltas
    deltas[0].ensure(7)
    assert deltas[0] == made[0]
    assert rows_of(deltas) is deltas.rows


def test_many_agents_are_not_copied_again_and_again() -> None:
    """A thread with very many agents takes a further turn without a copy of them."""
    generation = Generation(create_missing=True)
    for number in range(100):
        generation.fold(("t", f"agent {number}", 1, 0.5, NOW))
    before = generation.deltas["t"][6]
    generation.fold(("t", "another", 1, 0.5, NOW))
    generation.fold(("t", "agent 3", 1, 0.5, NOW))
    assert generation.deltas["t"][6] is before
    [delta] = generation.of("t")
    assert delta.agents == (*(f"agent {number}" for number in range(100)), "another")


def test_nothing_for_the_garbage_collector() -> None:
    """Pending threads leave no object behind that a full collection would look through, and bring none about."""
    backlog = Backlog(max_queue_size=10**6, max_pending=10**6, max_batch_size=10_000, create_missing=True)
    collected: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            collected.append(info["generation"])

    gc.collect()
    gc.callbacks.append(note)
    try:
        for number in range(60_000):
            backlog.queue.put((f"t{number % 30_000}", "billing", number, 0.25 * number, NOW + number))
        while backlog.drain(500):
            pass
    finally:
        gc.callbacks.remove(note)
    assert collected, "no collection came about: the test shows nothing"
    assert 2 not in collected
    backlog.seal()
    gc.collect(0)
    head = backlog.head()
    assert head is not None
    assert not any(map(gc.is_tracked, head.rows))


@pytest.mark.parametrize("at", range(5))
def test_interrupted_between_two_calls(at: int) -> None:
    """Whatever comes in between while calls are folded, each is in the queue or in the window, and counted once."""
    backlog = Backlog(max_queue_size=10**6, max_pending=10**6, max_batch_size=10_000, create_missing=True)
    calls: list[Record] = [
        ensure("t", NOW),
        ("t", "a", 1, 0.5, NOW),
        resolve("u", "done", NOW),
        ("u", "a", 1, 1e-13, NOW),
    ]
    broken: Any = ("t", "a", 1, 0.5, "no instant")
    made = [*calls[:at], broken, *calls[at:]]
    for call in made:
        backlog.queue.put(call)
    with pytest.raises(TypeError):
        backlog.drain(100)
    assert list(backlog.queue.waiting()) == made[at:]
    folded: dict[str, list[Any]] = defaultdict(list)
    for call in made[:at]:
        folded[call[0]].append(call)
    expected = {key[0]: delta for key, delta in by_thread(made[:at], create_missing=True).items()}
    assert {delta.thread_id: delta for delta in backlog._window.all()} == expected
    assert backlog._totals.folded.total() == at
