"""What a message of the stream says: a part of a batch, with an identity of its own.

A batch's deltas are dealt to partitions by a hash of the thread, and each partition's are cut into messages:

    partition of a thread    CRC-32 of its id in UTF-8, modulo the number of partitions
    subject                  NAME.PARTITION.PRODUCER
    Nats-Msg-Id              PRODUCER/LANE/SEQUENCE
    body                     deltas, one after the other, as the journal has them
    Tracker-… headers        the identity, the format, and whether a turn may create its row

Rules:
1. A message is a batch to the ledger: (producer, lane, epoch 0, sequence). Lane is the partition + 1, so that it never
   meets lane 0, which is that of batches that go to the database directly. Sequence is the batch's own times 2**16,
   plus the number of the message in it: it only grows, which is all that epoch 0 asks for.
2. The same batch always makes the same messages. Hash, order, cut and `MESSAGE_BYTES` are part of the protocol: what is
   published again after a restart is told by its sequence alone. To change one means a new `FORMAT`.
3. Pure: values in, bytes out, and back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Final
from zlib import crc32

from tracker_daemon import wire
from tracker_daemon.batch import Batch
from tracker_daemon.calls import COST_DIGITS_AFTER, COST_DIGITS_BEFORE
from tracker_daemon.delta import ThreadDelta
from tracker_daemon.journal.records import encode_sum

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from uuid import UUID

FORMAT: Final = "1"
MESSAGE_BYTES: Final = 256 << 10
"""A message is closed before it grows beyond; below the 1 MB that servers take by default."""
_AGENTS_IN_PART: Final = 256
_MESSAGES: Final = 1 << 16
MOST_PARTITIONS: Final = 256
_EARLIEST: Final = -62_135_596_800_000_000
_LATEST: Final = 253_402_300_799_999_999
"""Of the years 1 to 9999, microseconds since 1970."""
_MOST_TOKENS: Final = 2**127
_MOST_COST_DIGITS: Final = 2 * COST_DIGITS_BEFORE
"""Before the point. Far above what calls add up to, and far below where sums with others would fail."""
_NEWER: Final = re.compile(r"[2-9]|[1-9][0-9]{1,8}")


class Newer(Exception):  # noqa: N818 - says what is the case
    """The message was written by a newer version; nothing of it may be guessed."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message to publish, or as it was published."""

    subject: str
    headers: dict[str, str]
    body: bytes


def partition_of(thread_id: str, partitions: int) -> int:
    """Return the partition of a thread."""
    return crc32(thread_id.encode()) % partitions


def stream_of(name: str, partition: int) -> str:
    """Return the name of the JetStream stream that is a partition."""
    return f"{name}-{partition}"


def subject_of(name: str, partition: int, producer: UUID | None) -> str:
    """Return the subject of a producer in a partition; `None`: of all of them."""
    return f"{name}.{partition}.{'*' if producer is None else producer.hex}"


def lane_of(partition: int) -> int:
    """Return the lane of a partition in the ledger."""
    return partition + 1


def batch_of(sequence: int) -> int:
    """Return the sequence of the batch that a message's sequence belongs to."""
    return sequence // _MESSAGES


def encode(name: str, batch: Batch, partitions: int) -> list[list[Message]]:
    """Return the messages of *batch*, a list a partition, in the order in which they are published."""
    dealt: list[list[ThreadDelta]] = [[] for _ in range(partitions)]
    for delta in batch.deltas:
        dealt[partition_of(delta.thread_id, partitions)].append(delta)
    return [
        [_message(name, batch, partition, number, body) for number, body in enumerate(_cut(deltas))]
        for partition, deltas in enumerate(dealt)
    ]


def _cut(deltas: Iterable[ThreadDelta]) -> Iterator[bytes]:
    body = bytearray()
    for delta in deltas:
        for part in _parts(delta):
            data = encode_sum(part)
            if body and len(body) + len(data) > MESSAGE_BYTES:
                yield bytes(body)
                body.clear()
            body += data
            if part is not delta:
                yield bytes(body)  # the next part is of the same thread, which stands once in a message
                body.clear()
    if body:
        yield bytes(body)


def _parts(delta: ThreadDelta) -> Iterator[ThreadDelta]:
    """Yield *delta*, or where its agents alone could fill a message, parts of it that sum to it in their order."""
    agents = delta.agents
    if len(agents) <= _AGENTS_IN_PART:
        yield delta
        return
    for start in range(0, len(agents), _AGENTS_IN_PART):
        part = ThreadDelta(delta.thread_id, delta.first_at)
        if not start:
            part = delta.copy()
            part._agents = ()  # noqa: SLF001 - a copy of our own
        part.use(agents[start : start + _AGENTS_IN_PART])
        yield part


def _message(name: str, batch: Batch, partition: int, number: int, body: bytes) -> Message:
    assert number < _MESSAGES
    lane, sequence = lane_of(partition), batch.sequence * _MESSAGES + number
    identity = wire.batch_headers(Batch(batch.producer, lane, 0, sequence, (), batch.create_missing))
    headers = {
        "Nats-Msg-Id": f"{batch.producer}/{lane}/{sequence}",
        "tracker-format": FORMAT,
        **identity,
    }
    return Message(subject_of(name, partition, batch.producer), headers, body)


def decode(headers: Mapping[str, str], body: bytes, partition: int) -> Batch:
    """Return the batch that a message of *partition* is.

    Raises:
        Newer: by a version that this one does not know.
        Malformed: it is no message of a tracker; it says why.
    """
    headers = {name.lower(): value for name, value in headers.items()}
    format_ = headers.get("tracker-format", "")
    if format_ != FORMAT:
        if _NEWER.fullmatch(format_):
            raise Newer(f"the message has the format {format_}, this version knows {FORMAT}")
        raise wire.Malformed(f"Tracker-Format must be {FORMAT}, got {format_[:80]!r}")
    batch = wire.decode_batch(headers, body, create_missing=True)
    if batch.epoch or batch.lane != lane_of(partition) or batch.sequence < 1:
        raise wire.Malformed(f"the identity {batch} does not belong into partition {partition}")
    for delta in batch.deltas:
        if not _is_storable(delta):
            raise wire.Malformed(
                f"the thread {delta.thread_id!r:.80} has a NUL, an instant or a number that no database can hold"
            )
    return batch


def _is_storable(delta: ThreadDelta) -> bool:
    """Say whether a database, and a dead letter, can hold it: what trackers make they can."""
    if "\0" in delta.thread_id or "\0" in (delta.resolution_type or ""):
        return False
    for at in (delta.first_at, delta.last_turn_at, delta.resolved_at):
        if at is not None and not _EARLIEST <= at <= _LATEST:
            return False
    if not -_MOST_TOKENS < delta.tokens < _MOST_TOKENS:
        return False
    cost = Decimal(0) if delta.cost_rest is None else delta.cost_rest
    exponent = cost.as_tuple().exponent
    # In words, as NaN, the exponent of what is no number.
    if not isinstance(exponent, int) or cost.adjusted() >= _MOST_COST_DIGITS or -exponent > COST_DIGITS_AFTER:
        return False
    return not any("\0" in agent for agent in delta.agents)


def last_sequence(headers: Mapping[str, str]) -> int:
    """Return the sequence in a message's headers; 0 if there is none."""
    try:
        return wire.sequence({name.lower(): value for name, value in headers.items()})
    except wire.Malformed:
        return 0


def size_of(messages: Sequence[Sequence[Message]]) -> int:
    """Return the bytes of the bodies."""
    return sum(len(message.body) for part in messages for message in part)
