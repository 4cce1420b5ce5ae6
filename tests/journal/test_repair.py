"""Damage that is passed over: what is certain is applied, once; what is not is left out, and said."""

from __future__ import annotations

import gc
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from tests.journal.interruptions import Interruption
from tests.journal.rig import Calls, Rig, recovered, small_files
from tests.model.manual_clock import run
from tracker_daemon.generation import ensure
from tracker_daemon.journal.inspection import files_in, inspect
from tracker_daemon.journal.records import FRAME, HEADER_SIZE, payload_at
from tracker_daemon.journal.repair import Repaired, repair
from tracker_daemon.memory_sink import MemorySink

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from uuid import UUID

    from tracker_daemon.batch import Batch
    from tracker_daemon.sink import Applied

THREADS = 7


class Away(BaseException):
    """The sink does not answer any more."""


class Some(MemorySink):
    """Takes so many batches."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.left = batches

    async def apply(self, batch: Batch) -> Applied:
        """See `Sink.apply`."""
        if not self.left:
            raise Away
        self.left -= 1
        return await super().apply(batch)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_files(monkeypatch)


def a_life(directory: Path, applied: int, *, pad: int = 0) -> tuple[Calls, Some, UUID]:
    """Leave a window of ten calls on seven threads, of which some batches of two are applied, and a window behind it."""
    calls, sink = Calls(), Some(applied)
    rig = Rig(directory, sink)
    for number in range(10):
        rig.call(calls.next(f"t{number % THREADS}" + "x" * pad))
    rig.seal()
    rig.sync()
    with suppress(Away):
        run(rig.flusher.flush())
    rig.call(calls.next("behind"))
    rig.seal()
    rig.sync()
    rig.crash()
    sink.left = 10**6
    return calls, sink, rig.journal.producer


def offsets(path: Path) -> list[int]:
    """Return where the records of a file begin."""
    data, found, offset = path.read_bytes(), list[int](), HEADER_SIZE
    while (payload := payload_at(data, offset, len(data))) is not None:
        found.append(offset)
        offset += FRAME.size + len(payload)
    return found


def spoil(path: Path, at: int) -> None:
    """Flip a bit."""
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def position(sink: MemorySink, producer: UUID) -> int:
    """Return the sequence that is applied."""
    found = sink.ledger.get((producer, 0))
    return 0 if found is None else found.applied_sequence


def repaired(directory: Path, sink: MemorySink, producer: UUID) -> Repaired:
    """Repair a life."""
    return repair(producer, files_in(directory)[producer], position(sink, producer))


def first_file(directory: Path) -> Path:
    """Return the file of the first window."""
    return min(path for path in directory.glob("*.journal") if "-open-" not in path.name)


@pytest.mark.parametrize("applied", range(5))
@pytest.mark.parametrize("spoilt", range(10))
def test_one_record(applied: int, spoilt: int, tmp_path: Path) -> None:
    """Any call is damaged, with any number of batches applied: never twice, and everything that is certain."""
    calls, sink, producer = a_life(tmp_path, applied)
    before = Calls.counted(sink.rows)
    path = first_file(tmp_path)
    at = offsets(path)[spoilt]
    spoil(path, at + FRAME.size + 2)
    lost = (f"t{spoilt % THREADS}", spoilt // THREADS)
    if applied < 4:
        assert recovered(tmp_path, sink).told
        assert Calls.counted(sink.rows) == before, "nothing of it, nor of what follows it"
    done = repaired(tmp_path, sink, producer)
    after = recovered(tmp_path, sink)
    counted = Calls.counted(sink.rows)
    assert after.told == []
    assert ("behind", 0) in counted
    assert before <= counted <= calls.made
    known = min(spoilt, THREADS)
    if applied == 4:
        assert (done.skipped, done.left_out, done.aside) == ([], 0, [])
        assert counted == calls.made
    elif applied * 2 <= known:
        assert done.left_out == 0
        assert calls.made - counted <= {lost}
    else:
        # Only calls of threads that appear behind the damage, which may be in the batches that are applied.
        assert {int(name[1:]) >= known for name, _ in calls.made - counted - {lost}} <= {True}
        assert done.left_out == len(
            [call for call in calls.made if call[0][0] == "t" and int(call[0][1:]) >= known and call != lost]
        )
    if applied < 4:
        assert [(fault.file, fault.offset) for fault in done.skipped] == [(str(path), at)]
        assert done.aside == [f"{path}.damaged"]
        assert "checksum" in done.skipped[0].fault
    recovered(tmp_path, sink)
    assert Calls.counted(sink.rows) == counted


@pytest.mark.parametrize("applied", range(5))
@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_header(applied: int, part: int, tmp_path: Path) -> None:
    """A file whose header is lost is put aside, with all that it holds."""
    calls, sink, producer = a_life(tmp_path, applied, pad=1_100)
    before = Calls.counted(sink.rows)
    files = sorted(path for path in tmp_path.glob("*-0000000000000001-*.journal"))
    assert len(files) >= 3
    spoil(files[part], 20)
    assert recovered(tmp_path, sink).told
    done = repaired(tmp_path, sink, producer)
    assert f"{files[part]}.damaged" in done.aside
    assert (str(files[part]), 0) in [(fault.file, fault.offset) for fault in done.skipped]
    assert recovered(tmp_path, sink).told == []
    counted = Calls.counted(sink.rows)
    assert before <= counted <= calls.made
    assert ("behind", 0) in counted
    if applied == 0:
        assert len(counted) > 4, "what the other files hold"
    if applied == 4:
        assert counted == calls.made


@pytest.fixture
def _left_open() -> Iterator[None]:
    """What a test leaves open when it dies is collected at its end, when the log's records let go of it, not in another one."""
    yield
    gc.collect()


