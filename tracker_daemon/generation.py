"""The deltas of one window, by thread, and how a window is cut into batches.

Rules:
1. Pure: the same calls in the same order give the same batches, in this process or in one that reads them back.
2. Sums are kept as rows (see `delta`). The ordinary turn is added to one in a few operations; whatever else is added as
   `ThreadDelta` says, and the two give the same.
3. `create_missing=False`: what comes to a thread from its first `ensure` on is kept apart (`followers`) when earlier
   calls of the window may find no row, and goes in a later batch. So the outcome does not depend on windows.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain, islice
from typing import TYPE_CHECKING, Final, TypeAlias

from tracker_daemon.delta import Deltas, ThreadDelta, calls_of, packed, unpacked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from tracker_daemon.calls import Cost
    from tracker_daemon.delta import Row

# A call: its thread; agent or resolution type; tokens, or which call it is if no turn; cost; when, in nanoseconds since
# 1970. All have the same five fields, so that those of many can stand one after the other (`call_queue`).
Record: TypeAlias = "tuple[str, str | None, int | str, Cost, int]"

ENSURE: Final = "ensure_conversation"
TURN: Final = "record_turn"
RESOLVE: Final = "resolve"
KINDS: Final = (ENSURE, TURN, RESOLVE)
_UNITS: Final = 10**12
_FLOAT_UNITS: Final = 1e12
# As in `delta`: below it, whether units divided give the float again tells whether they are exact.
_EXACT_BELOW: Final = 1e3


class Generation:
    """The sums of one window by thread, in order of first call.

    Attributes:
        deltas: a row for each thread.
        followers: rows of what came to a thread from its first `ensure` on (rule 3).
        oldest_at: nanoseconds since 1970 of the first call; 0 without any.
    """

    __slots__ = ("create_missing", "deltas", "followers", "oldest_at")

    def __init__(self, *, create_missing: bool) -> None:
        self.create_missing = create_missing
        self.deltas: dict[str, Row] = {}
        self.followers: dict[str, Row] = {}
        self.oldest_at = 0

    def __contains__(self, thread_id: str) -> bool:
        return thread_id in self.deltas or thread_id in self.followers

    def __len__(self) -> int:
        return len(self.deltas) + len(self.followers)

    @property
    def calls(self) -> int:
        """How many calls are summed here."""
        return sum(map(calls_of, self.rows()))

    def rows(self) -> Iterator[Row]:
        """Yield every row, in the order of the batches."""
        return chain(self.deltas.values(), self.followers.values())

    def all(self) -> Iterator[ThreadDelta]:
        """Yield every delta, in the order of the batches."""
        return map(unpacked, self.rows())

    def part(self, first: int, most: int) -> list[ThreadDelta]:
        """Return at most so many deltas, from the *first* one on."""
        return [unpacked(row) for row in islice(self.rows(), first, first + most)]

    def of(self, thread_id: str) -> Iterator[ThreadDelta]:
        """Yield what the generation holds of one thread, in order."""
        for part in (self.deltas, self.followers):
            if thread_id in part:
                yield unpacked(part[thread_id])

    def fold(self, record: Record) -> None:
        """Add one call."""
        self.fold_all((record,), _nothing, Counter())

    def fold_all(  # noqa: PLR0912 - a function called for each record would cost half as much as the whole fold
        self, records: Iterable[Record], on_new: Callable[[str], object], counts: Counter[str]
    ) -> None:
        """Add calls, in order.

        Args:
            records: each is in, whole, when the next one is asked for.
            on_new: called with each thread that is new here, right before it is: what it raises leaves the call out.
            counts: what was added by kind is counted here, also when an exception comes in between.
        """
        # Each step of the loop counts: no comparison is in a chain, in which the interpreter has no quick way for two
        # floats; `round` and `min` cost twice what they do here.
        deltas, simple, turns_added = self.deltas, self.create_missing, 0
        get, slowly, others = deltas.get, self._fold_slowly, list[str]()
        try:
            for thread_id, agent, tokens, cost, taken_at in records:
                row = get(thread_id)
                if type(tokens) is not int:
                    record = (thread_id, agent, tokens, cost, taken_at)
                    slowly(record, row, on_new)
                    others.append(method_of(record))
                    continue
                at = taken_at // 1_000
                if type(cost) is float and cost < _EXACT_BELOW and cost > -_EXACT_BELOW:
                    units = (cost * _FLOAT_UNITS).__round__()
                    ordinary = units / _FLOAT_UNITS == cost
                else:
                    units = cost * _UNITS if (ordinary := type(cost) is int) else 0
                if not ordinary:
                    slowly((thread_id, agent, tokens, cost, taken_at), row, on_new)
                elif row is None:
                    self.oldest_at = self.oldest_at or taken_at
                    on_new(thread_id)
                    deltas[thread_id] = (thread_id, 1, tokens, units, at, at, agent, 0, None)
                else:
                    _, turns, total, paid, first, last, agents, ensures, rare = row
                    # Another agent than the one before, or a turn that may find no row: not so common.
                    if (agent != agents and agent is not None and agents is not None) or not (simple or ensures):
                        slowly((thread_id, agent, tokens, cost, taken_at), row, on_new)
                    else:
                        if last is not None and at > last:
                            last = at
                        else:  # the first turn, or one that was overtaken on its way into the queue
                            first, last = _instants(first, last, at)
                        deltas[thread_id] = (
                            row[0],
                            turns + 1,
                            total + tokens,
                            paid + units,
                            first,
                            last,
                            agents or agent,
                            ensures,
                            rare,
                        )
                turns_added += 1
        finally:
            counts["record_turn"] += turns_added
            if others:
                counts.update(others)

    def _fold_slowly(self, record: Record, row: Row | None, on_new: Callable[[str], object]) -> None:
        thread_id, part = record[0], self.deltas
        if row is not None and not (self.create_missing or row[7]):
            followers = self.followers
            if thread_id in followers or record[2] == ENSURE:
                part, row = followers, followers.get(thread_id)
        delta = ThreadDelta(thread_id, record[-1] // 1_000) if row is None else unpacked(row, give=True)
        add(delta, record)
        if thread_id not in self.deltas:
            self.oldest_at = self.oldest_at or record[-1]
            on_new(thread_id)
        part[thread_id] = packed(delta, give=True)

    def put(self, delta: ThreadDelta, *, late: bool, more: bool = False) -> None:
        """Take in a sum that stands for the first calls of its thread; *late*: of the followers; *more*: its rest."""
        part = self.followers if late else self.deltas
        if more:
            known = unpacked(part[delta.thread_id], give=True)
            known.use(delta.agents)
            part[delta.thread_id] = packed(known, give=True)
            return
        part[delta.thread_id] = packed(delta)
        self.oldest_at = min(self.oldest_at or delta.first_at * 1_000, delta.first_at * 1_000)

    def sums(self) -> Iterator[tuple[ThreadDelta, bool]]:
        """Yield every delta with whether it is a follower; `put` into an empty generation they give this one."""
        for row in self.deltas.values():
            yield unpacked(row), False
        for row in self.followers.values():
            yield unpacked(row), True

    def batches(self, size: int) -> Iterator[Deltas]:
        """Yield the deltas in order, at most *size* at once and no thread twice in one of them."""
        for part in (self.deltas, self.followers):
            rows = iter(part.values())
            while batch := tuple(islice(rows, size)):
                yield Deltas(batch)

    def release(self, rows: Sequence[Row]) -> list[str]:
        """Let go of rows of a settled batch; return their threads."""
        # A batch is cut from one of the two.
        part = self.deltas if self.deltas.get(rows[0][0]) is rows[0] else self.followers
        threads = [row[0] for row in rows]
        for thread_id in threads:
            del part[thread_id]
        return threads

    def without(self, threads: list[str]) -> list[str]:
        """Return those of *threads* of which there is nothing here."""
        for part in (self.deltas, self.followers):
            if part:
                threads = [thread_id for thread_id in threads if thread_id not in part]
        return threads


def _nothing(_: str) -> None:
    pass


def _instants(first: int, last: int | None, at: int) -> tuple[int, int]:
    """Return the earliest call's and the latest turn's instant with a turn at *at*."""
    return min(first, at), at if last is None else max(last, at)


def ensure(thread_id: str, at: int) -> Record:
    """Return an `ensure_conversation`."""
    return thread_id, None, ENSURE, 0, at


def resolve(thread_id: str, resolution_type: str, at: int) -> Record:
    """Return a `resolve`."""
    return thread_id, resolution_type, RESOLVE, 0, at


def method_of(record: Record) -> str:
    """Return the name of the method that was called."""
    return TURN if isinstance(record[2], int) else record[2]


def add(delta: ThreadDelta, record: Record) -> None:
    """Add one queued call to *delta*."""
    _, name, tokens, cost, at = record
    if isinstance(tokens, int):
        delta.turn(name, tokens, cost, at // 1_000)
    elif tokens == ENSURE:
        delta.ensure(at // 1_000)
    else:
        assert name is not None
        delta.resolve(name, at // 1_000)


def summed(records: Sequence[Record]) -> ThreadDelta:
    """Return the sum of calls on one thread."""
    delta = ThreadDelta(records[0][0], records[0][-1] // 1_000)
    for record in records:
        add(delta, record)
    return delta
