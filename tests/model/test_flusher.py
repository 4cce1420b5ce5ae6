"""The flusher alone, by hand: which fault waits how long, what is told and logged, what ends it, what passes through."""

from __future__ import annotations

import asyncio
import logging
from random import Random
from typing import TYPE_CHECKING, Any, Final, Literal
from uuid import UUID, uuid4

import pytest

from tests.model.manual_clock import Driven, ManualClock, run
from tests.model.scripted_sink import DONE, FAULTS, Fault, Outcome, ScriptedSink, identity
from tracker_daemon.backlog import Backlog
from tracker_daemon.errors import Fenced, SchemaError
from tracker_daemon.flush_numbers import FlushNumbers
from tracker_daemon.flusher import Flusher
from tracker_daemon.sink import Applied, LedgerMissing, LedgerRegressed, Opened, SinkFault

if TYPE_CHECKING:
    from collections.abc import Callable

    from tracker_daemon.batch import Batch

DAY: Final = 86_400.0
AT: Final = 1_700_000_000 * 10**9
PASSING: Final = [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]
STANDING: Final = [1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0, 15.0, 15.0, 15.0]
CEILINGS: Final[dict[Fault, list[float]]] = {
    "connection": PASSING,
    "timeout": PASSING,
    "lock": PASSING,
    "capacity": PASSING,
    "readonly": PASSING,
    "auth": STANDING,
    "schema": STANDING,
    "data": STANDING,
    # What nobody knows is tried a few times at once, then held.
    "other": PASSING[:3] + STANDING[3:],
    "SchemaError": STANDING,
    "RuntimeError": PASSING[:3] + STANDING[3:],
}
KINDS: Final = {"SchemaError": "schema", "RuntimeError": "other"}
FAIL: Final = Outcome("fails")


class Extreme(Random):
    """Always the highest, or the lowest, of what it may return."""

    def __init__(self, *, high: bool) -> None:
        super().__init__(0)
        self._high = high

    def uniform(self, a: float, b: float) -> float:
        """See `Random.uniform`."""
        return b if self._high else a


class World:
    """A flusher with all that it joins.

    Attributes:
        told: what `on_error` was told.
    """

    def __init__(
        self,
        sink: ScriptedSink | None = None,
        on_error: Callable[[BaseException], object] | None = None,
        batch_size: int = 2,
    ) -> None:
        self.clock = sink._clock if sink is not None else ManualClock()
        self.sink = sink or ScriptedSink(self.clock)
        self.backlog = Backlog(max_queue_size=1_000, max_pending=1_000, max_batch_size=batch_size, create_missing=True)
        self.numbers, self.producer = FlushNumbers(), self.backlog.producer
        self.told: list[BaseException] = []
        self.flusher = self.another(self.told.append if on_error is None else on_error)

    def another(self, on_error: Callable[[BaseException], object] | None) -> Flusher:
        """Return a second flusher that has all in common with the first."""
        return Flusher(self.backlog, self.sink, self.clock, self.numbers, on_error)

    def put(self, *threads: str) -> None:
        """Make one call on each of *threads*, and seal."""
        for thread_id in threads or ("t",):
            self.backlog.queue.put((thread_id, "a", 1, 0, AT))
        self.backlog.drain(1_000)
        if not self.backlog.in_flight:
            self.backlog.seal()

    def flush(self, *outcomes: Outcome) -> None:
        """Flush to the end; the first attempts end as *outcomes*, the others succeed."""
        self.sink.script.extend(outcomes)
        run(self.flusher.flush())

    def begin(self, *outcomes: Outcome) -> Driven:
        """Begin a flush that stands at its first `open` or `apply`."""
        self.sink.script.extend(outcomes)
        return Driven(self.flusher.flush())

    def tokens(self, thread_id: str = "t") -> int:
        """Return the sum in the row of a thread."""
        row = self.sink.rows.get(thread_id)
        return row.total_tokens if row else 0

    @property
    def identities(self) -> list[tuple[UUID, int, int, int]]:
        """What was sent, by name."""
        return [identity(batch) for batch in self.sink.received]


@pytest.fixture
def world() -> World:
    """A world whose waits are as long as they may be."""
    found = World()
    found.flusher._random = Extreme(high=True)
    return found


