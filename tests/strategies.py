"""Random calls and histories, and processes that carry them to a sink at their own pace."""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from hypothesis import strategies as st

from tracker_daemon.backlog import Backlog
from tracker_daemon.batch import Batch
from tracker_daemon.generation import ensure, resolve

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tracker_daemon.generation import Record
    from tracker_daemon.sink import Applied, Opened, Sink

NOW = 1_700_000_000_123_456_000
"""Nanoseconds since 1970 of a history's first call."""

AWKWARD = (
    "\\.", "\\N", "\\", "\\\\", '\\"', '"', "'", "''", "{", "}", "{}", "{a,b}", ",", "NULL", "null", '"NULL"',
    "\t", "\n", "\r\n", "\v", "\x01", "\x7f", " ", " a ", "\u00a0", "\u200b", "\ufeff", "é", "日本語", "\U0001f600",
    "e\u0301", "%s", "%(x)s", "%%", "$1", "(", ")", "--", ";", "/*", "t", "1", "a", "A", "[1:2]={a,b}",
)  # fmt: skip
"""Names that mean something to COPY, to array literals, to SQL or to the driver."""
LONG = ("x" * 512, "é" * 256, "\U0001f600" * 128, "\\" * 512, '"' * 512, "y" * 120, "y" * 121, "日" * 120)


def text(size: int = 6) -> st.SearchStrategy[str]:
    """Any characters that a name may have."""
    alphabet = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
    return st.text(alphabet, min_size=1, max_size=size)


def names() -> st.SearchStrategy[str]:
    """Names that the front door accepts."""
    plain = st.sampled_from(["a", "b", "billing", "refunds"])
    return st.one_of(plain, st.sampled_from(AWKWARD), text(), st.sampled_from(LONG))


def short_names() -> st.SearchStrategy[str]:
    """Names that fit the columns of COPY."""
    return st.one_of(st.sampled_from(["a", "b", "billing", "refunds"]), st.sampled_from(AWKWARD), text())


def costs() -> st.SearchStrategy[Any]:
    """Costs that the front door accepts: as people have them, and of any size."""
    return st.one_of(
        st.floats(0, 10).map(lambda value: round(value, 6)),
        st.floats(-10, 10),
        st.integers(-(10**6), 10**6),
        st.decimals(-1_000, 1_000, places=12),
        any_costs(),
    )


def any_costs() -> st.SearchStrategy[Any]:
    """Costs of every size and exponent, the awkward ones first."""
    awkward = (0, 0.0, -0.0, 0.1, 5e-324, 1.7976931348623157e308, 999.9999999999999, 1e-12, 1e-13, 1e22, 1e23, 2**63)
    decimals = (
        "0",
        "-0",
        "0E+10",
        "0.0",
        "1E-12",
        "1E-13",
        "-1E-16383",
        "1E+1999",
        "-9.99E+1999",
        "1e1000",
        "1.10",
        "1E+3",
    )
    return st.one_of(
        st.sampled_from(awkward),
        st.sampled_from([Decimal(each) for each in decimals]),
        st.floats(allow_nan=False, allow_infinity=False),
        st.integers(-(2**200), 2**200),
        st.decimals(allow_nan=False, allow_infinity=False).filter(_fits),
    )


def _fits(value: Decimal) -> bool:
    return value.adjusted() < 2_000 and int(value.as_tuple().exponent) >= -16_383


def tokens() -> st.SearchStrategy[int]:
    """Counts of tokens of which a history's sum stays in the column."""
    return st.one_of(st.integers(0, 5_000), st.integers(-(2**56), 2**56), st.just(0))


@dataclass(frozen=True, slots=True)
class History:
    """Calls in order of time, the process of each, and how they travel.

    Attributes:
        records: the calls, as the front door queues them.
        process: of each call, which process makes it.
        seals: of each call, whether its process's window ends with it.
        picks: which process sends its next batch; what is left when they are used up goes process by process.
        batch_size: deltas in one batch.
    """

    records: tuple[Record, ...]
    process: tuple[int, ...]
    seals: tuple[bool, ...]
    picks: tuple[int, ...]
    batch_size: int

    @property
    def processes(self) -> int:
        """How many processes there are."""
        return max(self.process, default=0) + 1

    def windows(self, process: int) -> list[list[Record]]:
        """Return the calls of one process, a list a window."""
        found: list[list[Record]] = [[]]
        for record, made_by, seals in zip(self.records, self.process, self.seals, strict=True):
            if made_by == process:
                found[-1].append(record)
                if seals:
                    found.append([])
        return [window for window in found if window]


