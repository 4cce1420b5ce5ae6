"""The relay and the handlers when something inside them fails."""

from __future__ import annotations

import hmac
import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import anyio
import httpx
import pytest

from tests.strategies import NOW
from tracker_daemon.batch import Batch
from tracker_daemon.clock import SystemClock
from tracker_daemon.collector import collector_of
from tracker_daemon.daemon import bearer
from tracker_daemon.daemon.admission import Admission
from tracker_daemon.daemon.app import make_app
from tracker_daemon.daemon.bearer import Token
from tracker_daemon.daemon.options import Listen, Options
from tracker_daemon.daemon.relay import Full, Relay
from tracker_daemon.delta import ThreadDelta
from tracker_daemon.errors import Fenced, JournalError, TrackerError
from tracker_daemon.generation import KINDS
from tracker_daemon.sink import Applied, DeadLetter, SinkFault

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prometheus_client import CollectorRegistry

    from tracker_daemon.clock import Clock

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """The daemon's own."""
    return "asyncio"


class FakeSink:
    """Answers as told: an exception is raised, `None` waits for `gone`, else everything is applied."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.seen: list[list[Batch]] = []
        self.entered, self.gone = anyio.Event(), anyio.Event()

    async def apply_many(self, batches: Sequence[Batch]) -> list[Any]:
        """See `ManySink.apply_many`."""
        self.seen.append(list(batches))
        answer = self.answers.pop(0) if self.answers else Applied(rows=1)
        self.entered.set()
        if answer is None:
            await self.gone.wait()
            answer = Applied(rows=1)
        if isinstance(answer, SinkFault | RuntimeError):
            raise answer
        return [answer] * len(batches)

    async def disconnect(self) -> None:
        """See `ManySink.disconnect`."""

    def abort(self) -> None:
        """See `Sink.abort`."""


class SetClock(SystemClock):
    """The system's, whose wall clock is set ahead by hand."""

    ahead = 0.0

    def wall(self) -> float:
        """See `Clock.wall`."""
        return super().wall() + self.ahead


NUMBERS = [
    *(f"tracker_calls_{name}_total" for name in ("accepted", "applied", "dead_lettered", "lost")),
    "tracker_queue_calls",
    "tracker_queue_depth",
    "tracker_oldest_pending_timestamp_seconds",
]


def total(registry: CollectorRegistry, name: str) -> float:
    """Return the sum of a metric's samples."""
    return sum(sample.value for family in registry.collect() for sample in family.samples if sample.name == name)


def relay_of(sink: FakeSink, clock: Clock | None = None) -> Relay:
    """Return a relay before *sink*."""
    return Relay(sink, clock or SystemClock(), window=0, max_batch_size=100, max_waiting=100)  # type: ignore[arg-type]


