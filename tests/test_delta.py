"""Sums of calls: exact, the same however the calls were cut into parts, and never changed by merging."""

from __future__ import annotations

from copy import copy
from decimal import Context, Decimal, Inexact, localcontext
from fractions import Fraction
from functools import reduce
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.strategies import any_costs, costs, names
from tracker_daemon.delta import ThreadDelta, plain, rows_of
from tracker_daemon.memory_sink import MemoryRow
from tracker_daemon.postgres.encoding import arrays, fits_stage

PROPERTY = settings(deadline=None, database=None)

# Far wider than any sum here: a digit lost would raise.
WIDE = Context(prec=500_000, Emax=10**9, Emin=-(10**9), traps=[Inexact])

instants = st.one_of(st.integers(0, 3), st.integers(-(10**15), 2 * 10**15))
turns = st.tuples(st.just("turn"), st.none() | names(), st.integers(-(2**63) + 1, 2**63 - 1), costs(), instants)
ensures = st.tuples(st.just("ensure"), instants)
resolves = st.tuples(st.just("resolve"), names(), instants)
call_lists = st.lists(st.one_of(turns, ensures, resolves), min_size=1, max_size=12)


def delta_of(calls: list[tuple[Any, ...]]) -> ThreadDelta:
    """Return the sum of *calls*."""
    found = ThreadDelta("t", calls[0][-1])
    for kind, *arguments in calls:
        getattr(found, kind)(*arguments)
    return found


def cost_of(*amounts: Any) -> ThreadDelta:
    """Return the sum of turns of these costs."""
    return delta_of([("turn", None, 0, amount, 1) for amount in amounts])


def exact(cost: Any) -> Decimal:
    """Return what a cost counts as: a float, the decimal that `repr` prints."""
    return Decimal(repr(cost)) if isinstance(cost, float) else Decimal(cost)


def total(amounts: list[Any]) -> Decimal:
    """Return the exact sum of costs of any size."""
    return reduce(WIDE.add, map(exact, amounts), Decimal(0))


def parts_of(calls: list[Any], cuts: list[int]) -> list[list[Any]]:
    """Return *calls* cut at *cuts*, the empty parts left out."""
    edges = [0, *sorted(cut % (len(calls) + 1) for cut in cuts), len(calls)]
    return [calls[a:b] for a, b in pairwise(edges) if a < b]


def snapshot(delta: ThreadDelta) -> dict[str, Any]:
    """Return everything a delta holds, in copies."""
    return {name: copy(getattr(delta, name)) for name in ThreadDelta.__slots__}


@settings(PROPERTY, max_examples=200)
@given(calls=call_lists, cuts=st.lists(st.integers(0, 12), max_size=4))
@example(calls=[("turn", None, 0, Decimal("1E+1999"), 0), ("turn", None, 0, Decimal("1E-16383"), 0)], cuts=[1])
@example(calls=[("resolve", "a", 2), ("resolve", "b", 1), ("resolve", "c", 2), ("resolve", "d", 1)], cuts=[1, 2, 3])
def test_parts_make_the_whole(calls: list[Any], cuts: list[int]) -> None:
    """Cutting calls anywhere and merging the sums of the parts, from either end, gives the sum of the whole."""
    whole, parts = delta_of(calls), [delta_of(part) for part in parts_of(calls, cuts)]
    assert reduce(ThreadDelta.merge, parts) == whole
    assert reduce(lambda later, earlier: earlier.merge(later), reversed(parts)) == whole


@settings(PROPERTY, max_examples=200)
@given(calls=call_lists)
def test_a_plain_count_agrees(calls: list[Any]) -> None:
    """Every attribute is what a naive count of the calls gives."""
    found = delta_of(calls)
    of = {kind: [each for each in calls if each[0] == kind] for kind in ("ensure", "turn", "resolve")}
    assert (found.ensures, found.turns, found.resolves) == tuple(map(len, of.values()))
    assert found.calls == len(calls)
    assert found.tokens == sum(each[2] for each in of["turn"])
    assert found.cost == total([each[3] for each in of["turn"]])
    assert found.agents == tuple(dict.fromkeys(each[1] for each in of["turn"] if each[1] is not None))
    assert found.first_at == min(each[-1] for each in calls)
    assert found.last_turn_at == max((each[-1] for each in of["turn"]), default=None)
    # `max` keeps the first of equals: from the end, that is the one called last.
    last = max(reversed(of["resolve"]), key=lambda each: each[-1], default=(None, None, None))
    assert (found.resolution_type, found.resolved_at) == last[1:]


