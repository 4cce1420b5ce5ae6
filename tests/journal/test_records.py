"""The format: what is read back is what was written, today's files stay readable, and others are refused by name."""

from __future__ import annotations

import struct
from decimal import Decimal
from pathlib import Path
from typing import Any, Final
from uuid import UUID
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import strategies
from tests.journal.rig import NOW, header
from tracker_daemon.delta import ThreadDelta
from tracker_daemon.errors import InvalidCall
from tracker_daemon.front_door import FrontDoor
from tracker_daemon.generation import Generation, Record, ensure, resolve
from tracker_daemon.journal import records
from tracker_daemon.journal.lives import life_of
from tracker_daemon.journal.records import (
    FRAME,
    HEADER_SIZE,
    MOST_RECORD,
    Blank,
    Damaged,
    End,
    Header,
    Opened,
    Sum,
)
from tracker_daemon.journal.segment import Segment, Written
from tracker_daemon.journal.windows import producer_of, take

GOLDEN: Final = Path(__file__).parent / "golden"
INSTANTS: Final = st.integers(0, 2**62)
NAMES: Final = strategies.names()


def turns() -> st.SearchStrategy[Record]:
    """Turns of every kind."""
    tokens = st.one_of(strategies.tokens(), st.sampled_from([2**63 - 1, -(2**63) + 1]))
    return st.tuples(NAMES, st.none() | NAMES, tokens, strategies.costs(), INSTANTS)


def calls() -> st.SearchStrategy[Record]:
    """Calls as the front door queues them."""
    return st.one_of(turns(), st.builds(ensure, NAMES, INSTANTS), st.builds(resolve, NAMES, NAMES, INSTANTS))


def payloads(data: bytes) -> list[bytes]:
    """Return the payloads of records one after the other."""
    found, offset = [], 0
    while (payload := records.payload_at(data, offset, len(data))) is not None:
        found.append(payload)
        offset += FRAME.size + len(payload)
    assert offset == len(data)
    return found


def folded(made: list[Record], *, create_missing: bool = True) -> Generation:
    """Return the sums of calls."""
    generation = Generation(create_missing=create_missing)
    for call in made:
        generation.fold(call)
    return generation


def same(one: Generation, other: Generation) -> bool:
    """Say whether two generations give the same batches."""
    return list(one.batches(3)) == list(other.batches(3)) and list(one.deltas) == list(other.deltas)


# -- there and back --------------------------------------------------------------------------------


@given(calls())
@settings(max_examples=120, deadline=None)
def test_a_call(call: Record) -> None:
    """It comes back as it was, but for the type of a cost that a float holds exactly."""
    [payload] = payloads(records.encode(call))
    back = records.decode(payload)
    assert isinstance(back, tuple)
    assert back == call
    assert same(folded([back]), folded([call]))


@given(st.lists(calls(), max_size=12), st.booleans())
@settings(max_examples=120, deadline=None)
def test_the_sums_of_calls(made: list[Record], create_missing: bool) -> None:
    """Calls read back give the batches of those that were made."""
    back = [records.decode(payload) for payload in payloads(b"".join(map(records.encode, made)))]
    assert same(folded(back, create_missing=create_missing), folded(made, create_missing=create_missing))  # type: ignore[arg-type]


@given(strategies.histories(processes=1), st.booleans(), st.integers(0, 14))
@settings(max_examples=120, deadline=None)
def test_a_window_written_anew(history: strategies.History, create_missing: bool, cut: int) -> None:
    """Sums in place of the first calls, and the rest as they are, give the batches of the calls."""
    made = list(history.records)
    first = folded(made[:cut], create_missing=create_missing)
    data = b"".join(records.encode_sum(delta, late=late) for delta, late in first.sums())
    data += b"".join(map(records.encode, made[cut:]))
    back = Generation(create_missing=create_missing)
    for payload in payloads(data):
        item = records.decode(payload)
        assert isinstance(item, tuple | Sum)
        take(back, item)
    assert same(back, folded(made, create_missing=create_missing))
    assert back.calls == len(made)


