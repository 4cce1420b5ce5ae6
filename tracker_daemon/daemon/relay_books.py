"""What the relay has in hand and what became of it, in calls, for the metrics.

Rules:
1. `accepted = applied + dead_lettered + queue_calls` in every reading, and no counter ever goes back.
2. A batch is in hand from its arrival to its answer; and, where the database failed, until its sender comes again with
   it: that is what waits while the database is away. A sender that was not heard for a minute is expected no more.
3. A batch in hand may leave unapplied (its ledger refuses it, its sender went to another daemon). Calls of such a
   batch that a reading has shown as accepted stay in `queue_calls` until as many others were accepted in their place.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Final

from tracker_daemon.books import Books
from tracker_daemon.sink import Applied

if TYPE_CHECKING:
    from collections.abc import Iterable
    from uuid import UUID

    from tracker_daemon.batch import Batch
    from tracker_daemon.clock import Clock
    from tracker_daemon.delta import ThreadDelta

    Key = tuple[UUID, int]

_EXPECTED: Final = 60.0
_MOST_RETURNED: Final = 10_000


@dataclass(slots=True, eq=False)
class Hand:
    """A batch in hand.

    Without its deltas: what is handed back is its sender's to keep.

    Attributes:
        key, identity: whose it is, and which one.
        threads: in it.
        calls: in it, by kind.
        since: when it came first, seconds since 1970.
        again: whether it came before, and the database failed: it may have been committed nevertheless.
        heard: when it was handed back, seconds since 1970.
    """

    key: Key
    identity: tuple[int, int]
    threads: int
    calls: Counter[str]
    since: float
    again: bool = False
    heard: float = 0.0


@dataclass(slots=True)
class RelayBooks:
    """Counts batches' calls; read from any thread.

    Args:
        clock: tells when a batch came.
    """

    clock: Clock
    _lock: Lock = field(default_factory=Lock)
    _in_hand: dict[int, Hand] = field(default_factory=dict)
    _returned: dict[Key, Hand] = field(default_factory=dict)
    _shown: Counter[str] = field(default_factory=Counter)
    _applied: Counter[str] = field(default_factory=Counter)
    _dead: Counter[str] = field(default_factory=Counter)
    _dead_kinds: Counter[str] = field(default_factory=Counter)
    _skipped: int = 0

    def take(self, batch: Batch) -> Hand:
        """A batch has come."""
        key, identity = (batch.producer, batch.lane), (batch.epoch, batch.sequence)
        hand = Hand(key, identity, len(batch.deltas), _kinds(batch.deltas), self.clock.wall())
        with self._lock:
            before = self._returned.pop(key, None)
            if before is not None and before.identity == identity:
                hand.since, hand.again = before.since, True
            self._in_hand[id(hand)] = hand
        return hand

    def give_back(self, hands: Iterable[Hand]) -> None:
        """The database failed: their senders will come again."""
        now = self.clock.wall()
        with self._lock:
            for hand in hands:
                del self._in_hand[id(hand)]
                hand.heard = now
                self._returned[hand.key] = hand
            if len(self._returned) > _MOST_RETURNED:
                self._returned = {key: hand for key, hand in self._returned.items() if _expected(hand, now)}
            if len(self._returned) > _MOST_RETURNED:
                self._returned.clear()

    def settle(self, answered: Iterable[tuple[Hand, Batch, object]]) -> None:
        """Count what became of each: applied, or whatever its ledger said."""
        with self._lock:
            for hand, batch, answer in answered:
                del self._in_hand[id(hand)]
                # A repeat was counted when it was applied, here or by another daemon, unless its answer was lost here.
                if isinstance(answer, Applied) and (hand.again or not answer.duplicate):
                    self._count(hand, batch, answer)

    def _count(self, hand: Hand, batch: Batch, answer: Applied) -> None:
        applied = hand.calls.copy()
        self._skipped += answer.skipped
        dead = answer.dead
        for delta in batch.deltas if dead else ():
            if reason := dead.get(delta.thread_id):
                self._dead[reason] += delta.calls
                kinds = _kinds([delta])
                self._dead_kinds += kinds
                applied -= kinds
        self._applied += applied

    def forget(self, producer: UUID, lane: int) -> None:
        """The client has ended: it comes no more."""
        with self._lock:
            self._returned.pop((producer, lane), None)

    def read(self) -> Books:
        """Return the numbers of this instant."""
        now = self.clock.wall()
        with self._lock:
            hands = [*self._in_hand.values(), *(hand for hand in self._returned.values() if _expected(hand, now))]
            settled = self._applied + self._dead_kinds
            for kind, calls in (settled + sum((hand.calls for hand in hands), Counter())).items():
                self._shown[kind] = max(self._shown[kind], calls)
            return Books(
                accepted=dict(self._shown),
                applied=dict(self._applied),
                dead_lettered=dict(self._dead),
                lost={},
                queue_calls=self._shown.total() - settled.total(),
                threads=sum(hand.threads for hand in hands),
                oldest_at=round(min((hand.since for hand in hands), default=0) * 1e9),
                rows_skipped=self._skipped,
            )


def _kinds(deltas: Iterable[ThreadDelta]) -> Counter[str]:
    ensures = turns = resolves = 0
    for delta in deltas:
        ensures, turns, resolves = ensures + delta.ensures, turns + delta.turns, resolves + delta.resolves
    return Counter({"ensure_conversation": ensures, "record_turn": turns, "resolve": resolves})


def _expected(hand: Hand, now: float) -> bool:
    return now - hand.heard < _EXPECTED
