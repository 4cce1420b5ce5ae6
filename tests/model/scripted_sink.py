"""A sink in memory that honours the ledger, and whose every `open` and `apply` ends as its script says.

Rules:
1. An attempt takes effect whole or not at all, by the ledger's compare-and-set: at once, or late. So does `open`: one
   that comes late finds that the epoch it saw has passed. It raises `LedgerMissing` when the row of a producer
   that it has opened is gone, and never gives an epoch twice.
2. Both coroutines pause before they do anything, at "open" and "apply" (see `manual_clock`); the outcome is taken from
   the script when they are resumed. With an empty script they succeed.
3. Every commit can be forgotten again, the last ones first, as by a failover to a standby that lagged.
4. Like the Postgres sink, it forgets producers without a sign of life for a month, when anybody opens.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, TypeVar

from tests.model.manual_clock import pause, run
from tracker_daemon.errors import Fenced, SchemaError
from tracker_daemon.memory_sink import MemoryRow, MemorySink
from tracker_daemon.sink import (
    FAULT_KINDS,
    Applied,
    DeadLetter,
    FaultKind,
    LedgerMissing,
    LedgerRegressed,
    Opened,
    SinkFault,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from tests.model.manual_clock import ManualClock
    from tracker_daemon.batch import Batch
    from tracker_daemon.delta import ThreadDelta

Fault: TypeAlias = Literal[FaultKind, "SchemaError", "RuntimeError"]
FAULTS: Final[tuple[Fault, ...]] = (*FAULT_KINDS, "SchemaError", "RuntimeError")
How: TypeAlias = Literal["done", "fails", "unanswered", "late", "cancelled", "cancelled_after"]
Identity: TypeAlias = "tuple[UUID, int, int, int]"
Answer = TypeVar("Answer", Opened, Applied)
MONTH: Final = 30 * 86_400.0


def identity(batch: Batch) -> Identity:
    """Return what names *batch*."""
    return (batch.producer, batch.lane, batch.epoch, batch.sequence)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one attempt ends.

    Attributes:
        how: "done"; "fails" before anything; "unanswered": done, and the answer is lost; "late": lost on the way, and
            done when it arrives; "cancelled" before anything; "cancelled_after" it was done.
        fault: what is raised where there is no answer.
        dead: the deltas that are dead letters: bit n says it of the batch's delta n.
        first: what is late arrives just before this attempt.
    """

    how: How = "done"
    fault: Fault = "connection"
    dead: int = 0
    first: bool = False


DONE: Final = Outcome()


def raised(fault: Fault) -> Exception:
    """Return the exception of a fault."""
    if fault == "SchemaError":
        return SchemaError("table conversations has no column total_tokens")
    if fault == "RuntimeError":
        return RuntimeError("a bug in somebody's sink")
    return SinkFault(fault, f"a fault of kind {fault}")


class _Passed(Exception):  # noqa: N818 - says what is the case
    """An `open` came too late: the epoch that it saw has passed."""


def took_effect(answer: object) -> bool:
    """Say whether an attempt with this answer changed the sink."""
    return isinstance(answer, Opened) or (isinstance(answer, Applied) and not answer.duplicate)


@dataclass(frozen=True, slots=True)
class _State:
    rows: dict[str, MemoryRow]
    ledger: dict[tuple[UUID, int], Opened]
    touched: dict[tuple[UUID, int], float]
    applied: dict[Identity, Batch]
    letters: dict[Identity, tuple[DeadLetter, ...]]
    skipped: tuple[ThreadDelta, ...]
    opens: bool
    """Whether the commit that led here was an `open`."""