def events(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Return the fields of every event logged, with its level."""
    return [{"level": record.levelname, **record.tracker} for record in caplog.records if hasattr(record, "tracker")]


# -- how long ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("at", ["open", "apply"])
def test_longest_waits(world: World, fault: Fault, at: str) -> None:
    """Each kind of fault has its plan, whether `open` or `apply` meets it; the batch goes through in the end, once."""
    world.put()
    world.flush(*([DONE] if at == "apply" else []), *[Outcome("fails", fault)] * 10)
    assert world.clock.waits == CEILINGS[fault]
    kind = KINDS.get(fault, fault)
    assert world.numbers.errors == {kind: 10}
    assert world.numbers.flushes == {"retry" if CEILINGS[fault] is PASSING else "error": 10, "ok": 1}
    assert world.tokens() == 1
    assert world.identities == [(world.producer, 0, 1, 1)] * (11 if at == "apply" else 1)


@pytest.mark.parametrize("fault", FAULTS)
def test_shortest_waits(world: World, fault: Fault) -> None:
    """Full jitter goes down to nothing; what somebody has to mend is never hammered."""
    world.flusher._random = Extreme(high=False)
    world.put()
    world.flush(DONE, *[Outcome("fails", fault)] * 10)
    assert world.clock.waits == [
        0.0 if ceiling in PASSING[:7] or ceiling == 5.0 else 0.5 for ceiling in CEILINGS[fault]
    ]


def test_the_plan_is_of_the_last_fault(world: World) -> None:
    """The kind is that of the last fault, the number of tries that of all of them."""
    world.put()
    faults: list[Fault] = ["connection", "schema", "other", "other", "lock"]
    world.flush(DONE, *(Outcome("fails", fault) for fault in faults))
    assert world.clock.waits == [PASSING[0], STANDING[1], PASSING[2], STANDING[3], PASSING[4]]


def test_each_batch_begins_with_short_waits(world: World) -> None:
    """A batch that goes through ends the count of failures."""
    world.put("a", "b", "c")
    world.flush(DONE, *[FAIL] * 3, DONE, FAIL)
    assert world.clock.waits == [*PASSING[:3], PASSING[0]]
    assert world.numbers.flushes == {"retry": 4, "ok": 2}


def test_no_two_wait_alike() -> None:
    """A thousand hosts do not come back as one."""
    found = set[tuple[float | None, ...]]()
    for _ in range(20):
        world = World()
        world.put()
        world.flush(DONE, *[FAIL] * 5)
        found.add(tuple(world.clock.waits))
    assert len(found) == 20


def test_a_thousand_failures(world: World) -> None:
    """However often it fails, the wait stays bounded and the batch the same."""
    world.put()
    world.flush(DONE, *[Outcome("unanswered")] * 1_000)
    assert max(world.clock.waits) == 5.0  # type: ignore[type-var]
    assert len(set(world.identities)) == 1
    assert world.tokens() == 1


# -- hurry ------------------------------------------------------------------------------------------


def test_hurry_cuts_a_wait(world: World) -> None:
    """While it waits, a hurry brings the next try at once; the wait after that is a whole one."""
    world.put()
    flushing = world.begin(DONE, *[Outcome("fails", "schema")] * 3)
    while flushing.at != "wait":
        flushing.resume()
    world.flusher.hurry()
    flushing.resume()
    assert (flushing.at, world.clock.monotonic()) == ("apply", 0.0)
    flushing.resume()
    flushing.resume()
    assert (flushing.at, world.clock.monotonic()) == ("apply", STANDING[1])


def test_hurry_while_a_try_is_under_way(world: World) -> None:
    """The wait that would follow is cut, and only that one."""
    world.put()
    flushing = world.begin(DONE, *[Outcome("fails", "schema")] * 3)
    world.flusher.hurry()
    while flushing.at is not None:
        flushing.resume()
    assert world.clock.monotonic() == sum(STANDING[1:3])
    assert world.tokens() == 1


def test_hurry_is_spent_by_success(world: World) -> None:
    """Nobody waits any more once a batch has gone through: the next failure waits in full."""
    world.put()
    flushing = world.begin()
    world.flusher.hurry()
    while flushing.at is not None:
        flushing.resume()
    world.put()
    world.flush(FAIL)
    assert world.clock.waits == PASSING[:1]


def test_hurry_with_nothing_under_way(world: World) -> None:
    """It is no error to hurry before the first flush."""
    world.flusher.hurry()
    world.put()
    world.flush()
    assert world.tokens() == 1


# -- what is told -----------------------------------------------------------------------------------


def test_on_error_is_told_everything(world: World) -> None:
    """Every error of the sink, of every kind, once, in order; the last one is kept until a batch goes through."""
    world.put()
    flushing = world.begin(DONE, *(Outcome("fails", fault) for fault in FAULTS))
    while flushing.at is not None:
        flushing.resume()
        if flushing.at == "wait":
            assert world.flusher.last_error is world.told[-1]
    assert [type(error) for error in world.told] == [SinkFault] * 9 + [SchemaError, RuntimeError]
    assert [error.kind for error in world.told[:9] if isinstance(error, SinkFault)] == list(FAULTS[:9])
    assert world.flusher.last_error is None


@pytest.mark.parametrize("raised", [LookupError, SystemExit, KeyboardInterrupt, asyncio.CancelledError])
def test_on_error_that_fails(caplog: pytest.LogCaptureFixture, raised: type[BaseException]) -> None:
    """The host's handler fails, or would end the process: that is logged, and the flush goes on."""
    calls = []

    def on_error(error: BaseException) -> None:
        calls.append(error)
        raise raised("the host's own bug")

    world = World(on_error=on_error)
    world.put()
    with caplog.at_level(logging.DEBUG, "tracker_daemon"):
        world.flush(FAIL, DONE, FAIL, Outcome("fails", "schema"))
    assert world.tokens() == 1
    assert len(calls) == 3
    failed = [record for record in caplog.records if record.tracker["event"] == "on_error_failed"]  # type: ignore[attr-defined]
    assert len(failed) == 3
    assert all(record.exc_info and record.exc_info[0] is raised for record in failed)


def test_without_on_error(world: World) -> None:
    """Nobody has to listen."""
    world.flusher = world.another(None)
    world.put()
    world.flush(DONE, FAIL)
    assert world.tokens() == 1


def test_repeated_errors_are_logged_at_most_every_30_s(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """One line in 30 s for each kind, with the number of those held back since; then that it works again."""
    world.put("a", "b")
    with caplog.at_level(logging.DEBUG, "tracker_daemon"):
        world.flush(DONE, *[FAIL] * 21, Outcome("fails", "schema"))
    lines = [event for event in events(caplog) if event["event"] == "flush_failed"]
    # After 0.05 + 0.1 + … + 3.2 = 6.35 s it waits 5 s each time: try 13 comes after 31.35 s.
    assert [(line["level"], line["kind"], line["tries"], line.get("suppressed")) for line in lines] == [
        ("WARNING", "connection", 1, None),
        ("WARNING", "connection", 13, 11),
        ("WARNING", "connection", 19, 5),
        ("ERROR", "schema", 22, None),
    ]
    assert all(line["pending_calls"] == 2 and line["producer"] == str(world.producer) for line in lines)
    assert lines[0]["error"] == "a fault of kind connection"
    recovered = events(caplog)[-1]
    assert (recovered["level"], recovered["event"], recovered["tries"]) == ("INFO", "flush_recovered", 22)
    assert world.numbers.errors == {"connection": 21, "schema": 1}


def test_quiet_when_all_is_well(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """A flush that goes through logs nothing."""
    with caplog.at_level(logging.DEBUG, "tracker_daemon"):
        for _ in range(3):
            world.put("a", "b", "c")
            world.flush()
    assert events(caplog) == []


def test_duplicates_and_dead_letters_are_logged(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Each dead letter is an error with its reason, also when the commit was found by the next try; each counts once."""
    world.put("a", "b")
    with caplog.at_level(logging.DEBUG, "tracker_daemon"):
        world.flush(DONE, Outcome("unanswered", dead=2))
    found = {event["event"]: event for event in events(caplog)}
    assert found["batch_was_applied_already"]["deltas"] == 2
    letter = found["dead_letter"]
    assert (letter["level"], letter["thread_id"], letter["calls"]) == ("ERROR", "b", 1)
    assert (letter["reason"], letter["sqlstate"], letter["error"]) == ("overflow", "22003", "bigint out of range")
    books = world.backlog.books()
    assert (books.applied, books.dead_lettered) == (
        {"ensure_conversation": 0, "record_turn": 1, "resolve": 0},
        {"overflow": 1},
    )


def test_many_dead_letters(caplog: pytest.LogCaptureFixture) -> None:
    """The first ten of a batch are logged one by one, and how many there are; all are counted."""
    world = World(batch_size=40)
    world.put(*(f"t{number}" for number in range(40)))
    with caplog.at_level(logging.INFO, "tracker_daemon"):
        world.flush(DONE, Outcome(dead=2**40 - 1))
    assert [event["event"] for event in events(caplog)] == ["dead_letters", *["dead_letter"] * 10]
    assert events(caplog)[0]["letters"] == 40
    assert world.backlog.books().dead_lettered == {"overflow": 40}


class Refusing(logging.Filter):
    """A host's filter with a bug."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Fail."""
        raise ValueError(record.levelname)


def test_logging_that_fails(world: World) -> None:
    """What the host's logging raises neither stops the flush nor doubles a batch."""
    logger, refusing = logging.getLogger("tracker_daemon"), Refusing()
    level = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addFilter(refusing)
    try:
        world.put("a", "b")
        world.flush(DONE, FAIL, Outcome("unanswered", dead=1))
        world.sink.fail_over(1, opens=False)
        world.put("a", "b")
        world.flush()
        world.sink.remove_row(world.producer)
        world.put("a")
        world.flush()
    finally:
        logger.removeFilter(refusing)
        logger.setLevel(level)
    assert (world.tokens("a"), world.tokens("b")) == (1, 1)  # the first batch was forgotten, the last one refused
    assert isinstance(world.flusher.halted, LedgerMissing)


# -- what ends it -----------------------------------------------------------------------------------


def halted_by_a_rival(world: World) -> None:
    """Another life opens the same identity."""
    world.put()
    world.flush()
    run(world.sink.open(world.producer, 0))


def halted_by_a_missing_row(world: World) -> None:
    """Somebody truncates the ledger."""
    world.put()
    world.flush()
    world.sink.remove_row(world.producer)


def halted_at_open(world: World) -> None:
    """The ledger forgets, and before it is opened again somebody truncates it."""
    world.put()
    world.flush()
    world.sink.fail_over(1, opens=False)
    world.put()
    flushing = world.begin(FAIL)
    flushing.resume()
    flushing.resume()
    assert isinstance(world.told.pop(0), SinkFault)
    flushing.resume()
    assert isinstance(world.told.pop(), LedgerRegressed)
    assert flushing.at == "open"
    world.sink.remove_row(world.producer)
    flushing.resume()


@pytest.mark.parametrize("end", [halted_by_a_rival, halted_by_a_missing_row, halted_at_open])
def test_halted(world: World, caplog: pytest.LogCaptureFixture, end: Callable[[World], None]) -> None:
    """`Fenced` and `LedgerMissing` are final: told, logged as critical, and nothing is ever sent again."""
    with caplog.at_level(logging.INFO, "tracker_daemon"):
        end(world)
        if not world.backlog.in_flight:
            world.put()
        tries = len(world.clock.waits)
        world.flush()
    expected = Fenced if end is halted_by_a_rival else LedgerMissing
    assert isinstance(world.flusher.halted, expected)
    assert world.flusher.last_error is world.flusher.halted is world.told[-1]
    assert events(caplog)[-1]["level"] == "CRITICAL"
    assert events(caplog)[-1]["event"] == "flush_halted"
    assert (world.numbers.fenced, world.numbers.errors["other"]) == (True, 1)
    assert len(world.clock.waits) == tries
    asked = len(world.sink.received), len(world.sink.opened)
    world.put("u")
    world.flusher.hurry()
    for _ in range(3):
        world.flush()
    assert (len(world.sink.received), len(world.sink.opened)) == asked
    assert world.backlog.books().queue_calls == 2
    run(world.flusher.aclose(clean=True))
    assert world.sink.closed == [(world.producer, False)]


# -- regressions ------------------------------------------------------------------------------------


def test_regression(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """The database forgot commits: told and counted, opened again, and the batch in hand goes through at once."""
    for thread_id in ("a", "b", "c"):
        world.put(thread_id)
        world.flush()
    world.sink.fail_over(2, opens=False)
    world.put("d")
    with caplog.at_level(logging.INFO, "tracker_daemon"):
        world.flush()
    assert sorted(world.sink.rows) == ["a", "d"]
    # Its sequence stays its own; the ledger moves on over what is forgotten.
    assert world.identities[-2:] == [(world.producer, 0, 1, 4), (world.producer, 0, 3, 4)]
    assert (world.numbers.regressions, world.clock.waits) == (1, [])
    told = [(event["level"], event["event"]) for event in events(caplog)]
    assert told == [("ERROR", "database_forgot_commits"), ("ERROR", "batches_missing")]
    assert [type(error) for error in world.told] == [LedgerRegressed]


def test_regression_within_doubt(world: World) -> None:
    """A commit whose answer was lost and that was then forgotten is sent again as it was: the ledger takes it."""
    world.put("a")
    world.flush()
    world.put("b")
    flushing = world.begin(Outcome("unanswered"))
    flushing.resume()
    assert world.tokens("b") == 1
    world.sink.fail_over(1, opens=False)
    while flushing.at is not None:
        flushing.resume()
    assert world.identities[-2:] == [(world.producer, 0, 1, 2)] * 2
    assert (world.tokens("b"), world.numbers.regressions) == (1, 0)


class AlwaysRegressed(ScriptedSink):
    """A ledger whose row cannot be moved, so often."""

    left = 6

    async def apply(self, batch: Batch) -> Applied:
        """See `Sink.apply`."""
        self.left -= 1
        if self.left >= 0:
            self.received.append(batch)
            raise LedgerRegressed(str(batch.producer), batch.lane, batch.sequence - 1, batch.sequence - 2)
        return await super().apply(batch)


def test_regressions_in_a_row() -> None:
    """The second one in a row waits like a failure: a ledger that cannot be moved is not hammered."""
    world = World(AlwaysRegressed(ManualClock()))
    world.flusher._random = Extreme(high=True)
    world.put()
    world.flush()
    assert len(world.clock.waits) == 5
    assert world.clock.waits == sorted(world.clock.waits)  # type: ignore[type-var]
    assert (world.tokens(), world.numbers.regressions) == (1, 6)


@pytest.mark.parametrize("forgotten", [0, 1, 2, None])
def test_what_the_ledger_says_at_the_end(world: World, caplog: pytest.LogCaptureFixture, forgotten: int | None) -> None:
    """A clean close finds what was forgotten since the last flush: told, logged and counted, and it ends all the same."""
    for _ in range(3):
        world.put()
        world.flush()
    if forgotten is None:
        world.sink.remove_row(world.producer)
    elif forgotten:
        world.sink.fail_over(forgotten, opens=False)
    with caplog.at_level(logging.INFO, "tracker_daemon"):
        run(world.flusher.aclose(clean=True))
    expected = {0: [], 1: [LedgerRegressed], 2: [LedgerRegressed], None: [LedgerMissing]}[forgotten]
    assert [type(error) for error in world.told] == expected
    assert [event["event"] for event in events(caplog)] == ["ledger_at_close"] * len(expected)
    assert world.numbers.regressions == (expected == [LedgerRegressed])
    assert world.sink.closed == [(world.producer, True)]


# -- what passes through ----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [asyncio.CancelledError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("at", ["open", "apply", "wait"])
@pytest.mark.parametrize("committed", [False, True])
def test_what_is_no_error(world: World, error: type[BaseException], at: str, *, committed: bool) -> None:
    """A cancellation passes through and leaves the batch in place; the next flush sends it under the same identity."""
    world.put()
    flushing = world.begin(DONE, Outcome("unanswered" if committed else "fails"))
    while flushing.at != at:
        flushing.resume()
    with pytest.raises(error):
        flushing.throw(error())
    assert world.backlog.in_flight
    assert world.flusher.halted is None
    sent = len(world.sink.received)
    world.sink.script.clear()
    world.flush()
    assert world.tokens() == 1
    assert len(set(world.identities)) == 1
    assert len(world.identities) == sent + 1


@pytest.mark.parametrize("days", [2, 3_650])
def test_cancelled_in_doubt_and_idle_for_days(world: World, days: int) -> None:
    """A batch in doubt keeps its identity, however long the pause; the one after it takes a new one."""
    world.put("a")
    world.flush()
    world.put("a")
    with pytest.raises(asyncio.CancelledError):
        world.flush(Outcome("cancelled_after"))
    world.clock.advance(days * DAY)
    world.flush()
    assert world.tokens("a") == 2
    assert world.identities[1:] == [(world.producer, 0, 1, 2)] * 2
    world.clock.advance(days * DAY)
    world.put("a")
    world.flush()
    assert world.sink.received[-1].producer != world.producer
    assert world.tokens("a") == 3


class Forgetful(ScriptedSink):
    """A sink that somebody wrote without a `return`, mended after four tries."""

    left = 4

    async def apply(self, batch: Batch) -> Applied:
        """See `Sink.apply`."""
        applied = await super().apply(batch)
        self.left -= 1
        return None if self.left >= 0 else applied  # type: ignore[return-value]


def test_an_answer_that_is_none() -> None:
    """What is no `Applied` is a fault of the sink, not an answer: the batch stays in doubt under its identity."""
    world = World(Forgetful(ManualClock()))
    world.put()
    world.flush()
    assert world.tokens() == 1
    assert world.identities == [(world.producer, 0, 1, 1)] * 5
    assert [type(error) for error in world.told] == [TypeError] * 4
    assert "Forgetful.apply" in str(world.told[0])
    assert world.numbers.flushes == {"error": 4, "duplicate": 1}


# -- identity ---------------------------------------------------------------------------------------


def test_sequences(world: World) -> None:
    """One `open` a life; every batch is the next one, however many flushes they fall into."""
    world.put("a", "b", "c", "d", "e")
    world.flush()
    for number in range(4):
        world.put(f"u{number}")
        world.flush()
    assert world.identities == [(world.producer, 0, 1, number) for number in range(1, 8)]
    assert world.sink.opened == [world.producer]


def test_flush_of_nothing(world: World) -> None:
    """With nothing sealed the sink is left alone."""
    world.flush()
    assert world.sink.opened == []


@pytest.mark.parametrize(("seconds", "renewed"), [(DAY - 1, False), (DAY, False), (DAY + 1, True), (31 * DAY, True)])
def test_a_day_without_a_flush(
    world: World, caplog: pytest.LogCaptureFixture, seconds: float, *, renewed: bool
) -> None:
    """After a day the ledger's row may go: a new identity is taken, under which is logged and closed from then on."""
    world.put("a")
    world.flush()
    world.clock.advance(seconds)
    run(world.sink.open(uuid4(), 0))  # somebody else, who collects what is a month old
    world.put("a")
    with caplog.at_level(logging.INFO, "tracker_daemon"):
        world.flush(FAIL)
    assert world.tokens("a") == 2
    producer = world.sink.received[-1].producer
    assert (producer != world.producer) == renewed
    assert {event["producer"] for event in events(caplog)} == {str(producer)}
    run(world.flusher.aclose(clean=True))
    assert world.sink.closed == [(producer, True)]


def test_a_wall_clock_set_back(world: World) -> None:
    """An hour back is no reason for anything."""
    world.put("a")
    world.flush()
    world.clock.set_wall(-3_600)
    world.put("a")
    world.flush()
    assert world.identities == [(world.producer, 0, 1, 1), (world.producer, 0, 1, 2)]


def test_an_open_whose_answer_is_lost(world: World) -> None:
    """It is opened again; the first one, should it arrive later, fences nobody."""
    world.put("a", "b", "c")
    world.flush(Outcome("late"), Outcome("unanswered"), DONE, Outcome(first=True))
    assert world.flusher.halted is None
    assert [world.tokens(thread_id) for thread_id in "abc"] == [1, 1, 1]
    assert [batch.sequence for batch in world.sink.received] == [1, 2]


def test_given_up_while_the_answer_is_on_its_way(world: World) -> None:
    """What a deadline gave up is lost by the books and nothing else, though its answer comes afterwards."""
    world.put("a", "b", "c")
    flushing = world.begin()
    flushing.resume()
    assert flushing.at == "apply"
    assert world.backlog.abandon("deadline") == 3
    flushing.resume()
    assert flushing.at is None
    books = world.backlog.books()
    assert (sum(books.applied.values()), books.lost, books.queue_calls) == (0, {"deadline": 3}, 0)
    assert world.sink.rows.keys() == {"a", "b"}


@pytest.mark.parametrize("in_effect", [False, True])
def test_given_up_in_doubt(world: World, caplog: pytest.LogCaptureFixture, *, in_effect: bool) -> None:
    """What is sealed after a batch in doubt was given up does not take its place; whether it is there is asked."""
    world.put("a")
    with pytest.raises(asyncio.CancelledError):
        world.flush(DONE, Outcome("cancelled_after" if in_effect else "cancelled"))
    world.backlog.abandon("deadline")
    world.put("b")
    with caplog.at_level(logging.INFO, "tracker_daemon"):
        world.flush()
    assert (world.tokens("a"), world.tokens("b")) == (in_effect, 1)
    assert world.numbers.flushes == {"ok": 1}
    assert [batch.sequence for batch in world.sink.received] == [1, 2]
    expected = [] if in_effect else [(1, 1, 1, False)]
    names = ("first", "last", "batches", "forgotten")
    assert [tuple(event[name] for name in names) for event in events(caplog)] == expected
    assert [after for *_, after in world.sink.asked] == ([0, 0] if in_effect else [0, 0, 1])


@pytest.mark.parametrize("how", ["fails", "unanswered", "late"])
def test_what_is_missing_is_told_once(
    world: World, caplog: pytest.LogCaptureFixture, how: Literal["fails", "unanswered", "late"]
) -> None:
    """However often moving the ledger on fails: one line says what it lacks."""
    for thread_id in ("a", "b", "c"):
        world.put(thread_id)
        world.flush()
    world.sink.fail_over(2, opens=False)
    world.put("d")
    with caplog.at_level(logging.INFO, "tracker_daemon"):
        world.flush(DONE, DONE, *[Outcome(how), DONE] * 5)
    missing = [event for event in events(caplog) if event["event"] == "batches_missing"]
    assert [(event["first"], event["last"], event["batches"], event["forgotten"]) for event in missing] == [
        (2, 3, 2, True)
    ]
    assert sorted(world.sink.rows) == ["a", "d"]
    world.sink.arrive()
    assert sorted(world.sink.rows) == ["a", "d"]


def test_an_empty_window(world: World) -> None:
    """It is not sealed: a flush of it would never end."""
    world.backlog.seal()
    assert not world.backlog.in_flight
    world.flush()
    assert world.sink.opened == []


# -- numbers ----------------------------------------------------------------------------------------


def test_numbers(world: World) -> None:
    """Rows, seconds and lag are observed once a batch, with the time of its last try."""
    world.put("a", "b", "c")
    flushing = world.begin(DONE, FAIL)
    while flushing.at is not None:
        world.clock.advance(0.25)
        flushing.resume()
    numbers = world.numbers
    assert list(numbers.flush_rows.recent) == [2, 1]
    assert list(numbers.flush_seconds.recent) == [0.25, 0.25]
    assert list(numbers.commit_lag_seconds.recent) == pytest.approx([1.05, 1.3])
    assert numbers.last_success == world.clock.wall()
    assert not numbers.fenced


def test_abort(world: World) -> None:
    """`abort` is the sink's."""
    world.flusher.abort()
    assert world.sink.aborts == 1


def test_found_applied(world: World) -> None:
    """A batch that the ledger has when it is opened is not sent: an earlier process had committed it."""
    world.sink.ledger[world.producer, 0] = Opened(7, 1)
    world.put("a", "b", "c")
    world.flush()
    assert world.identities == [(world.producer, 0, 8, 2)]
    assert world.numbers.flushes == {"duplicate": 1, "ok": 1}
