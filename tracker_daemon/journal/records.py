"""The journal's format: calls, sums and marks as bytes.

A file is a header of 128 bytes and records, up to the first length of zero:

    length u32 | crc32 of the payload u32 | payload        (little-endian; payload[0] says the kind)

Rules:
1. Pure: bytes in, values out. A record that decodes gives the very call that was encoded: the sums of a window read
   back are those of the window that was written.
2. A length of zero is the end: files are allocated as zeros before they are written.
3. The checksum is zlib's CRC-32: it finds every burst of up to 32 bits and misses one in 4 thousand million of others.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from decimal import Decimal
from struct import Struct
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from uuid import UUID
from zlib import crc32

from tracker_daemon import generation
from tracker_daemon.delta import ThreadDelta

if TYPE_CHECKING:
    from tracker_daemon.generation import Record

    Buffer: TypeAlias = Any  # bytes or a map

FRAME: Final = Struct("<II")
_ENSURE: Final = Struct("<BqH")
_TURN: Final = Struct("<BqqdHH")
_RESOLVE: Final = Struct("<BqHH")
_TURN_EXACT: Final = Struct("<BqqHHI")
_DELTA: Final = Struct("<BBIIIqqqHHIII")
_OPENED: Final = Struct("<BIQ")
_END: Final = Struct("<BQIQ")
TURN, ENSURE, RESOLVE, TURN_EXACT, DELTA, OPENED, END = range(1, 8)
# A double holds these exactly, so an int counts as the float of the same value.
_INT_EXACT: Final = 2**53
_NO_INSTANT: Final = -(2**63)
# Shorter is no record, longer none that was ever written: what looks for the next good one skips it.
_SHORTEST: Final = _ENSURE.size + 1
MOST_RECORD: Final = 1 << 24
_MOST_AGENTS: Final = 10_000
_MORE: Final = 2

_pack_frame, _pack_turn, _pack_ensure, _pack_resolve = FRAME.pack, _TURN.pack, _ENSURE.pack, _RESOLVE.pack


@dataclass(frozen=True, slots=True)
class Sum:
    """A delta that stands for the calls before it: a window written anew.

    Attributes:
        delta: the sum.
        late: of the window's second part.
        more: it goes on the sum of the same thread before it, which had more names than a record holds.
    """

    delta: ThreadDelta
    late: bool
    more: bool = False


@dataclass(frozen=True, slots=True)
class Opened:
    """The ledger has registered this producer: its row's absence never again means that it is new."""

    epoch: int
    database: int


@dataclass(frozen=True, slots=True)
class End:
    """The last record of a sealed window: the sequence of its first batch, how many they are, and its calls."""

    first: int
    batches: int
    calls: int


class Damaged(ValueError):  # noqa: N818 - says what is the case
    """The bytes at an offset are no record."""


class Blank(Damaged):
    """There is no header: a loss of power before the first fsync takes it, and with it what the file held."""


def encode(record: Record) -> bytes:
    """Return one call as a framed record."""
    thread_id, name, tokens, cost, at = record
    thread, agent = thread_id.encode(), b"" if name is None else name.encode()
    if isinstance(tokens, int):
        if type(cost) is float or (type(cost) is int and -_INT_EXACT < cost < _INT_EXACT):
            payload = _pack_turn(TURN, at, tokens, cost, len(thread), len(agent)) + thread + agent
        else:
            text = _text(cost)
            payload = _TURN_EXACT.pack(TURN_EXACT, at, tokens, len(thread), len(agent), len(text))
            payload += thread + agent + text
    elif tokens == generation.ENSURE:
        payload = _pack_ensure(ENSURE, at, len(thread)) + thread
    else:
        payload = _pack_resolve(RESOLVE, at, len(thread), len(agent)) + thread + agent
    return _pack_frame(len(payload), crc32(payload)) + payload


def encode_sum(delta: ThreadDelta, *, late: bool = False) -> bytes:
    """Return a delta as a framed record, or as several where it has very many agents."""
    if len(delta.agents) <= _MOST_AGENTS:
        return _encode_sum(delta, delta.agents, late)
    parts = []
    for start in range(0, len(delta.agents), _MOST_AGENTS):
        part = ThreadDelta(delta.thread_id, delta.first_at) if start else delta
        agents = delta.agents[start : start + _MOST_AGENTS]
        parts.append(_encode_sum(part, agents, late | (_MORE if start else 0)))
    return b"".join(parts)