class ScriptedSink(MemorySink):
    """A `Sink` on *clock*'s time.

    Attributes:
        script: the outcomes of the next attempts.
        opened, received: the producer of every `open`, the batch of every `apply`, in order.
        asked: what every `open` was called with.
        named: the deltas of every batch, by producer and sequence; written by whoever checks names.
        answer: what the last attempt returned or raised.
        applied: the batches in effect, by identity, as they were sent.
        letters: the dead letters stored, by the identity of their batch.
        skipped: the deltas skipped for want of a row.
        late: attempts that have not arrived yet.
        last: of each producer, where it was last told that the ledger stands.
        closed: the producer of every `aclose`, and whether it was clean.
        collected: the producers forgotten by rule 4.
        met: how often the remarkable things happened.
    """

    def __init__(self, clock: ManualClock) -> None:
        super().__init__()
        self._clock = clock
        self.script: deque[Outcome] = deque()
        self.opened: list[UUID] = []
        self.asked: list[tuple[UUID, Opened | None, int]] = []
        self.named: dict[tuple[UUID, int], tuple[ThreadDelta, ...]] = {}
        self.received: list[Batch] = []
        self.answer: Opened | Applied | BaseException | None = None
        self.applied: dict[Identity, Batch] = {}
        self.letters: dict[Identity, tuple[DeadLetter, ...]] = {}
        self.skipped: tuple[ThreadDelta, ...] = ()
        self.late: list[Callable[[], object]] = []
        self.last: dict[UUID, Opened] = {}
        self.closed: list[tuple[UUID, bool]] = []
        self.collected: set[UUID] = set()
        self.aborts = 0
        self.met = Counter[str]()
        self._touched: dict[tuple[UUID, int], float] = {}
        self._history = [self._state()]

    # -- the port ----------------------------------------------------------------------------------

    async def open(self, producer: UUID, lane: int, *, known: Opened | None = None, after: int = 0) -> Opened:
        """See `Sink.open`."""
        self.opened.append(producer)
        self.asked.append((producer, known, after))
        await pause("open")
        outcome = self._next()
        seen, last = self.ledger.get((producer, lane)), self.last.get(producer)
        epoch = max(seen_last.epoch if seen_last else 0 for seen_last in (last, known))
        opened = self.last[producer] = self._attempt(
            outcome, lambda: self._open((producer, lane), seen, epoch, after), "opens"
        )
        return opened

    async def apply(self, batch: Batch) -> Applied:
        """See `Sink.apply`."""
        self.received.append(batch)
        await pause("apply")
        outcome = self._next()
        applied = self._attempt(outcome, lambda: self._apply(batch, outcome.dead), "commits")
        self.last[batch.producer] = Opened(batch.epoch, batch.sequence)
        return applied

    def abort(self) -> None:
        """See `Sink.abort`: counted."""
        self.aborts += 1

    async def aclose(self, producer: UUID, lane: int, *, clean: bool) -> None:
        """See `Sink.aclose`: noted. Like the Postgres sink, it says when a clean end finds commits forgotten."""
        self.closed.append((producer, clean))
        last, found = self.last.get(producer), self.ledger.get((producer, lane))
        if not clean or last is None or found == last:
            return
        self.met["ledger_at_close"] += 1
        if found is None:
            raise LedgerMissing(str(producer), lane)
        if found.epoch > last.epoch:
            raise Fenced(str(producer), lane, last.epoch, found.epoch)
        raise LedgerRegressed(str(producer), lane, last.applied_sequence, found.applied_sequence)

    # -- what else happens to a database -----------------------------------------------------------

    def arrive(self) -> None:
        """What is late arrives."""
        late, self.late = self.late, []
        for attempt in late:
            attempt()

    def fail_over(self, commits: int, *, opens: bool) -> None:
        """Forget the last *commits* commits, and everything under way with them; none before an `open` but with *opens*."""
        self.late.clear()
        kept = len(self._history)
        while commits and kept > 1 and (opens or not self._history[kept - 1].opens):
            commits, kept = commits - 1, kept - 1
        self.met["commits_forgotten"] += len(self._history) - kept
        del self._history[kept:]
        state = self._history[-1]
        self.rows = {thread_id: replace(row) for thread_id, row in state.rows.items()}
        self.ledger, self._touched = dict(state.ledger), dict(state.touched)
        self.applied, self.letters, self.skipped = dict(state.applied), dict(state.letters), state.skipped

    def remove_row(self, producer: UUID) -> None:
        """Somebody deletes the ledger's row of *producer*, and nothing of it is under way."""
        self.late.clear()
        self.ledger.pop((producer, 0), None)
        self._commit()

    def rival(self, producer: UUID) -> int:
        """Somebody else opens *producer*, whose row is there; return the epoch."""
        found = self.ledger[producer, 0]
        self.ledger[producer, 0] = Opened(found.epoch + 1, found.applied_sequence)
        self._commit((producer, 0), opens=True)
        return found.epoch + 1

    # -- inside ------------------------------------------------------------------------------------

    def _next(self) -> Outcome:
        outcome = self.script.popleft() if self.script else DONE
        if outcome.first:
            self.arrive()
        return outcome

    def _attempt(self, outcome: Outcome, do: Callable[[], Answer], what: str) -> Answer:
        try:
            answer = self._answer(outcome, do, what)
        except BaseException as error:
            self.answer = error
            raise
        self.answer = answer
        return answer

    def _answer(self, outcome: Outcome, do: Callable[[], Answer], what: str) -> Answer:
        if outcome.how == "done":
            return do()
        if outcome.how == "late":
            self.late.append(lambda: self._arrived(self._quietly(do), what))
        if outcome.how in ("unanswered", "cancelled_after") and took_effect(self._quietly(do)):
            self.met[f"ambiguous_{what}"] += 1
        if outcome.how.startswith("cancelled"):
            self.met["cancelled"] += 1
            raise asyncio.CancelledError
        self.met[f"{outcome.fault} faults"] += 1
        raise raised(outcome.fault)

    def _arrived(self, answer: object, what: str) -> None:
        self.met[f"zombie_{what}" if took_effect(answer) else f"zombie_{what}_in_vain"] += 1

    def _quietly(self, do: Callable[[], Answer]) -> Answer | None:
        """Do it; whatever it would answer is not heard."""
        try:
            return do()
        except (_Passed, Fenced, LedgerMissing, LedgerRegressed):
            return None

    def _open(self, key: tuple[UUID, int], seen: Opened | None, known: int, after: int) -> Opened:
        self._collect()
        found = self.ledger.get(key)
        if found is None and known:
            raise LedgerMissing(str(key[0]), key[1])
        if (found and found.epoch) != (seen and seen.epoch):
            raise _Passed
        before = found or Opened(0, 0)
        opened = self.ledger[key] = Opened(max(before.epoch, known) + 1, max(before.applied_sequence, after))
        self._commit(key, opens=True)
        return opened

    def _apply(self, batch: Batch, dead: int) -> Applied:
        name = identity(batch)
        letters = tuple(
            DeadLetter(delta, "overflow", "22003", "bigint out of range")
            for number, delta in enumerate(batch.deltas)
            if dead >> number & 1
        )
        kept = tuple(delta for number, delta in enumerate(batch.deltas) if not dead >> number & 1)
        rows_before = set(self.rows)
        try:
            applied = run(super().apply(replace(batch, deltas=kept)))
        except (Fenced, LedgerMissing, LedgerRegressed) as error:
            self.met[type(error).__name__] += 1
            raise
        if applied.duplicate:
            # It says so of an earlier try's letters, too: whoever settles the batch must know.
            return replace(applied, dead_letters=self.letters.get(name, ()))
        self.applied[name], self.letters[name] = batch, letters
        if applied.skipped:
            missing = (delta for delta in kept if delta.thread_id not in rows_before and not delta.ensures)
            self.skipped += tuple(missing)
        self.met["dead_letters"] += len(letters)
        self.met["skipped"] += applied.skipped
        self._commit((batch.producer, batch.lane))
        return replace(applied, dead_letters=letters)

    def _collect(self) -> None:
        for key, at in list(self._touched.items()):
            if key in self.ledger and self._clock.monotonic() - at > MONTH:
                del self.ledger[key]
                self.collected.add(key[0])

    def _commit(self, key: tuple[UUID, int] | None = None, *, opens: bool = False) -> None:
        if key is not None:
            self._touched[key] = self._clock.monotonic()
        self._history.append(self._state(opens=opens))

    def _state(self, *, opens: bool = False) -> _State:
        rows = {thread_id: replace(row) for thread_id, row in self.rows.items()}
        ledger, touched = dict(self.ledger), dict(self._touched)
        return _State(rows, ledger, touched, dict(self.applied), dict(self.letters), self.skipped, opens)
