"""The deltas of one window, by thread, and how a window is cut into batches.

Rules:
1. Pure: the same calls in the same order give the same batches, in this process or in one that reads them back.
2. `create_missing=False`: what comes to a thread from its first `ensure` on is kept apart (`followers`) when earlier
   calls of the window may find no row, and goes in a later batch. So the outcome does not depend on windows.
"""

from __future__ import annotations

from itertools import chain, islice
from typing import TYPE_CHECKING, Final, TypeAlias

from tracker_daemon.delta import ThreadDelta

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tracker_daemon.calls import Cost

# A call in the queue; its length tells its kind. The instant comes last, in nanoseconds since 1970.
Ensure: TypeAlias = "tuple[str, int]"
Resolve: TypeAlias = "tuple[str, str, int]"
Turn: TypeAlias = "tuple[str, str | None, int, Cost, int]"
Record: TypeAlias = "Ensure | Resolve | Turn"

KINDS: Final = {2: "ensure_conversation", 5: "record_turn", 3: "resolve"}
_ENSURE: Final = 2


class Generation:
    """The deltas of one window by thread, in order of first call."""

    __slots__ = ("create_missing", "deltas", "followers", "oldest_at")

    def __init__(self, *, create_missing: bool) -> None:
        self.create_missing = create_missing
        self.deltas: dict[str, ThreadDelta] = {}
        self.followers: dict[str, ThreadDelta] = {}
        self.oldest_at = 0
        """Nanoseconds since 1970 of the first call; 0 without any."""

    def __contains__(self, thread_id: str) -> bool:
        return thread_id in self.deltas or thread_id in self.followers

    def __len__(self) -> int:
        return len(self.deltas) + len(self.followers)

    @property
    def calls(self) -> int:
        """How many calls are summed here."""
        return sum(delta.calls for delta in self.all())

    def all(self) -> Iterator[ThreadDelta]:
        """Yield every delta, in the order of the batches."""
        return chain(self.deltas.values(), self.followers.values())

    def of(self, thread_id: str) -> Iterator[ThreadDelta]:
        """Yield what the generation holds of one thread, in order."""
        for part in (self.deltas, self.followers):
            if thread_id in part:
                yield part[thread_id]

    def fold(self, record: Record) -> bool:
        """Add one call; say whether its thread is new here."""
        thread_id = record[0]
        delta = self.deltas.get(thread_id)
        new = delta is None
        if delta is None:
            delta = self.deltas[thread_id] = ThreadDelta(thread_id, record[-1] // 1_000)
            if not self.oldest_at:
                self.oldest_at = record[-1]
        elif not self.create_missing and not delta.ensures:
            delta = self._follower(thread_id, delta, record)
        add(delta, record)
        return new

    def _follower(self, thread_id: str, delta: ThreadDelta, record: Record) -> ThreadDelta:
        followers = self.followers
        if thread_id not in followers and len(record) == _ENSURE:
            followers[thread_id] = ThreadDelta(thread_id, record[-1] // 1_000)
        return followers.get(thread_id, delta)

    def put(self, delta: ThreadDelta, *, late: bool, more: bool = False) -> None:
        """Take in a sum that stands for the first calls of its thread; *late*: of the followers; *more*: its rest."""
        part = self.followers if late else self.deltas
        if more:
            part[delta.thread_id].use(delta.agents)
            return
        part[delta.thread_id] = delta
        self.oldest_at = min(self.oldest_at or delta.first_at * 1_000, delta.first_at * 1_000)

    def sums(self) -> Iterator[tuple[ThreadDelta, bool]]:
        """Yield every delta with whether it is a follower; `put` into an empty generation they give this one."""
        for delta in self.deltas.values():
            yield delta, False
        for delta in self.followers.values():
            yield delta, True

    def batches(self, size: int) -> Iterator[tuple[ThreadDelta, ...]]:
        """Yield the deltas in order, at most *size* at once and no thread twice in one of them."""
        for part in (self.deltas, self.followers):
            deltas = iter(part.values())
            while batch := tuple(islice(deltas, size)):
                yield batch

    def release(self, delta: ThreadDelta) -> None:
        """Let go of a settled delta."""
        thread_id = delta.thread_id
        part = self.deltas if self.deltas.get(thread_id) is delta else self.followers
        del part[thread_id]


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