def _encode_sum(delta: ThreadDelta, names: tuple[str, ...], flags: int) -> bytes:
    thread, cost = delta.thread_id.encode(), str(delta.cost).encode()
    agents = b"".join(len(name).to_bytes(2, "little") + name for name in (agent.encode() for agent in names))
    resolution = b"" if delta.resolution_type is None else delta.resolution_type.encode()
    tokens = str(delta.tokens).encode()
    head = _DELTA.pack(
        DELTA,
        flags,
        delta.ensures,
        delta.turns,
        delta.resolves,
        delta.first_at,
        _NO_INSTANT if delta.last_turn_at is None else delta.last_turn_at,
        _NO_INSTANT if delta.resolved_at is None else delta.resolved_at,
        len(thread),
        len(resolution),
        len(tokens),
        len(cost),
        len(agents),
    )
    return framed(head + thread + resolution + tokens + cost + agents)


def encode_mark(mark: Opened | End) -> bytes:
    """Return a mark as a framed record."""
    if isinstance(mark, Opened):
        return framed(_OPENED.pack(OPENED, mark.epoch, mark.database))
    return framed(_END.pack(END, mark.first, mark.batches, mark.calls))


def framed(payload: bytes) -> bytes:
    """Return *payload* with its length and checksum before it."""
    return _pack_frame(len(payload), crc32(payload)) + payload


def payload_at(buffer: Buffer, offset: int, end: int) -> bytes | None:
    """Return the payload of the record at *offset*, or `None` where the records end.

    Raises:
        Damaged: there are bytes, and they are no record.
    """
    if offset + FRAME.size > end:
        if any(buffer[offset:end]):
            raise Damaged("the file ends in the middle of a record's head")
        return None
    length, checksum = FRAME.unpack_from(buffer, offset)
    if length == 0:
        if checksum:
            raise Damaged("a length of zero with a checksum")
        return None
    start = offset + FRAME.size
    if length > MOST_RECORD or start + length > end:
        raise Damaged(f"a length of {length} bytes where {end - start} are left")
    payload = bytes(buffer[start : start + length])
    if crc32(payload) != checksum:
        raise Damaged("a checksum that does not match")
    return payload


def decode(payload: bytes) -> Record | Sum | Opened | End:
    """Return what a payload says.

    Raises:
        Damaged: the kind is unknown, or the lengths in it do not add up: written by a newer version, or by no one.
    """
    try:
        return _decode(payload)
    except (struct.error, UnicodeDecodeError, ArithmeticError, IndexError, ValueError) as error:
        raise Damaged(f"a payload of kind {payload[0]} that cannot be read: {error}") from error


def _decode(payload: bytes) -> Record | Sum | Opened | End:  # noqa: PLR0911 - a return a kind
    kind = payload[0]
    if kind == TURN:
        _, at, tokens, cost, n, m = _TURN.unpack_from(payload)
        here = _TURN.size
        _exactly(payload, here + n + m)
        thread = payload[here : here + n].decode()
        return thread, payload[here + n :].decode() if m else None, tokens, cost, at
    if kind == ENSURE:
        _, at, n = _ENSURE.unpack_from(payload)
        _exactly(payload, _ENSURE.size + n)
        return generation.ensure(payload[_ENSURE.size :].decode(), at)
    if kind == RESOLVE:
        _, at, n, m = _RESOLVE.unpack_from(payload)
        here = _RESOLVE.size
        _exactly(payload, here + n + m)
        return generation.resolve(payload[here : here + n].decode(), payload[here + n :].decode(), at)
    if kind == TURN_EXACT:
        _, at, tokens, n, m, k = _TURN_EXACT.unpack_from(payload)
        here = _TURN_EXACT.size
        _exactly(payload, here + n + m + k)
        thread = payload[here : here + n].decode()
        agent = payload[here + n : here + n + m].decode() if m else None
        return thread, agent, tokens, _cost(payload[here + n + m :]), at
    if kind == DELTA:
        return _decode_sum(payload)
    if kind == OPENED:
        _exactly(payload, _OPENED.size)
        return Opened(*_OPENED.unpack(payload)[1:])
    if kind == END:
        _exactly(payload, _END.size)
        return End(*_END.unpack(payload)[1:])
    raise Damaged(f"the kind {kind}, which this version does not know")


def _decode_sum(payload: bytes) -> Sum:
    _, flags, ensures, turns, resolves, first_at, last_turn_at, resolved_at, *lengths = _DELTA.unpack_from(payload)
    here, parts = _DELTA.size, []
    for length in lengths:
        parts.append(payload[here : here + length])
        here += length
    _exactly(payload, here)
    thread, resolution, tokens, cost, agents = parts
    delta = ThreadDelta(thread.decode(), first_at)
    delta.ensures, delta.turns, delta.resolves = ensures, turns, resolves
    delta.tokens = int(tokens)
    delta.pay(Decimal(cost.decode()))
    delta.use(_names(agents))
    delta.last_turn_at = None if last_turn_at == _NO_INSTANT else last_turn_at
    if resolved_at != _NO_INSTANT:
        delta.resolution_type, delta.resolved_at = resolution.decode(), resolved_at
    return Sum(delta, bool(flags & 1), bool(flags & _MORE))


