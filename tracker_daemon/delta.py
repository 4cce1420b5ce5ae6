"""What one thread gained: the sum of its calls, and how two sums merge.

Rules:
1. Pure: no clock, I/O, log or randomness. Adding calls one by one, or merging the sums of any two consecutive
   parts of them, gives the same delta: totals do not depend on how calls fell into windows.
2. Costs add as decimals, never as binary fractions. Up to 12 digits after the point they are integers of 10**-12
   (`cost_units`); what does not fit goes to `cost_rest`, exact as well.
3. `agents` are in order of first use, without duplicates.
4. `first_at` is the earliest instant of any call; `last_turn_at` the latest of `record_turn`, whose calls alone are
   activity; of several `resolve` the one with the latest instant stays, and of equal instants the last one called.
5. Instants are whole microseconds since 1970 in UTC, as Postgres stores them.
6. What waits in masses is kept as rows (`Row`): tuples of atoms, of which the garbage collector lets go when it first
   meets them. A hundred thousand objects of a class would be looked through by each of its full passes, with the
   interpreter held, and bring them about.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Clamped, Context, Decimal, DivisionByZero, Inexact, InvalidOperation, Overflow, Rounded
from operator import itemgetter
from typing import TYPE_CHECKING, Final, SupportsIndex, TypeAlias, final, overload

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tracker_daemon.calls import Cost

COST_SCALE: Final = 12
_UNITS_PER_DOLLAR: Final = 10**COST_SCALE
_FLOAT_UNITS: Final = 1e12
# Up to so many names a tuple is smaller than a dict, and as fast to look through.
_FEW_AGENTS: Final = 8
# Decimals of up to 15 digits and floats are one to one, so below 10**15 units the division tells the truth.
_EXACT_BELOW: Final = 1e3

# thread_id, turns, tokens, cost_units, first_at, last_turn_at, agents, ensures, and what most have not: resolves,
# resolution_type, resolved_at, cost_rest. A single agent stands there by itself.
Rare: TypeAlias = "tuple[int, str | None, int | None, Decimal | None]"
Row: TypeAlias = (
    "tuple[str, int, int, int, int, int | None, str | tuple[str, ...] | dict[str, None] | None, int, Rare | None]"
)

# Wide enough for every sum of what `calls.cost` lets in; a digit lost would be an exception, not a rounding.
EXACT: Final = Context(
    prec=200_000,
    Emax=999_999,
    Emin=-999_999,
    traps=[Inexact, Rounded, InvalidOperation, Overflow, Clamped, DivisionByZero],
)


@final
class ThreadDelta:
    """The sum of the calls on one thread between two flushes.

    The open window adds to it; once it is in a sealed batch, or handed out by `Tracker.pending`, nobody does.

    Attributes:
        thread_id: the thread.
        ensures, turns, resolves: calls of each kind.
        tokens: sum of tokens; not bounded here, the column's bound is the database's.
        first_at: earliest call, microseconds since 1970.
        last_turn_at: latest `record_turn`, microseconds since 1970, or `None` without a turn.
        resolution_type, resolved_at: of the latest `resolve`, or `None`.
        cost_units, cost_rest: the cost in two parts; `cost` is their sum.
    """

    __slots__ = (
        "_agents",
        "cost_rest",
        "cost_units",
        "ensures",
        "first_at",
        "last_turn_at",
        "resolution_type",
        "resolved_at",
        "resolves",
        "thread_id",
        "tokens",
        "turns",
    )

    def __init__(self, thread_id: str, first_at: int) -> None:
        self.thread_id = thread_id
        self.ensures = self.turns = self.resolves = 0
        self.tokens = 0
        self.cost_units = 0
        self.cost_rest: Decimal | None = None
        # In order of first use: a tuple of a few, a dict of many.
        self._agents: tuple[str, ...] | dict[str, None] = ()
        self.first_at = first_at
        self.last_turn_at: int | None = None
        self.resolution_type: str | None = None
        self.resolved_at: int | None = None

    @property
    def calls(self) -> int:
        """How many calls are summed here."""
        return self.ensures + self.turns + self.resolves

    @property
    def agents(self) -> tuple[str, ...]:
        """The names in order of first use, each once."""
        names = self._agents
        return names if type(names) is tuple else tuple(names)

    @property
    def cost(self) -> Decimal:
        """The exact sum of the costs, US dollars, without trailing zeros."""
        units = Decimal(self.cost_units).scaleb(-COST_SCALE, EXACT)
        return plain(units if self.cost_rest is None else EXACT.add(units, self.cost_rest))

    def ensure(self, at: int) -> None:
        """Add one `ensure_conversation` at *at*."""
        self.ensures += 1
        if at < self.first_at:
            self.first_at = at

    def turn(self, agent_name: str | None, tokens: int, cost: Cost, at: int) -> None:
        """Add one `record_turn` at *at*."""
        self.turns += 1
        self.tokens += tokens
        if cost:
            self.pay(cost)
        if agent_name is not None and agent_name not in self._agents:
            if len(self._agents) < _FEW_AGENTS:
                self._agents += (agent_name,)  # type: ignore[operator]  # of a few: a tuple
            else:
                self.use((agent_name,))
        last = self.last_turn_at
        if last is None or at > last:
            self.last_turn_at = at
        if at < self.first_at:
            self.first_at = at

    def resolve(self, resolution_type: str, at: int) -> None:
        """Add one `resolve` at *at*."""
        self.resolves += 1
        self._resolved(resolution_type, at)
        if at < self.first_at:
            self.first_at = at

    def merge(self, later: ThreadDelta) -> ThreadDelta:
        """Return the sum of this delta and *later*, whose calls came after; neither is changed."""
        total = self.copy()
        total.ensures += later.ensures
        total.turns += later.turns
        total.resolves += later.resolves
        total.tokens += later.tokens
        total.cost_units += later.cost_units
        if later.cost_rest is not None:
            total._add_rest(later.cost_rest)  # noqa: SLF001 - a twin's
        if later._agents:
            total.use(later._agents)
        total.first_at = min(total.first_at, later.first_at)
        if later.last_turn_at is not None:
            before = later.last_turn_at if total.last_turn_at is None else total.last_turn_at
            total.last_turn_at = max(later.last_turn_at, before)
        if later.resolution_type is not None and later.resolved_at is not None:
            total._resolved(later.resolution_type, later.resolved_at)  # noqa: SLF001
        return total

    def copy(self) -> ThreadDelta:
        """Return an equal delta that shares nothing that changes."""
        twin = ThreadDelta(self.thread_id, self.first_at)
        for name in ThreadDelta.__slots__:
            setattr(twin, name, getattr(self, name))
        if type(self._agents) is dict:
            twin._agents = self._agents.copy()
        return twin

    def use(self, names: Iterable[str]) -> None:
        """Add agents in the order of *names*; those that are there keep their place."""
        known = self._agents
        if type(known) is dict:
            known.update(dict.fromkeys(names))
        else:
            both = dict.fromkeys((*known, *names))
            self._agents = tuple(both) if len(both) <= _FEW_AGENTS else both

    def pay(self, cost: Cost) -> None:
        """Add *cost*, exactly."""
        if type(cost) is float:
            if -_EXACT_BELOW < cost < _EXACT_BELOW:
                units = round(cost * _FLOAT_UNITS)
                if units / _FLOAT_UNITS == cost:
                    self.cost_units += units
                    return
            self._add_rest(Decimal(repr(cost)))
        elif type(cost) is int:
            self.cost_units += cost * _UNITS_PER_DOLLAR
        else:
            self._add_rest(cost)  # type: ignore[arg-type]  # the door lets int, float and Decimal in

    def _add_rest(self, cost: Decimal) -> None:
        units = cost.scaleb(COST_SCALE, EXACT) if cost.adjusted() < 15 else cost
        if units is not cost and units == units.to_integral_value():
            self.cost_units += int(units)
        else:
            self.cost_rest = cost if self.cost_rest is None else EXACT.add(self.cost_rest, cost)

    def _resolved(self, resolution_type: str, at: int) -> None:
        if self.resolved_at is None or at >= self.resolved_at:
            self.resolution_type, self.resolved_at = resolution_type, at

    def _key(self) -> tuple[object, ...]:
        return (
            self.thread_id,
            self.ensures,
            self.turns,
            self.resolves,
            self.tokens,
            self.cost,
            self.agents,
            self.first_at,
            self.last_turn_at,
            self.resolution_type,
            self.resolved_at,
        )

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, ThreadDelta) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # it changes while its window is open

    def __repr__(self) -> str:
        shown = (f"{name}={getattr(self, name)!r}" for name in _SHOWN if getattr(self, name))
        return f"ThreadDelta({self.thread_id!r}, {', '.join(shown)})"


def packed(delta: ThreadDelta, *, give: bool = False) -> Row:
    """Return *delta* as a row; *give*: it is used no more, so that many agents need not be copied."""
    names = delta._agents  # noqa: SLF001 - of this module
    agents: str | tuple[str, ...] | dict[str, None] | None
    if type(names) is tuple:
        agents = names[0] if len(names) == 1 else names or None
    else:
        agents = names if give else names.copy()  # type: ignore[union-attr]  # of many: a dict
    rare = (delta.resolves, delta.resolution_type, delta.resolved_at, delta.cost_rest)
    return (
        delta.thread_id,
        delta.turns,
        delta.tokens,
        delta.cost_units,
        delta.first_at,
        delta.last_turn_at,
        agents,
        delta.ensures,
        None if rare == _NONE else rare,
    )


def unpacked(row: Row, *, give: bool = False) -> ThreadDelta:
    """Return a delta of its own from *row*; *give*: the row is used no more."""
    delta = ThreadDelta(row[0], row[4])
    _, delta.turns, delta.tokens, delta.cost_units, _, delta.last_turn_at, agents, delta.ensures, rare = row
    if type(agents) is str:
        delta._agents = (agents,)  # noqa: SLF001
    elif agents is not None:
        delta._agents = agents.copy() if type(agents) is dict and not give else agents  # type: ignore[assignment]  # noqa: SLF001
    if rare is not None:
        delta.resolves, delta.resolution_type, delta.resolved_at, delta.cost_rest = rare
    return delta


_NONE: Final[Rare] = (0, None, None, None)
_CALLS: Final = itemgetter(1, 7, 8)
_FIRST_AT: Final = itemgetter(4)


def calls_of(row: Row) -> int:
    """Return how many calls are summed in *row*."""
    turns, ensures, rare = _CALLS(row)
    return int(turns + ensures if rare is None else turns + ensures + rare[0])


@final
class Deltas(Sequence[ThreadDelta]):
    """Deltas that are kept as rows; each is made when it is asked for, anew each time.

    Attributes:
        rows: what they are made of.
    """

    __slots__ = ("rows",)

    def __init__(self, rows: tuple[Row, ...]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: SupportsIndex) -> ThreadDelta: ...
    @overload
    def __getitem__(self, index: slice) -> Deltas: ...
    def __getitem__(self, index: SupportsIndex | slice) -> ThreadDelta | Deltas:
        return Deltas(self.rows[index]) if isinstance(index, slice) else unpacked(self.rows[index])

    def __iter__(self) -> Iterator[ThreadDelta]:
        return map(unpacked, self.rows)

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # as of deltas

    def __repr__(self) -> str:
        return f"Deltas({list(self)!r})"


def rows_of(deltas: Iterable[ThreadDelta]) -> tuple[Row, ...]:
    """Return *deltas* as rows."""
    return deltas.rows if isinstance(deltas, Deltas) else tuple(map(packed, deltas))


def earliest(rows: Iterable[Row]) -> int:
    """Return the earliest instant of *rows*, of which there is one at least."""
    return int(min(map(_FIRST_AT, rows)))


_SHOWN = (
    "ensures",
    "turns",
    "resolves",
    "tokens",
    "cost",
    "agents",
    "first_at",
    "last_turn_at",
    "resolution_type",
    "resolved_at",
)


def plain(value: Decimal) -> Decimal:
    """Return *value* without trailing zeros after the point and without an exponent above it."""
    short = value.normalize(EXACT)
    exponent = short.as_tuple().exponent
    return short.quantize(Decimal(1), context=EXACT) if isinstance(exponent, int) and exponent > 0 else short