@pytest.mark.parametrize("agents", [0, 1, 9_999, 10_000, 10_001, 25_000])
def test_a_sum_of_many_agents(agents: int) -> None:
    """Names that do not fit one record are in several; none is longer than a record may be."""
    delta = ThreadDelta("t", NOW // 1_000)
    delta.turn(None, 5, 0.25, NOW // 1_000)
    delta.resolve("done", NOW // 1_000)
    delta.use(tuple(f"{number:0512d}" for number in range(agents)))
    parts = payloads(records.encode_sum(delta, late=True))
    assert all(len(part) < MOST_RECORD for part in parts)
    back = Generation(create_missing=False)
    for part in parts:
        item = records.decode(part)
        assert isinstance(item, Sum)
        assert item.late
        take(back, item)
    assert list(back.sums()) == [(delta, True)]


@pytest.mark.parametrize(
    "cost",
    [10**131_071, -(10**131_071), 2**53, 2**53 - 1, -(2**53), 0, Decimal("9.99E+131071"), Decimal("-1E-16383"), -0.0],
    ids=range(9),
)
def test_costs_of_every_size(cost: Any) -> None:
    """As large as the door lets in: exact, and not in quadratic time."""
    call = ("t", None, 1, cost, NOW)
    [payload] = payloads(records.encode(call))
    back = records.decode(payload)
    assert same(folded([back]), folded([call]))  # type: ignore[list-item]


class Noted(FrontDoor):
    """A door that notes what it would append."""

    def __init__(self) -> None:
        self.record: Record | None = None
        self._agents = {None: None}
        self._refusals = self  # type: ignore[assignment]
        self._backlog = self  # type: ignore[assignment]
        self.gate = iter(())

    def add(self, reason: str) -> None:
        """Count nothing."""

    def _enter(self, record: Record) -> bool:
        self.record = record
        return True


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_whatever_the_door_lets_in(data: st.DataObject) -> None:
    """What it does not refuse can be written, and read."""
    door = Noted()
    anything = st.one_of(st.text(max_size=600), NAMES, st.none(), st.integers(), strategies.any_costs())
    name, agent, tokens, cost = (data.draw(anything) for _ in range(4))
    made: list[tuple[Any, tuple[Any, ...]]] = [
        (door.record_turn, (name, agent, tokens, cost)),
        (door.ensure_conversation, (name,)),
        (door.resolve, (name, agent)),
    ]
    for call, arguments in made:
        try:
            call(*arguments)
        except InvalidCall:
            continue
        assert door.record is not None
        [payload] = payloads(records.encode(door.record))
        assert records.decode(payload) == door.record


@pytest.mark.parametrize("mark", [Opened(1, 0), Opened(2**32 - 1, 2**64 - 1), End(0, 0, 0), End(2**63, 2**31, 2**63)])
def test_a_mark(mark: Opened | End) -> None:
    """It comes back as it was."""
    [payload] = payloads(records.encode_mark(mark))
    assert records.decode(payload) == mark


def test_a_header() -> None:
    """It comes back as it was, whatever stands after it."""
    one = header(lane=3, epoch=7, database=2**63, number=9, window=4, anew=True, create_missing=False)
    assert Header.decode(one.encode().ljust(HEADER_SIZE, b"\0")) == one
    assert len(one.encode()) < records.FIRST_AT


@given(st.integers(0, 2**48 - 1), st.integers(0, 63))
def test_a_number_in_the_header(value: int, bit: int) -> None:
    """It comes back; with a flipped bit it is refused."""
    packed = records.word(value)
    assert records.word_value(packed) == value
    with pytest.raises(Damaged):
        records.word_value(packed ^ 1 << bit)


# -- what is refused -------------------------------------------------------------------------------


def test_another_version() -> None:
    """Its number is named, and this program's."""
    data = bytearray(header().encode().ljust(HEADER_SIZE, b"\0"))
    data[8:10] = (2).to_bytes(2, "little")
    size = len(header().encode()) - 4
    data[size : size + 4] = crc32(data[:size]).to_bytes(4, "little")
    with pytest.raises(Damaged, match="the format's version 2; this program reads 1") as caught:
        Header.decode(bytes(data))
    assert not isinstance(caught.value, Blank)


def test_a_file_of_another_version(tmp_path: Path) -> None:
    """It is not passed over as a blank one, though it was never synced."""
    path = tmp_path / f"{UUID(int=1).hex}-open-00000001.journal"
    data = bytearray(header().encode().ljust(HEADER_SIZE, b"\0"))
    data[8:10] = (9).to_bytes(2, "little")
    size = len(header().encode()) - 4
    data[size : size + 4] = crc32(data[:size]).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(Damaged, match="version 9"):
        Written(path)


@pytest.mark.parametrize("kind", [0, 8, 9, 77, 255])
def test_another_kind(kind: int) -> None:
    """It is named."""
    [payload] = payloads(records.framed(bytes([kind]) + b"something"))
    with pytest.raises(Damaged, match=f"kind {kind}, which this version does not know"):
        records.decode(payload)


@given(calls(), st.data())
@settings(max_examples=100, deadline=None)
def test_lengths_that_do_not_add_up(call: Record, data: st.DataObject) -> None:
    """A payload that is too long or too short is refused, never read as something else."""
    [payload] = payloads(records.encode(call))
    cut = data.draw(st.integers(1, len(payload) - 1))
    for wrong in (payload[:cut], payload + b"x"):
        with pytest.raises(Damaged):
            records.decode(wrong)


@given(st.binary(min_size=1, max_size=80))
@settings(max_examples=300)
def test_any_bytes(data: bytes) -> None:
    """Garbage is refused by `Damaged` alone, or happens to be a record."""
    try:
        records.decode(data)
    except Damaged as damaged:
        assert str(data[0]) in str(damaged) or "bytes" in str(damaged)  # noqa: PT017


@given(calls(), st.integers(0, 7), st.data())
@settings(max_examples=120, deadline=None)
def test_a_flipped_bit(call: Record, bit: int, data: st.DataObject) -> None:
    """Anywhere in a record it is seen."""
    record = bytearray(records.encode(call))
    record[data.draw(st.integers(0, len(record) - 1))] ^= 1 << bit
    try:
        payload = records.payload_at(bytes(record), 0, len(record))
    except Damaged:
        return
    assert payload is None  # a length of zero is the end: the caller sees that bytes follow


def test_no_record_inside_a_name() -> None:
    """What looks for the next record cannot be led astray: a frame has a zero byte, and a name has none."""
    assert MOST_RECORD <= 1 << 24
    for length in (1, 255, 65_535, MOST_RECORD):
        assert 0 in struct.pack("<I", length)


@pytest.mark.parametrize(
    ("name", "is_ours"),
    [
        (f"{UUID(int=5).hex}-0000000000000001-0000.journal", True),
        (f"{UUID(int=5).hex}-9999999999999999-123456.journal", True),
        (f"{UUID(int=5).hex}-open-00000001.journal", True),
        (f"{UUID(int=5).hex}-open-00000001.journal.damaged", False),
        ("lock", False),
        (".writable", False),
        (f"{UUID(int=5).hex}-open-x.journal", False),
    ],
)
def test_names(name: str, is_ours: bool) -> None:
    """Other files in the directory are let be."""
    assert (producer_of(name) == UUID(int=5)) == is_ours


# -- files of today --------------------------------------------------------------------------------

EVERY: Final[tuple[Record, ...]] = (
    ensure("t-1", NOW),
    ("t-1", None, 5, 0.1, NOW + 1_000),
    ("t-1", "billing", -7, 3, NOW + 2_000),
    ("t-é", "日本語", 2**62, Decimal("1.10"), NOW + 3_000),
    ("t-é", "a", 0, 2**70, NOW + 4_000),
    resolve("t-1", "solved", NOW + 5_000),
)


def golden_file(path: Path) -> None:
    """Write the file that is kept: every kind of record, in a sealed window of which the first half is sums."""
    head = header(producer=UUID(int=0x1234), epoch=3, database=7, number=4, window=2, anew=True, create_missing=False)
    segment = Segment(head, 4_096, path)
    first = folded([*EVERY, ("t-2", "x", 1, 0.5, NOW), ensure("t-2", NOW + 1)], create_missing=False)
    for delta, late in first.sums():
        segment.write(records.encode_sum(delta, late=late))
    segment.write(records.encode_mark(Opened(3, 7)))
    for call in EVERY:
        segment.write(records.encode(call))
    segment.freeze()
    segment.note_first(11)
    segment.append(records.encode_mark(End(11, 2, 14)))
    segment.trim()
    segment.sync()
    segment.close()


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.journal")), ids=lambda path: path.name)
def test_golden(path: Path, tmp_path: Path) -> None:
    """A file that this format once wrote reads as it did then, and is written so today."""
    life = life_of(UUID(int=0x1234), [path])
    assert (life.epoch, life.database, life.begun_at) == (3, 7, NOW)
    [window] = life.windows
    assert (window.first, window.batches, window.last, window.calls) == (11, 2, 12, 14)
    assert (window.max_batch_size, window.create_missing) == (2, False)
    expected = folded([*EVERY, ("t-2", "x", 1, 0.5, NOW), ensure("t-2", NOW + 1), *EVERY], create_missing=False)
    assert same(window.load(), expected)
    again = tmp_path / path.name
    golden_file(again)
    assert again.read_bytes() == path.read_bytes()


def test_there_are_golden_files() -> None:
    """One for each version that was ever written."""
    assert len(list(GOLDEN.glob("*.journal"))) == records.VERSION
