"""What stands in a journal's directory, in plain values, for an operator to read.

Rules:
1. Nothing is written, locked or mapped: a tracker may be at work in the directory. What it renames or removes meanwhile
   is looked for once more, and then left out.
2. Nothing stops the look: a file that cannot be read is told with its fault.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tracker_daemon.errors import JournalError
from tracker_daemon.generation import Generation
from tracker_daemon.journal.lives import Life, life_of
from tracker_daemon.journal.records import Blank, Sum
from tracker_daemon.journal.windows import SEALED, Damage, Lost, Window, pieces, producer_of, take, written

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from uuid import UUID

_LOOKS: Final = 5
_LOCKS: Final = Path("/proc/locks")


@dataclass(slots=True)
class Fault:
    """Bytes of a file that were on the disk and are no record."""

    file: str
    offset: int
    size: int
    fault: str


@dataclass(slots=True)
class FileReport:
    """One file.

    Attributes:
        name, bytes: of the file.
        calls: that can be read.
        torn: bytes that a loss of power, or the end of a process in the middle of a write, has spoilt.
        damage: bytes that were whole once.
        counts: `False`: it was never on the disk, or one written anew has taken its place.
    """

    name: str
    bytes: int
    calls: int = 0
    torn: int = 0
    damage: list[Fault] = field(default_factory=list)
    counts: bool = True


@dataclass(slots=True)
class WindowReport:
    """One window.

    Attributes:
        first, last: the sequences of its batches; `last` is `None` where only reading it tells, `first` where it is no
            window, but files that are in none.
        sealed: it takes no more calls.
        calls: that can be read.
        pending: of these, the ones that the ledger does not have; `None`: the ledger was not asked.
    """

    first: int | None
    last: int | None
    sealed: bool
    files: list[FileReport]
    calls: int = 0
    pending: int | None = None

    @property
    def bytes(self) -> int:
        """What its files take."""
        return sum(file.bytes for file in self.files)

    @property
    def torn(self) -> int:
        """Torn bytes in all its files."""
        return sum(file.torn for file in self.files)

    @property
    def damage(self) -> list[Fault]:
        """What is damaged in its files."""
        return [fault for file in self.files for fault in file.damage]


@dataclass(slots=True)
class LifeReport:
    """What one process has written.

    Attributes:
        producer, lane, epoch: its identity; epoch 0: it may never have reached the database.
        begun_at: nanoseconds since 1970.
        directory: where its files are.
        windows: in order.
        other: files that do not count, or whose header cannot be read.
        fault: why its windows cannot be told apart, if so.
        ledger: the sequence that the ledger has applied; `None`: not asked, or it has no row.
    """

    producer: str
    lane: int
    epoch: int
    begun_at: int
    directory: str
    windows: list[WindowReport]
    other: list[FileReport]
    fault: str = ""
    ledger: int | None = None

    @property
    def damage(self) -> list[Fault]:
        """What is damaged in all its files."""
        windows = [fault for window in self.windows for fault in window.damage]
        return windows + [fault for file in self.other for fault in file.damage]

    @property
    def pending(self) -> int:
        """Calls that the ledger does not have."""
        return sum(window.pending or 0 for window in self.windows)


@dataclass(slots=True)
class Report:
    """A journal's directory.

    Attributes:
        directory: where it is.
        holder: who has it, by the number in its lock; "" for nobody.
        lives: the oldest first.
    """

    directory: str
    holder: str
    lives: list[LifeReport]


def inspect(directory: Path, ledger: Mapping[UUID, int | None] | None = None) -> Report:
    """Return what stands in *directory* and in the places of a fork's children below it.

    Args:
        directory: a journal's.
        ledger: of each producer the sequence that is applied, or `None` without a row; `None`: it was not asked.

    Raises:
        JournalError: there is no such directory, or it cannot be read.
    """
    try:
        lives = [_life(producer, paths, ledger) for producer, paths in files_in(directory).items()]
    except OSError as error:
        raise JournalError(f"journal {directory} cannot be read: {error}") from error
    return Report(str(directory), holder_of(directory), sorted(lives, key=lambda life: life.begun_at))


def files_in(directory: Path) -> dict[UUID, list[Path]]:
    """Return the journal's files by producer.

    Raises:
        OSError: the directory cannot be read.
    """
    found: dict[UUID, list[Path]] = {}
    for place in (directory, *sorted((directory / "forks").glob("*"))):
        for path in sorted(place.iterdir()) if place.is_dir() or place == directory else ():
            if (producer := producer_of(path.name)) is not None:
                found.setdefault(producer, []).append(path)
    return found


def holder_of(directory: Path) -> str:
    """Return the process that holds the directory's lock, "" for nobody. Takes no lock: a tracker may be starting."""
    lock = directory / "lock"
    with suppress(OSError):
        inode = str(lock.stat().st_ino)
        if any(
            line.split()[5].rpartition(":")[2] == inode for line in _LOCKS.read_text().splitlines() if "FLOCK" in line
        ):
            text = lock.read_text(encoding="ascii", errors="replace")
            return text.partition("\n")[0].strip() or "(unknown)"
    return ""


