"""`tracker_journal_errors_total{op}`: each child counts what its name says."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.journal.forgetful import ForgetfulSink
from tests.journal.rig import Calls, Rig, small_files
from tests.model.manual_clock import Driven
from tracker_daemon import MemorySink
from tracker_daemon.errors import JournalError
from tracker_daemon.journal.directory import OPERATIONS, NotSynced, operation_of
from tracker_daemon.journal.windows import Damage, Window
from tracker_daemon.sink import LedgerMissing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tracker_daemon.generation import Record
    from tracker_daemon.journal.records import Sum


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_files(monkeypatch)


def left(directory: Path) -> Path:
    """Leave a file with a call that is on the disk; return it."""
    rig = Rig(directory, MemorySink())
    rig.call(Calls().next("t0"))
    rig.seal()
    rig.sync()
    rig.crash()
    return next(path for path in directory.glob("*.journal") if "open" not in path.name)


def counted(directory: Path) -> dict[str, int]:
    """Return what a recovery counts."""
    rig = Rig(directory, MemorySink())
    rig.recover()
    rig.end()
    assert len(rig.told) == 1
    return dict(rig.journal.errors)


def test_a_damaged_record(tmp_path: Path) -> None:
    """Damage is no failed read."""
    path = left(tmp_path)
    data = bytearray(path.read_bytes())
    data[150] ^= 1
    path.write_bytes(data)
    assert counted(tmp_path) == {"damage": 1}


def test_a_damaged_header(tmp_path: Path) -> None:
    """Nor is it in a header, where the life's windows cannot even be told apart."""
    path = left(tmp_path)
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    assert counted(tmp_path) == {"damage": 1}


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk does not give it."""
    left(tmp_path)

    def broken(path: Path, **_: object) -> Any:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr("tracker_daemon.journal.windows.Written", broken)
    assert counted(tmp_path) == {"read": 1}


def test_a_file_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read well, and not applied: the fsync is at fault, for the file and for what is not applied by it."""
    left(tmp_path)

    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.fdatasync", broken)
    found = counted(tmp_path)
    assert set(found) == {"fsync"}


def test_a_directory_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The places of a fork's children."""
    rig = Rig(tmp_path, MemorySink())

    def broken(path: Path) -> Any:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(os, "listdir", broken)
    rig.journal.adopt()
    assert rig.journal.errors == {"list": 1}
    rig.crash()


def test_a_kept_window_that_is_damaged(tmp_path: Path) -> None:
    """What is applied again is found damaged."""
    sink, calls = ForgetfulSink(at=4, back_to=1), Calls()
    rig = Rig(tmp_path, sink)
    for number in range(4):
        rig.call(calls.next("t0"))
        rig.seal()
        rig.sync()
        if number == 3:
            [path] = tmp_path.glob("*-0000000000000002-0000.journal")
            data = bytearray(path.read_bytes())
            data[150] ^= 1
            path.write_bytes(data)
        rig.flush()
    assert set(rig.journal.errors) == {"damage"}
    rig.crash()


@pytest.mark.parametrize(
    ("error", "operation"),
    [(Damage(Path("x"), 3, "bad"), "damage"), (OSError(errno.EIO, "Input/output error"), "read")],
)
def test_a_spilled_window(error: Exception, operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of this process that waits in files alone."""
    rig, calls = Rig(tmp_path, MemorySink()), Calls()
    for thread_id in ("t0", "t1"):
        rig.call(calls.next(thread_id))
        rig.seal()

    def broken(_: Window) -> Iterator[Record | Sum]:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Window, "read", broken)
        work = Driven(rig.flusher.flush())
        assert work.at == "wait"
        assert rig.journal.errors == {operation: 1}
    work.resume()
    while work.at is not None:
        work.resume()
    assert rig.backlog.is_empty
    rig.crash()


def test_every_operation_is_a_child() -> None:
    """Whatever may be counted is there from the first scrape."""
    errors = [
        Damage(Path("x"), 0, ""),
        NotSynced(5, ""),
        OSError(5, ""),
        LedgerMissing("p", 0),
        JournalError("a life whose header is damaged"),
    ]
    assert [operation_of(error) for error in errors] == ["damage", "fsync", "read", "ledger", "ledger"]
    assert {operation_of(error) for error in errors} <= set(OPERATIONS)
