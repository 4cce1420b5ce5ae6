"""The messages of a batch: always the same ones, and together the batch."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.strategies import NOW, costs, names
from tracker_daemon.batch import Batch
from tracker_daemon.delta import ThreadDelta
from tracker_daemon.journal import records
from tracker_daemon.stream import messages
from tracker_daemon.wire import Malformed

PRODUCER = UUID(int=7)


@st.composite
def deltas(draw: st.DrawFn) -> ThreadDelta:
    """A delta of any kind of call, with few or very many agents."""
    delta = ThreadDelta(draw(names()), NOW // 1_000)
    if draw(st.booleans()):
        delta.ensure(NOW // 1_000)
    for _ in range(draw(st.integers(0, 3))):
        delta.turn(draw(st.none() | names()), draw(st.integers(-(2**62), 2**62)), draw(costs()), NOW // 1_000)
    if draw(st.booleans()):
        delta.resolve(draw(names()), NOW // 1_000 + 5)
    if draw(st.sampled_from([False, False, False, True])):
        delta.use(f"agent {number}" for number in range(draw(st.integers(250, 1_100))))
    return delta


def merged(found: list[ThreadDelta]) -> dict[str, ThreadDelta]:
    """Return the sum of each thread."""
    sums: dict[str, ThreadDelta] = {}
    for delta in found:
        before = sums.get(delta.thread_id)
        sums[delta.thread_id] = delta if before is None else before.merge(delta)
    return sums


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(deltas(), max_size=8, unique_by=lambda delta: delta.thread_id),
    st.integers(1, 5),
    st.integers(1, 2**40),
    st.booleans(),
)
def test_messages_are_the_batch(found: list[ThreadDelta], partitions: int, sequence: int, create_missing: bool) -> None:
    """Read back, the messages hold every delta once, each in its thread's partition, under sequences that grow."""
    batch = Batch(PRODUCER, 0, 3, sequence, tuple(found), create_missing)
    made = messages.encode("chat", batch, partitions)
    assert made == messages.encode("chat", batch, partitions)
    back: list[ThreadDelta] = []
    for partition, each in enumerate(made):
        last = 0
        for message in each:
            entry = messages.decode(message.headers, message.body, partition)
            assert entry.create_missing == create_missing
            assert (entry.producer, entry.lane, entry.epoch) == (PRODUCER, partition + 1, 0)
            assert messages.batch_of(entry.sequence) == sequence
            assert entry.sequence > last
            last = entry.sequence
            assert message.subject == f"chat.{partition}.{PRODUCER.hex}"
            assert {messages.partition_of(delta.thread_id, partitions) for delta in entry.deltas} == {partition}
            assert len(message.body) <= messages.MESSAGE_BYTES
            back += entry.deltas
    assert merged(back) == {delta.thread_id: delta for delta in found}


def test_large_batches_are_cut() -> None:
    """A batch of many deltas becomes several messages, each within the bound, in order."""
    found = [ThreadDelta(f"{number:0500}", NOW // 1_000) for number in range(2_000)]
    for delta in found:
        delta.ensure(NOW // 1_000)
    [made] = messages.encode("chat", Batch(PRODUCER, 0, 1, 1, tuple(found)), 1)
    assert len(made) > 3
    assert [int(message.headers["tracker-sequence"]) for message in made] == [65_536 + n for n in range(len(made))]
    threads = [d.thread_id for m in made for d in messages.decode(m.headers, m.body, 0).deltas]
    assert threads == [delta.thread_id for delta in found]


def test_partitions_never_change() -> None:
    """The hash is part of the protocol: these threads are where they were when the first message was published."""
    found = {name: messages.partition_of(name, 16) for name in ("t-1", "t-2", "é", "日本", "", "\U0001f600")}
    assert found == {"t-1": 11, "t-2": 1, "é": 14, "日本": 12, "": 0, "\U0001f600": 4}


def good() -> messages.Message:
    """Return a message of partition 0."""
    delta = ThreadDelta("t", NOW // 1_000)
    delta.ensure(NOW // 1_000)
    return messages.encode("chat", Batch(PRODUCER, 0, 1, 1, (delta,)), 1)[0][0]


@pytest.mark.parametrize(
    ("headers", "body", "partition"),
    [
        ({"tracker-format": ""}, None, 0),
        ({"tracker-format": "0"}, None, 0),
        ({"tracker-format": "01"}, None, 0),
        ({"tracker-format": "²"}, None, 0),
        ({"tracker-producer": "x"}, None, 0),
        ({"tracker-sequence": "0"}, None, 0),
        ({"tracker-epoch": "1"}, None, 0),
        ({}, b"nonsense", 0),
        ({}, None, 1),
    ],
)
def test_what_is_no_message(headers: dict[str, str], body: bytes | None, partition: int) -> None:
    """A message that is none of ours, or of another partition, is told and not taken for one."""
    message = good()
    changed = replace(message, headers={**message.headers, **headers}, body=message.body if body is None else body)
    with pytest.raises(Malformed):
        messages.decode(changed.headers, changed.body, partition)


@pytest.mark.parametrize("what", ["thread", "agent", "resolution", "past", "future"])
def test_what_no_database_can_hold(what: str) -> None:
    """A well-formed message with what neither a row nor a dead letter can hold is told, before it holds its partition."""
    at = {"past": -(2**60), "future": 2**60}.get(what, NOW // 1_000)
    delta = ThreadDelta("a\0b" if what == "thread" else "t", at)
    delta.turn("a\0b" if what == "agent" else "a", 1, 0, at)
    if what == "resolution":
        delta.resolve("a\0b", at)
    [[message]] = messages.encode("chat", Batch(PRODUCER, 0, 1, 1, (delta,)), 1)
    with pytest.raises(Malformed, match="can hold"):
        messages.decode(message.headers, message.body, 0)


@pytest.mark.parametrize(
    ("tokens", "cost"),
    [(b"9" * 4_000, b"0"), (b"0", b"NaN"), (b"0", b"1E+999999"), (b"0", b"1E-999999")],
    ids=["tokens", "no number", "huge", "tiny"],
)
def test_numbers_that_cannot_be_summed(tokens: bytes, cost: bytes) -> None:
    """A well-formed message with a number that no tracker takes is told, before a sum that fails holds its partition."""
    head = records._DELTA.pack(records.DELTA, 0, 1, 0, 0, 1, 0, 0, 1, 0, len(tokens), len(cost), 0)
    with pytest.raises(Malformed, match="can hold"):
        messages.decode(good().headers, records.framed(head + b"t" + tokens + cost), 0)


@pytest.mark.parametrize("words", ["²", "-1", "x", "9" * 5_000])
def test_a_sequence_that_is_none(words: str) -> None:
    """What somebody else published under a producer's subject says nothing of where that stands."""
    assert messages.last_sequence({"Tracker-Sequence": words}) == 0


def test_newer_format() -> None:
    """What a newer version wrote is not guessed at."""
    message = good()
    with pytest.raises(messages.Newer, match="format 2"):
        messages.decode({**message.headers, "tracker-format": "2"}, message.body, 0)
