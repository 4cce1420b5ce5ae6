"""The port: where batches go, and what whoever takes them promises.

Rules:
1. Applying a batch twice changes nothing: the ledger row of its (producer, lane) moves from `sequence - 1` to
   `sequence` in the same transaction as the data, or nothing happens.
2. What `apply` raises says what follows: a `SinkFault` by its kind, `Fenced` for ever, `LedgerMissing` and
   `LedgerRegressed` as their docstrings say; any other exception counts as `SinkFault("other")`.
3. An exception from `apply` leaves the outcome unknown; the same batch comes again.
4. Whether a delta without an `ensure` may create its row is the batch's own affair (`Batch.create_missing`): one sink
   applies what was taken under either setting.
5. All coroutines of one sink are called from one event loop (asyncio), one at a time; `abort` from any thread.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeAlias, get_args, runtime_checkable

from tracker_daemon.errors import TrackerError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from uuid import UUID

    from tracker_daemon.batch import Batch
    from tracker_daemon.delta import ThreadDelta

FaultKind: TypeAlias = Literal[
    "connection", "timeout", "lock", "readonly", "auth", "schema", "capacity", "data", "other"
]
FAULT_KINDS: Final[tuple[FaultKind, ...]] = get_args(FaultKind)

DeadReason: TypeAlias = Literal["overflow", "constraint", "data", "raised", "driver"]
DEAD_REASONS: Final[tuple[DeadReason, ...]] = get_args(DeadReason)


class SinkFault(TrackerError):  # noqa: N818
    """The sink could not apply a batch now; *kind* decides what follows, `__cause__` is the driver's error."""

    def __init__(self, kind: FaultKind, message: str) -> None:
        super().__init__(kind, message)
        self.kind, self.message = kind, message

    def __str__(self) -> str:
        return self.message


class LedgerMissing(TrackerError):  # noqa: N818 - says what is the case
    """The ledger row of an open producer is gone. It never means a new producer: stop and say so."""

    def __init__(self, producer: str, lane: int) -> None:
        super().__init__(producer, lane)
        self.producer, self.lane = producer, lane

    def __str__(self) -> str:
        return (
            f"the ledger row of producer {self.producer} lane {self.lane} is gone: tracker_ledger was truncated, the "
            "database was replaced by one without it, or a month has passed without a sign of life. Nothing more of "
            "this producer is written: whether the batch in hand was applied cannot be known"
        )


class BegunOnStream(LedgerMissing):
    """What an earlier process left was begun on a stream, and comes to a database."""

    def __str__(self) -> str:
        return (
            f"producer {self.producer} was begun on a stream: what of its batches was published there comes to the "
            "database by the stream's consumers, and applied here it would be counted again. Nothing of it is applied. "
            "To publish the rest, start a tracker on that stream with this journal: "
            "Tracker('nats://HOST/NAME', journal=DIR)"
        )


class LedgerRegressed(TrackerError):  # noqa: N818 - says what is the case
    """The database has forgotten commits of this producer: its ledger stands before what was acknowledged."""

    def __init__(self, producer: str, lane: int, expected: int, found: int) -> None:
        super().__init__(producer, lane, expected, found)
        self.producer, self.lane, self.expected, self.found = producer, lane, expected, found

    def __str__(self) -> str:
        return (
            f"producer {self.producer} lane {self.lane}: the ledger is at sequence {self.found}, {self.expected} was "
            "committed. The database forgot commits: a failover to a standby that lagged, a restored backup, or a "
            "crash with synchronous_commit=off"
        )


STREAM_BITS: Final = 47
"""A stream's identity is this bit and those below."""


@dataclass(frozen=True, slots=True)
class Opened:
    """Where a (producer, lane) stands when opened.

    Attributes:
        epoch: this life's.
        applied_sequence: the highest sequence applied.
        database: the system identifier of the database, or the identity of the stream; 0 where there is none.
    """

    epoch: int
    applied_sequence: int
    database: int = field(default=0, compare=False)

    @property
    def is_of_a_stream(self) -> bool:
        """Whether `database` is a stream's: Postgres begins its own with the time, far above."""
        return self.database >> STREAM_BITS == 1


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A delta that the sink will never take, stored with its reason in the transaction of its batch."""

    delta: ThreadDelta
    reason: DeadReason
    sqlstate: str
    error: str


@dataclass(frozen=True, slots=True)
class Applied:
    """The batch is in the sink.

    Attributes:
        rows: threads inserted or updated.
        skipped: threads without a row, left alone because of the batch's `create_missing=False`.
        duplicate: the ledger says that an earlier try had applied the batch already.
        dead_letters: the deltas that were set aside, out of the batch's own.
    """

    rows: int
    skipped: int = 0
    duplicate: bool = False
    dead_letters: tuple[DeadLetter, ...] = ()

    @property
    def dead(self) -> dict[str, DeadReason]:
        """Why each thread of a dead letter is one."""
        return {letter.delta.thread_id: letter.reason for letter in self.dead_letters}


@runtime_checkable
class Sink(Protocol):
    """Where a `Tracker` sends its batches; give one to `Tracker(sink)`."""

    async def open(self, producer: UUID, lane: int, *, known: Opened | None = None, after: int = 0) -> Opened:
        """Register this life of (producer, lane): a new epoch, which fences off every older one.

        Args:
            producer: whose row of the ledger it is.
            lane: which of its streams.
            known: where it was seen last. A ledger without it then raises `LedgerMissing`, and the new epoch is above
                that one too, whatever the database has forgotten.
            after: the life goes on behind this sequence at least; what the ledger lacks up to it is given up.
        """
        ...

    async def apply(self, batch: Batch) -> Applied:
        """Apply *batch* exactly once, however often it is called with it."""
        ...

    def abort(self) -> None:
        """Make what is under way fail at once: a shutdown deadline has passed. Called from any thread."""
        ...

    async def aclose(self, producer: UUID, lane: int, *, clean: bool) -> None:
        """Let go of connections. *clean*: nothing is pending, the ledger row may be marked closed."""
        ...


@runtime_checkable
class Recalls(Protocol):
    """What a sink may offer beside the port: to say what became of a batch that its ledger has applied."""

    async def recall(self, batch: Batch) -> Applied:
        """Return *batch* as a duplicate, with its dead letters; write nothing. The ledger stands at it, or after it."""
        ...


@runtime_checkable
class Looks(Protocol):
    """What a sink may offer beside the port: to tell a bad row from a table at fault by what comes later.

    Attributes:
        following: returns a few deltas that wait behind a batch, for trying alone; set by whoever applies batches.
    """

    following: Callable[[Batch], Sequence[ThreadDelta]]
