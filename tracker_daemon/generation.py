"""The deltas of one window, by thread, and how a window is cut into batches.

Rules:
1. Pure: the same calls in the same order give the same batches, in this process or in one that reads them back.
2. Sums are kept as rows (see `delta`). The ordinary turn is added to one in a few operations; whatever else is added as
   `ThreadDelta` says, and the two give the same.
3. `create_missing=False`: what comes to a thread from its first `ensure` on is kept apart (`followers`) when earlier
   calls of the window may find no row, and goes in a later batch. So the outcome does not depend on windows.
"""

from __future__ import annotations

from itertools import chain, islice
from typing import TYPE_CHECKING, Final, TypeAlias

from tracker_daemon.delta import Deltas, ThreadDelta, calls_of, packed, unpacked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from tracker_daemon.calls import Cost
    from tracker_daemon.delta import Row

# A call in the queue; its length tells its kind. The instant comes last, in nanoseconds since 1970.
Ensure: TypeAlias = "tuple[str, int]"
Resolve: TypeAlias = "tuple[str, str, int]"
Turn: TypeAlias = "tuple[str, str | None, int, Cost, int]"
Record: TypeAlias = "Ensure | Resolve | Turn"

KINDS: Final = {2: "ensure_conversation", 5: "record_turn", 3: "resolve"}
_ENSURE: Final = 2
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
        return sum(map(calls_of, self._rows()))

    def _rows(self) -> Iterator[Row]:
        return chain(self.deltas.values(), self.followers.values())

    def all(self) -> Iterator[ThreadDelta]:
        """Yield every delta, in the order of the batches."""
        return map(unpacked, self._rows())

    def of(self, thread_id: str) -> Iterator[ThreadDelta]:
        """Yield what the generation holds of one thread, in order."""
        for part in (self.deltas, self.followers):
            if thread_id in part:
                yield unpacked(part[thread_id])

    def fold(self, record: Record) -> None:
        """Add one call."""
        self.fold_all((record,), _nothing)

    def fold_all(self, records: Iterable[Record], on_new: Callable[[str], object]) -> None:
        """Add calls, in order; *on_new* is called with each thread that is new here, right after it is.

        A call is added whole or not at all: when an exception comes in between, all before the one that was taken last
        from *records* are in.
        """
        deltas, simple = self.deltas, self.create_missing
        get, exact = deltas.get, _EXACT_BELOW
        for record in records:
            row = get(record[0])
            if len(record) == 5 and (simple or row is None or row[7]):
                thread_id, agent, tokens, cost, at = record
                at //= 1_000
                if type(cost) is float and -exact < cost < exact:
                    units = round(cost * _FLOAT_UNITS)
                    if units / _FLOAT_UNITS != cost:
                        self._fold_slowly(record, row, on_new)
                        continue
                elif type(cost) is int:
                    units = cost * _UNITS
                else:
                    self._fold_slowly(record, row, on_new)
                    continue
                if row is None:
                    deltas[thread_id] = (thread_id, 1, tokens, units, at, at, agent, 0, None)
                    if not self.oldest_at:
                        self.oldest_at = record[4]
                    on_new(thread_id)
                    continue
                thread_id, turns, total, paid, first, last, agents, ensures, rare = row
                if agent is not None and agent is not agents and agent != agents:
                    if agents is None:
                        agents = agent
                    elif type(agents) is dict:
                        agents[agent] = None  # this row's alone, and so the next one's
                    elif type(agents) is str or agent not in agents:
                        self._fold_slowly(record, row, on_new)
                        continue
                if last is None or at > last:
                    last = at
                if at < first:
                    first = at
                deltas[thread_id] = (
                    thread_id,
                    turns + 1,
                    total + tokens,
                    paid + units,
                    first,
                    last,
                    agents,
                    ensures,
                    rare,
                )
            else:
                self._fold_slowly(record, row, on_new)

    def _fold_slowly(self, record: Record, row: Row | None, on_new: Callable[[str], object]) -> None:
        thread_id, part = record[0], self.deltas
        if row is None:
            delta = ThreadDelta(thread_id, record[-1] // 1_000)
        elif not self.create_missing and not row[7] and (thread_id in self.followers or len(record) == _ENSURE):
            part = self.followers
            later = part.get(thread_id)
            delta = ThreadDelta(thread_id, record[-1] // 1_000) if later is None else unpacked(later, give=True)
        else:
            delta = unpacked(row, give=True)
        add(delta, record)
        part[thread_id] = packed(delta, give=True)
        if row is None:
            if not self.oldest_at:
                self.oldest_at = record[-1]
            on_new(thread_id)

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

    def release(self, row: Row) -> None:
        """Let go of a settled row."""
        thread_id = row[0]
        part = self.deltas if self.deltas.get(thread_id) is row else self.followers
        del part[thread_id]


def _nothing(_: str) -> None:
    pass


def add(delta: ThreadDelta, record: Record) -> None:
    """Add one queued call to *delta*."""
    at = record[-1] // 1_000
    if len(record) == 5:
        delta.turn(record[1], record[2], record[3], at)
    elif len(record) == 2:
        delta.ensure(at)
    else:
        delta.resolve(record[1], at)


def summed(records: Sequence[Record]) -> ThreadDelta:
    """Return the sum of calls on one thread."""
    delta = ThreadDelta(records[0][0], records[0][-1] // 1_000)
    for record in records:
        add(delta, record)
    return delta