def batch(sequence: int = 1, producer: UUID | None = None) -> Batch:
    """Return a batch of one turn."""
    delta = ThreadDelta("t", NOW // 1_000)
    delta.turn("a", 1, 0, NOW // 1_000)
    return Batch(producer or uuid4(), 0, 1, sequence, (delta,))


async def test_cancelled_in_a_flush() -> None:
    """Who waits for a flush that is cancelled is told to come again; nothing stays in the queue."""
    sink, heard = FakeSink(None), list[BaseException]()
    relay = relay_of(sink)

    async def ask() -> None:
        try:
            await relay.apply(batch(), "c")
        except SinkFault as fault:
            heard.append(fault)

    with anyio.fail_after(10):
        async with anyio.create_task_group() as outer, anyio.create_task_group() as tasks:
            tasks.start_soon(relay.run)
            outer.start_soon(ask)
            await sink.entered.wait()
            tasks.cancel_scope.cancel()
        await relay.drain()
    [fault] = heard
    assert "shutting down" in str(fault)


async def test_what_nobody_foresaw() -> None:
    """An error of no known kind is the answer to its senders, in words that tell nothing; the next batch goes through."""
    sink = FakeSink(RuntimeError("secret"))
    relay = relay_of(sink)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(relay.run)
            with pytest.raises(SinkFault) as found:
                await relay.apply(batch(), "c")
            assert found.value.kind == "other"
            assert "secret" not in str(found.value)
            assert await relay.apply(batch(), "c") == Applied(rows=1)
            tasks.cancel_scope.cancel()


async def test_found_done() -> None:
    """A batch that failed and is found done counts then; one that was counted, or was another daemon's, does not."""
    done = Applied(rows=0, duplicate=True)
    producer = uuid4()
    relay = relay_of(FakeSink(SinkFault("connection", "cut"), done, done, done))
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(relay.run)
            with pytest.raises(SinkFault):
                await relay.apply(batch(3, producer), "c")
            for _ in range(2):
                assert await relay.apply(batch(3, producer), "c") == done
            assert await relay.apply(batch(7), "c") == done
            tasks.cancel_scope.cancel()
    books = relay.collected().books
    assert sum(books.accepted.values()) == sum(books.applied.values()) == 1
    assert relay.numbers.flushes["duplicate"] == 3
    assert relay.batches == 1


async def test_what_waits_is_shown(registry: CollectorRegistry) -> None:
    """While the database fails, a batch is in the queue's numbers from its first arrival until it is applied.

    Through every failed try the books add up, no counter goes back, and the oldest call's instant stays.
    """
    producer, gate = uuid4(), FakeSink(SinkFault("connection", "cut"), SinkFault("connection", "cut"), None)
    relay = relay_of(gate)
    collector = collector_of(registry)
    collector.add(relay)
    seen: list[float] = []

    def look() -> tuple[float, float, float]:
        accepted, applied, dead, lost, calls, depth, oldest = (total(registry, name) for name in NUMBERS)
        assert accepted == applied + dead + lost + calls
        assert not seen or accepted >= seen[-1]
        seen.append(accepted)
        return calls, depth, oldest

    assert look() == (0, 0, 0)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(relay.run)
            with pytest.raises(SinkFault):
                await relay.apply(batch(1, producer), "c")
            calls, depth, since = look()
            assert (calls, depth) == (1, 1)
            assert since > 0
            with pytest.raises(SinkFault):
                await relay.apply(batch(1, producer), "c")
            assert look() == (1, 1, since)
            gate.entered = anyio.Event()
            async with anyio.create_task_group() as asking:
                asking.start_soon(relay.apply, batch(1, producer), "c")
                await gate.entered.wait()
                assert look() == (1, 1, since)
                gate.gone.set()
            assert look() == (0, 0, 0)
            tasks.cancel_scope.cancel()
    assert seen[-1] == 1


async def test_a_sender_that_does_not_come_back(registry: CollectorRegistry) -> None:
    """Of a batch whose sender went away nothing is shown as waiting after a minute; its calls make room for others'."""
    clock = SetClock()
    relay = relay_of(FakeSink(SinkFault("connection", "cut")), clock)
    collector_of(registry).add(relay)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(relay.run)
            with pytest.raises(SinkFault):
                await relay.apply(batch(1), "c")
            assert [total(registry, name) for name in NUMBERS[:6]] == [1, 0, 0, 0, 1, 1]
            clock.ahead = 61
            assert [total(registry, name) for name in NUMBERS] == [1, 0, 0, 0, 1, 0, 0]
            await relay.apply(batch(1), "c")
            assert [total(registry, name) for name in NUMBERS] == [1, 1, 0, 0, 0, 0, 0]
            tasks.cancel_scope.cancel()


async def test_failures_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """A database that fails, and a batch that its ledger refuses, are a line in the log and an error on the page."""
    relay, told = relay_of(FakeSink(SinkFault("timeout", "late"), Fenced("p", 0, 1, 2))), list[str]()
    relay.on_error = lambda error: told.append(type(error).__name__)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(relay.run)
            for error in (SinkFault, Fenced):
                with pytest.raises(error):
                    await relay.apply(batch(), "c")
            tasks.cancel_scope.cancel()
    assert told == ["SinkFault", "Fenced"]
    events = [record.__dict__["tracker"] for record in caplog.records]
    assert [(each["event"], each.get("kind")) for each in events] == [
        ("batches_failed", "timeout"),
        ("batch_refused", None),
    ]


async def test_dead_letters_count_by_kind(registry: CollectorRegistry) -> None:
    """A dead letter's calls are accepted under the kinds that they were, and dead under its reason."""
    found = batch()
    found.deltas[0].ensure(NOW // 1_000)
    relay = relay_of(
        FakeSink(Applied(rows=0, dead_letters=(DeadLetter(found.deltas[0], "constraint", "23514", "no"),)))
    )
    collector_of(registry).add(relay)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(relay.run)
            await relay.apply(found, "c")
            tasks.cancel_scope.cancel()
    accepted = {kind: registry.get_sample_value("tracker_calls_accepted_total", {"call": kind}) for kind in KINDS}
    assert accepted == {"ensure_conversation": 1, "record_turn": 1, "resolve": 0}
    assert registry.get_sample_value("tracker_calls_dead_lettered_total", {"reason": "constraint"}) == 2
    assert total(registry, "tracker_queue_calls") == 0


async def test_one_clients_batches_leave_room_for_another(registry: CollectorRegistry) -> None:
    """Who has as much waiting as stays free is told 429, another is served; what is refused is counted."""
    sink = FakeSink(None)
    relay = Relay(sink, SystemClock(), window=0, max_batch_size=1, max_waiting=4)  # type: ignore[arg-type]
    collector_of(registry).add(relay)
    refused: list[int] = []
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(relay.run)
            for client in ("greedy", "greedy", "greedy", "honest", "late", "late"):

                async def ask(client: str = client) -> None:
                    try:
                        await relay.apply(batch(1), client)
                    except Full as full:
                        refused.append(full.status)

                tasks.start_soon(ask)
                await anyio.wait_all_tasks_blocked()
            assert refused == [429, 429]
            assert registry.get_sample_value("tracker_calls_rejected_total", {"reason": "batch"}) == 2
            assert total(registry, "tracker_queue_depth") == 4
            sink.gone.set()
            tasks.cancel_scope.cancel()


async def test_batches_of_one_go_one_a_transaction() -> None:
    """Of one producer one batch goes in a transaction, in its order; another's goes past those that wait."""
    first, second = uuid4(), uuid4()
    sink = FakeSink()
    relay = relay_of(sink)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            async with anyio.create_task_group() as asking:
                for sequence in (1, 2, 3):
                    asking.start_soon(relay.apply, batch(sequence, first), "c")
                asking.start_soon(relay.apply, batch(1, second), "c")
                await anyio.wait_all_tasks_blocked()
                tasks.start_soon(relay.run)
            tasks.cancel_scope.cancel()
    found = [[(each.producer, each.sequence) for each in batches] for batches in sink.seen]
    assert found == [[(first, 1), (second, 1)], [(first, 2)], [(first, 3)]]


@pytest.mark.parametrize("error", [RuntimeError("secret"), JournalError("/secret/file"), TrackerError("secret")])
async def test_a_failed_handler(error: Exception) -> None:
    """What fails inside is a 500 that says so and no more."""

    async def fails(*_: object) -> None:
        raise error

    service = SimpleNamespace(
        options=Options(listen=(Listen(Path("s")),)),
        admission=Admission(1_000_000),
        token=None,
        state="ready",
        refused=SimpleNamespace(count=lambda _: None),
        relay=SimpleNamespace(open=fails),
    )
    transport = httpx.ASGITransport(make_app(service), raise_app_exceptions=False)  # type: ignore[arg-type]
    body = json.dumps({"producer": str(uuid4()), "lane": 0, "known": None, "after": 0})
    async with httpx.AsyncClient(transport=transport, base_url="http://d") as client:
        reply = await client.post("/v1/producers", content=body)
    assert (reply.status_code, reply.json()) == (500, {"error": "the daemon failed; its log says why"})
    assert reply.headers["x-content-type-options"] == "nosniff"


async def test_the_token_is_compared_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every header is compared by `hmac.compare_digest`, once, whatever it holds."""
    (tmp_path / "token").write_text("a-token-of-more-than-16")
    token, compared = Token(tmp_path / "token"), list[bytes]()

    def compare(given: bytes, kept: bytes) -> bool:
        compared.append(given)
        return hmac.compare_digest(given, kept)

    monkeypatch.setattr(bearer, "hmac", SimpleNamespace(compare_digest=compare))
    headers = ["", "Bearer", "Bearer x", "Basic a-token-of-more-than-16", "Bearer a-token-of-more-than-16", "\xff \xff"]
    assert [token.admits(header) for header in headers] == [False, False, False, False, True, False]
    assert len(compared) == len(headers)