@settings(PROPERTY, max_examples=100)
@given(first=call_lists, second=call_lists)
def test_merge_changes_neither(first: list[Any], second: list[Any]) -> None:
    """Merging leaves both operands as they were, and adding to the sum, or to a copy, leaves them too."""
    a, b = delta_of(first), delta_of(second)
    before = snapshot(a), snapshot(b)
    total, twin = a.merge(b), a.copy()
    assert twin == a
    for each in (total, twin):
        each.turn("someone new", 1, Decimal("0.1234567890123"), 10**16)
        each.ensure(-(10**16))
        each.resolve("reopened", 10**16)
    assert (snapshot(a), snapshot(b)) == before


@settings(PROPERTY, max_examples=300)
@given(amounts=st.lists(any_costs(), min_size=1, max_size=6), cut=st.integers(0, 6))
@example(amounts=[0.1, 0.2, -0.3], cut=1)
@example(amounts=[1e16, 1.0, -1e16], cut=2)
@example(amounts=[999.9999999999999, 999.999999999999], cut=1)
@example(amounts=[1e-12, 1e-13, -1e-13], cut=1)
@example(amounts=[10**2_000 - 1, -1, Decimal("1E-16383")], cut=1)
@example(amounts=[Decimal("9E+1999")] * 6, cut=3)
def test_costs_are_exact(amounts: list[Any], cut: int) -> None:
    """Costs of any size add without losing a digit, in any order; what is sent to the database says the same."""
    expected, whole = total(amounts), cost_of(*amounts)
    assert whole.cost == expected
    assert cost_of(*reversed(amounts)).cost == whole.cost
    if 0 < cut < len(amounts):
        assert cost_of(*amounts[:cut]).merge(cost_of(*amounts[cut:])).cost == whole.cost
    assert Decimal(arrays([whole])["costs"].strip("{}")) == expected
    if fits_stage(rows_of([whole])):
        assert Decimal(whole.cost_units).scaleb(-12, WIDE) == expected


@settings(PROPERTY, max_examples=200)
@given(amounts=st.lists(st.floats(-1e25, 1e25) | st.integers(-(10**20), 10**20) | st.decimals(-9, 9), max_size=8))
def test_costs_are_exact_as_fractions(amounts: list[Any]) -> None:
    """The same by another arithmetic."""
    assert Fraction(cost_of(0, *amounts).cost) == sum(Fraction(exact(each)) for each in amounts)


@settings(PROPERTY, max_examples=300)
@given(
    amount=st.floats(allow_nan=False, allow_infinity=False)
    | st.floats(-1_000.1, 1_000.1)
    | st.integers(10**15, 10**18).map(lambda digits: digits / 10**12)
)
@example(amount=123456.78901234567)
@example(amount=0.1)
@example(amount=1_000.0)
@example(amount=-999.9999999999999)
@example(amount=1.0000000000005)
@example(amount=2.5e-13)
def test_a_float_counts_as_its_repr(amount: float) -> None:
    """The short way and the long way agree on every float."""
    assert cost_of(amount).cost == Decimal(repr(amount))


def test_ten_cents_ten_times() -> None:
    """A tenth, ten times, is one; no binary fraction is ever summed."""
    assert str(cost_of(*[0.1] * 10).cost) == "1"


@settings(PROPERTY, max_examples=100)
@given(amounts=st.lists(any_costs(), min_size=1, max_size=4))
def test_cost_is_plain(amounts: list[Any]) -> None:
    """`cost` prints as people write it: no trailing zeros after the point, no exponent above it."""
    cost = cost_of(*amounts).cost
    exponent = cost.as_tuple().exponent
    assert isinstance(exponent, int)
    assert exponent <= 0
    assert exponent == 0 or cost.as_tuple().digits[-1] != 0
    assert plain(cost) == cost


def test_the_callers_decimal_context_does_not_matter() -> None:
    """A thread that rounds to three digits, or traps everything, changes no sum."""
    with localcontext() as context:
        context.prec = 3
        context.clear_traps()
        found = cost_of(Decimal("12345.678901"), Decimal("1E-13"), 0.1, 10**9).merge(cost_of(Decimal("-1E-13")))
        assert str(found.cost) == "1000012345.778901"