@pytest.mark.usefixtures("_left_open")
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # files that were open when it died
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("applied", [0, 1, 3])
@pytest.mark.parametrize("where", ["record", "header"])
def test_killed_while_it_is_repaired(where: str, applied: int, tmp_path: Path) -> None:
    """At any point: done again it comes to the same, and nothing is applied twice."""
    number, outcomes = 0, set[frozenset[tuple[str, int]]]()
    while True:
        directory = tmp_path / str(number)
        calls, sink, producer = a_life(directory, applied, pad=1_100)
        files = sorted(path for path in directory.glob("*-0000000000000001-*.journal"))
        spoil(files[1], 20 if where == "header" else offsets(files[1])[0] + FRAME.size + 2)

        def die() -> None:
            raise Away

        interruption = Interruption(number, die)
        try:
            interruption.during(lambda d=directory, s=sink, p=producer: repaired(d, s, p))  # type: ignore[misc]
        except Away:
            # A tracker starts in between: it applies what it can.
            recovered(directory, sink)
            repaired(directory, sink, producer)
        assert recovered(directory, sink).told == []
        assert not list(directory.glob("*.new"))
        counted = Calls.counted(sink.rows)
        assert counted <= calls.made
        outcomes.add(frozenset(counted))
        if not interruption.happened:
            break
        number += (
            397  # a prime, so that no loop of the code is met at one place alone; each point takes a tenth of a second
        )
    assert len(outcomes) == 1
    assert number > 10 * 397


def test_more_batches_than_there_were(tmp_path: Path) -> None:
    """Without what is lost a window may fall into more batches than it had: they are not numbered into the next one."""
    calls, sink = Calls(), Some(0)
    rig = Rig(tmp_path, sink, create_missing=False)
    rig.call(ensure("t", 1))
    for number in range(2):
        rig.call(calls.next("t"))
        rig.call(ensure("t", 2 + number))
    rig.seal()
    rig.sync()
    rig.call(ensure("behind", 9))
    rig.call(calls.next("behind"))
    rig.seal()
    rig.sync()
    rig.crash()
    sink.left = 10
    path = first_file(tmp_path)
    spoil(path, offsets(path)[0] + FRAME.size + 2)
    repaired(tmp_path, sink, rig.journal.producer)
    assert recovered(tmp_path, sink).told == []
    assert Calls.counted(sink.rows) == calls.made
    assert position(sink, rig.journal.producer) == 2


def test_what_the_inspection_says(tmp_path: Path) -> None:
    """Windows, sequences, calls and damage, before and after."""
    _, sink, producer = a_life(tmp_path, 1)
    path = first_file(tmp_path)
    at = offsets(path)[5]
    spoil(path, at + FRAME.size + 2)
    [life] = inspect(tmp_path, {producer: 1}).lives
    assert (life.producer, life.ledger, life.fault) == (producer.hex, 1, "")
    first, second, *rest = life.windows
    assert all(not window.sealed and window.calls == 0 for window in rest)
    assert (first.first, first.last, first.sealed, first.calls) == (1, 4, True, 9)
    assert [(fault.file, fault.offset) for fault in first.damage] == [(str(path), at)]
    assert (second.first, second.last, second.calls, second.pending) == (5, 5, 1, 1)
    assert (first.bytes, second.torn) == (path.stat().st_size, 0)
    repaired(tmp_path, sink, producer)
    [life] = inspect(tmp_path, {producer: 1}).lives
    assert life.damage == []
    assert [window.first for window in life.windows[:2]] == [2, 5]
    recovered(tmp_path, sink)
    [life] = inspect(tmp_path, {producer: position(sink, producer)}).lives
    assert life.pending == 0