@st.composite
def histories(
    draw: st.DrawFn,
    *,
    processes: int = 3,
    ensure_first: bool = False,
    name: st.SearchStrategy[str] | None = None,
    cost: st.SearchStrategy[Any] | None = None,
) -> History:
    """Histories of 1 to 4 threads in 1 to *processes* processes; time goes on, or stands still."""
    name = names() if name is None else name
    cost = costs() if cost is None else cost
    threads = draw(st.lists(name, min_size=1, max_size=4, unique=True))
    agents = draw(st.lists(name, min_size=1, max_size=4, unique=True))
    made_by = st.integers(0, draw(st.integers(0, processes - 1)))
    now, started = NOW, set[str]()
    records: list[Record] = []
    for _ in range(draw(st.integers(1, 14))):
        now += draw(st.sampled_from([0, 1, 999, 1_000, 7_000, 10**6, 10**9]))
        thread_id = draw(st.sampled_from(threads))
        kind = draw(st.sampled_from(["turn", "turn", "ensure", "resolve"]))
        if kind == "ensure" or (ensure_first and thread_id not in started):
            started.add(thread_id)
            records.append(ensure(thread_id, now))
        elif kind == "turn":
            agent = draw(st.one_of(st.none(), st.sampled_from(agents)))
            records.append((thread_id, agent, draw(tokens()), draw(cost), now))
        else:
            records.append(resolve(thread_id, draw(st.sampled_from(agents)), now))
    size = len(records)
    return History(
        tuple(records),
        tuple(draw(st.lists(made_by, min_size=size, max_size=size))),
        tuple(draw(st.lists(st.sampled_from([False, False, True]), min_size=size, max_size=size))),
        tuple(draw(st.lists(made_by, max_size=12))),
        draw(st.sampled_from([1, 2, 100])),
    )


@dataclass
class Process:
    """One producer: its calls go through a real backlog to a sink, window by window, batch by batch.

    Attributes:
        windows: calls not yet made, a list a window.
        made: the calls made so far.
        sent: the batches that were applied, in order.
    """

    windows: list[list[Record]]
    create_missing: bool = True
    batch_size: int = 100
    backlog: Backlog = field(init=False)
    made: list[Record] = field(default_factory=list)
    sent: list[Batch] = field(default_factory=list)
    outcomes: list[Applied] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.producer = uuid4()
        self.opened: Opened | None = None
        self.backlog = Backlog(
            max_queue_size=10**6,
            max_pending=10**6,
            max_batch_size=self.batch_size,
            create_missing=self.create_missing,
        )

    @property
    def is_done(self) -> bool:
        """Whether everything was made and sent."""
        return not self.windows and self.backlog.is_empty

    def make_window(self) -> None:
        """Make the calls of the next window and seal it."""
        for record in self.windows.pop(0):
            self.made.append(record)
            self.backlog.queue.put(record)
        while self.backlog.drain(2):
            pass
        self.backlog.seal()

    def next_batch(self) -> Batch | None:
        """Return the next batch, making the next window's calls if need be; it goes to `settle`."""
        if self.backlog.head() is None and self.windows:
            self.make_window()
        deltas = self.backlog.head()
        if deltas is None:
            return None
        return Batch(self.producer, 0, 1, len(self.sent) + 1, deltas, self.create_missing)

    def settle(self, batch: Batch, applied: Applied) -> None:
        """The sinks have *batch*."""
        self.sent.append(batch)
        self.outcomes.append(applied)
        self.backlog.settle(batch.deltas, applied)

    async def send(self, sinks: Iterable[Sink]) -> bool:
        """Apply the next batch to every sink; return whether there was one. The outcomes must be alike."""
        if self.opened is None:
            for sink in sinks:
                self.opened = await sink.open(self.producer, 0)
                assert (self.opened.epoch, self.opened.applied_sequence) == (1, 0)
        batch = self.next_batch()
        if batch is None:
            return False
        outcomes = [await sink.apply(batch) for sink in sinks]
        assert all(each == outcomes[0] for each in outcomes), outcomes
        self.settle(batch, outcomes[0])
        return True


def processes_of(history: History, *, create_missing: bool = True) -> list[Process]:
    """Return the processes of *history*, nothing made yet."""
    return [Process(history.windows(number), create_missing, history.batch_size) for number in range(history.processes)]


async def play(history: History, sinks: Sequence[Sink], *, create_missing: bool = True) -> list[Process]:
    """Send everything of *history* to every sink, in the order that it says; return the processes."""
    processes = processes_of(history, create_missing=create_missing)
    for pick in history.picks:
        await processes[pick % len(processes)].send(sinks)
    for process in processes:
        while await process.send(sinks):
            pass
    return processes