@pytest.mark.parametrize(
    ("first", "second", "wins"),
    [
        (("a", 1), ("b", 2), ("b", 2)),
        (("a", 2), ("b", 1), ("a", 2)),
        (("a", 1), ("b", 1), ("b", 1)),
        (("a", 1), ("a", 1), ("a", 1)),
    ],
    ids=["later", "earlier", "tie", "same"],
)
def test_the_later_resolve_wins(first: Any, second: Any, wins: Any) -> None:
    """Of two resolves the one with the later instant stays; of equal instants the one called last."""
    together = delta_of([("resolve", *first), ("resolve", *second)])
    apart = delta_of([("resolve", *first)]).merge(delta_of([("resolve", *second)]))
    for found in (together, apart):
        assert (found.resolution_type, found.resolved_at, found.resolves) == (*wins, 2)


def test_order_of_agents() -> None:
    """Agents stand in the order of first use, each once, also over merges."""
    a = delta_of([("turn", name, 0, 0, 1) for name in ("z", "a", "z")])
    b = delta_of([("turn", name, 0, 0, 1) for name in ("b", "a", "z", "B")])
    assert a.merge(b).agents == ("z", "a", "b", "B")
    assert b.merge(a).agents == ("b", "a", "z", "B")


class Counted(str):
    """A name that counts how often it is compared."""

    __slots__ = ()
    compared = 0

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def of_agents(*names: str) -> ThreadDelta:
    """Return the sum of a turn of each agent."""
    return delta_of([("turn", name, 1, 0, 1) for name in names])


@pytest.mark.parametrize("first", [0, 1, 7, 8, 9, 30])
@pytest.mark.parametrize("second", [0, 1, 7, 8, 9, 30])
@pytest.mark.parametrize("shared", [0, 1, 8])
def test_few_agents_and_many(first: int, second: int, shared: int) -> None:
    """However many agents each part has: first-use order, no duplicates, a tuple, and nothing shared that changes."""
    old = [f"a{i}" for i in range(first)]
    new = [*reversed(old[:shared]), *(f"b{i}" for i in range(second))]
    a, b = of_agents("x", *old, *old), of_agents("y", *new)
    assert (a.agents, b.agents) == (("x", *old), ("y", *new))
    before = snapshot(a), snapshot(b)
    total, twin = a.merge(b), a.copy()
    assert total.agents == ("x", *old, "y", *(name for name in new if name not in old))
    assert total == delta_of([("turn", name, 1, 0, 1) for name in ("x", *old, *old, "y", *new)])
    assert (twin, repr(twin)) == (a, repr(a))
    assert f"agents={a.agents!r}" in repr(a)
    for each in (total, twin):
        each.turn("someone new", 1, 0, 1)
        each.turn("x", 1, 0, 1)
        assert each.agents[-1] == "someone new"
    assert twin != a
    assert (snapshot(a), snapshot(b)) == before


def test_thousands_of_agents_are_not_compared_with_each_other() -> None:
    """The work grows with the number of agents, not with its square: a host may put a user's name there."""
    names = [Counted(f"agent-{i}") for i in range(3_000)]
    Counted.compared = 0
    first, second = of_agents(*names), of_agents(*names[::-1])
    assert first.merge(second).agents == first.copy().agents
    row = MemoryRow(0, 0)
    row.add(first)
    row.add(second)
    assert len(row.agents_used) == 3_000
    assert Counted.compared < 50 * len(names)


def test_instants_at_zero_and_before() -> None:
    """The epoch itself is an instant like any other, as are those before it."""
    a, b = delta_of([("turn", None, 0, 0, 0)]), delta_of([("turn", None, 0, 0, -5), ("resolve", "x", 0)])
    for found in (a.merge(b), b.merge(a)):
        assert (found.first_at, found.last_turn_at, found.resolved_at) == (-5, 0, 0)
    resolved = delta_of([("resolve", "late", 0)]).merge(delta_of([("resolve", "early", -1)]))
    assert (resolved.resolution_type, resolved.resolved_at) == ("late", 0)


def test_equality_and_repr() -> None:
    """Deltas are equal by what they say, not by how they keep it; they have no hash; `repr` shows what is there."""
    one = cost_of(1)
    assert one == cost_of(Decimal("1.00")) == cost_of(1.0)
    assert cost_of(0, 0.5, 0.5) == cost_of(Decimal("1E-13"), 1, Decimal("-1E-13"))
    assert one != cost_of(2)
    assert one != "t"
    assert repr(one) == "ThreadDelta('t', turns=1, cost=Decimal('1'), first_at=1, last_turn_at=1)"
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)