def _names(data: bytes) -> list[str]:
    names, here = [], 0
    while here < len(data):
        length = int.from_bytes(data[here : here + 2], "little")
        names.append(data[here + 2 : here + 2 + length].decode())
        here += 2 + length
    _exactly(data, here)
    return names


def _exactly(payload: bytes, size: int) -> None:
    if len(payload) != size:
        raise Damaged(f"{len(payload)} bytes where {size} were announced")


def _text(cost: Any) -> bytes:
    # An int as a hexadecimal number: the decimal one takes quadratic time, and is limited to 4,300 digits.
    return (hex(cost) if type(cost) is int else str(cost)).encode()


def _cost(text: bytes) -> int | Decimal:
    words = text.decode()
    return int(words, 16) if "x" in words else Decimal(words)


def find_record(buffer: Buffer, offset: int, end: int) -> int | None:
    """Return where the next good record begins at or after *offset*, or `None`."""
    for here in range(offset, end - FRAME.size - _SHORTEST + 1):
        length = int.from_bytes(buffer[here : here + 4], "little")
        if _SHORTEST <= length <= min(MOST_RECORD, end - here - FRAME.size):
            try:
                if (payload := payload_at(buffer, here, end)) is not None:
                    decode(payload)
                    return here
            except Damaged:
                continue
    return None


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself.

    Attributes:
        producer, lane: whose it is.
        epoch, database: of the life in the ledger when the file was begun, and the database's system identifier; 0
            while the database had not been reached.
        number: counts the producer's files, in the order in which they are read.
        window: counts its windows; the files of one window hold its calls one after the other.
        anew: this file holds the sum of everything before it in its window.
        max_batch_size, create_missing: how the window is cut into batches.
        created_at: nanoseconds since 1970.
    """

    producer: UUID
    lane: int
    epoch: int
    database: int
    number: int
    window: int
    anew: bool
    max_batch_size: int
    create_missing: bool
    created_at: int

    def encode(self) -> bytes:
        """Return the first bytes of a file."""
        head = _HEADER.pack(
            MAGIC,
            VERSION,
            self.lane,
            self.producer.bytes,
            self.epoch,
            self.database,
            self.number,
            self.window,
            self.anew,
            self.create_missing,
            self.max_batch_size,
            self.created_at,
        )
        return head + crc32(head).to_bytes(4, "little")

    @classmethod
    def decode(cls, data: bytes) -> Header:
        """Return the header in *data*.

        Raises:
            Blank: it is none.
            Damaged: it is of another version.
        """
        if len(data) < HEADER_SIZE or not data.startswith(MAGIC):
            raise Blank("no journal's header")
        head = data[: _HEADER.size]
        if crc32(head).to_bytes(4, "little") != data[_HEADER.size : _HEADER.size + 4]:
            raise Blank("a header whose checksum does not match")
        _, version, lane, producer, epoch, database, number, window, anew, create, size, created = _HEADER.unpack(head)
        if version != VERSION:
            raise Damaged(f"the format's version {version}; this program reads {VERSION}")
        return cls(UUID(bytes=producer), lane, epoch, database, number, window, bool(anew), size, bool(create), created)


MAGIC: Final = b"TRKJRNL\0"
VERSION: Final = 1
_HEADER: Final = Struct("<8sHH16sIQQQ??2xIq")
HEADER_SIZE: Final = 128
# Written in place once they are known: each in one aligned word, so that no crash leaves half of it.
REGISTERED_AT: Final = 96
FIRST_AT: Final = 104
SYNCED_AT: Final = 112
APPLIED_AT: Final = 120
WORD: Final = Struct("<Q")


def word(value: int) -> int:
    """Return *value*, below 2**48, with a checksum in the other 16 bits; 0, which a new file has there, for 0."""
    return value and value << 16 | crc32(value.to_bytes(6, "little")) & 0xFFFF


def applied_word(seconds: int, *, closed: bool) -> int:
    """Return what says that a file's window was applied, *seconds* since 1970, and whether the life ended cleanly."""
    return word(seconds << 1 | closed)


def word_value(packed: int) -> int:
    """Return what `word` was given; raises `Damaged` for anything else."""
    value = packed >> 16
    if word(value) != packed:
        raise Damaged("a number in the header whose checksum does not match")
    return value