def readable(paths: list[Path]) -> tuple[list[Path], list[FileReport]]:
    """Return the files whose header can be read, or is blank; and of the others what is wrong with them."""
    good, bad = [], []
    for path in paths:
        try:
            written(path, copy=True).close()
        except Blank:
            good.append(path)
        except Damage as damage:
            size = path.stat().st_size
            bad.append(FileReport(path.name, size, damage=[Fault(str(path), damage.offset, size, damage.fault)]))
        else:
            good.append(path)
    return good, bad


def _life(producer: UUID, paths: list[Path], ledger: Mapping[UUID, int | None] | None) -> LifeReport:
    directory = paths[0].parent
    for look in range(_LOOKS):
        try:
            good, bad = readable(paths)
            life = life_of(producer, good, copy=True)
            applied = None if ledger is None else ledger.get(producer)
            return _report(life, directory, bad, None if ledger is None else applied or 0, applied)
        except FileNotFoundError:  # renamed or removed meanwhile
            paths = [path for path in sorted(directory.iterdir()) if producer_of(path.name) == producer]
            if look == _LOOKS - 1:
                break
        except Damage as damage:
            other = [file_report(path) for path in good]
            return LifeReport(producer.hex, 0, 0, 0, str(directory), [], [*other, *bad], fault=str(damage))
    return LifeReport(producer.hex, 0, 0, 0, str(directory), [], [], fault="its files change while they are looked at")


def _report(life: Life, directory: Path, bad: list[FileReport], position: int | None, ledger: int | None) -> LifeReport:
    # Without a row what is noted as applied may have been collected; with one the ledger decides.
    noted = ledger is None
    windows = [
        _window(window, last, position, done=noted and bool(window.applied_at)) for window, last in with_last(life)
    ]
    other = [file_report(path, counts=False) for path in life.leftover]
    begun_at = life.begun_at if life.windows else 0
    return LifeReport(
        life.producer.hex, life.lane, life.epoch, begun_at, str(directory), windows, [*other, *bad], ledger=ledger
    )


def with_last(life: Life) -> Iterator[tuple[Window, int | None]]:
    """Yield the windows of a life, each with the sequence of its last batch, where that is known without reading it."""
    for number, window in enumerate(life.windows):
        following = life.windows[number + 1].first if number + 1 < len(life.windows) else None
        yield window, window.last if window.last is not None else following and following - 1


def _window(window: Window, last: int | None, position: int | None, *, done: bool) -> WindowReport:
    files = [file_report(path) for path in window.paths]
    sealed = all(SEALED.fullmatch(path.name) for path in window.paths)
    report = WindowReport(window.first, last, sealed, files, sum(file.calls for file in files))
    if position is not None:
        report.pending = 0 if done else _pending(window, last, position, report.calls)
    return report


def _pending(window: Window, last: int | None, position: int, calls: int) -> int:
    if last is not None and last <= position:
        return 0
    if window.first > position:
        return calls
    batches = enumerate(generation_of(window).batches(window.max_batch_size), window.first)
    return sum(delta.calls for sequence, deltas in batches if sequence > position for delta in deltas)


def generation_of(window: Window) -> Generation:
    """Return what can be read of a window, damage or not, without a map."""
    generation = Generation(create_missing=window.create_missing)
    for path in window.paths:
        for piece in pieces(written(path, copy=True)):
            if isinstance(piece, tuple | Sum):
                take(generation, piece)
    return generation


def file_report(path: Path, *, counts: bool = True) -> FileReport:
    """Return what is in one file.

    Raises:
        FileNotFoundError: it is gone.
    """
    report = FileReport(path.name, path.stat().st_size, counts=counts)
    try:
        file = written(path, copy=True)
    except Blank:
        report.torn = len(path.read_bytes().rstrip(b"\0"))
        return report
    for piece in pieces(file):
        if isinstance(piece, Sum):
            report.calls += piece.delta.calls
        elif isinstance(piece, tuple):
            report.calls += 1
        elif isinstance(piece, Lost) and piece.synced:
            report.damage.append(Fault(str(path), piece.offset, piece.size, piece.fault))
        elif isinstance(piece, Lost):
            report.torn += piece.size
    return report
