"""Passing over damage, when an operator asks for it: a damaged window is written anew with what is certain.

Rules:
1. Nothing is applied here, and nothing twice later: what of a half applied window may have been applied is left out.
2. The new file is whole and on the disk, and so takes the place of the old ones, before they are renamed `….damaged`.
   Killed at any point, it is done again the next time.

A window's batches are cut in the order in which its threads first appear. Of a window of which *k* batches of *s*
threads are applied the first k·s threads are known if they appear before the first damage: then every other call that
can be read is certain not to be applied. Else a thread that appears behind the damage may be on either side.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Final

from tracker_daemon.delta import calls_of
from tracker_daemon.generation import Generation
from tracker_daemon.journal.inspection import Fault, FileReport, readable, with_last
from tracker_daemon.journal.lives import Life, life_of
from tracker_daemon.journal.records import (
    FIRST_AT,
    HEADER_SIZE,
    SYNCED_AT,
    WORD,
    End,
    Header,
    Sum,
    encode_mark,
    encode_sum,
    word,
)
from tracker_daemon.journal.windows import SEALED, Damage, Lost, Window, pieces, sealed_name, take, written

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from uuid import UUID


_NEW: Final = ".new"
_ASIDE: Final = ".damaged"


@dataclass(slots=True)
class Repaired:
    """What was done for one life.

    Attributes:
        skipped: what was passed over.
        left_out: calls that can be read and were left out, because they may have been applied.
        aside: the names that the damaged files have now.
    """

    skipped: list[Fault] = field(default_factory=list)
    left_out: int = 0
    aside: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Found:
    """A damaged window: what can be read, and how many of its threads appear before the first damage."""

    generation: Generation
    known: int | None = None
    faults: list[Fault] = field(default_factory=list)


def repair(producer: UUID, paths: list[Path], applied: int) -> Repaired:
    """Write the damaged windows of one life anew. The directory's lock is held.

    Args:
        producer: whose life it is.
        paths: its files.
        applied: the sequence that the ledger has applied; 0 for none.

    Raises:
        Damage: what is damaged hides which batches the next window holds.
        OSError: a file cannot be read or written.
    """
    done = Repaired()
    for path in {path for each in paths for path in each.parent.glob(f"{producer.hex}-*{_NEW}")}:
        path.unlink()  # of a repair that was killed
    good, bad = readable(paths)
    hidden = [path for path in paths if path not in good]
    life = _life(producer, good, hidden, bad)
    number = max([_number(path) for path in good], default=0) + len(hidden)
    for window, last in with_last(life):
        found = _read(window)
        missing = [path for path in hidden if _may_belong(path, window)]
        if missing:
            found.known = 0
        if found.known is None or (last is not None and last <= applied):
            continue
        number += 1
        done.skipped += found.faults
        done.left_out += _write_anew(life, window, last, found, applied, number, done)
    for path, report in zip(hidden, bad, strict=True):
        done.skipped += report.damage
        _set_aside(path, done)
    for directory in {path.parent for path in paths}:
        _sync(directory)
    return done


def _life(producer: UUID, good: list[Path], hidden: list[Path], bad: list[FileReport]) -> Life:
    """Return the life in *good*; what is there under another's name, or has lost its header, goes to the other two."""
    while True:
        try:
            return life_of(producer, good, copy=True)
        except Damage as damage:
            if damage.path not in good or damage.offset:
                raise  # not of the file as a whole
            path, size = damage.path, damage.path.stat().st_size
            good.remove(path)
            hidden.append(path)
            bad.append(FileReport(path.name, size, damage=[Fault(str(path), 0, size, damage.fault)]))


def _header(path: Path) -> Header | None:
    try:
        return written(path, copy=True).header
    except (ValueError, Damage):
        return None


def _number(path: Path) -> int:
    header = _header(path)
    return 0 if header is None else header.number


def _may_belong(path: Path, window: Window) -> bool:
    """Whether a file that is set aside may be of *window*.

    By its header, if that can be read; else by the sequence in its name, or both not sealed. A copy is none of it.
    """
    whole = SEALED.fullmatch(window.paths[0].name)
    if whole is not None and int(whole[3]) == _number(window.paths[0]):
        return False  # written anew once it was sealed: all that counts of it is there
    if (header := _header(path)) is not None:
        others = [other for file in window.paths if (other := _header(file)) is not None]
        same = any((other.producer, other.window) == (header.producer, header.window) for other in others)
        return same and header.number not in {other.number for other in others}
    name = SEALED.fullmatch(path.name)
    if name is None:
        return any(SEALED.fullmatch(other.name) is None for other in window.paths)
    return int(name[2]) == window.first


def _read(window: Window) -> _Found:
    found = _Found(Generation(create_missing=window.create_missing))
    for path in window.paths:
        for piece in pieces(written(path, copy=True)):
            if isinstance(piece, tuple | Sum):
                take(found.generation, piece)
            elif isinstance(piece, Lost) and piece.synced:
                found.faults.append(Fault(str(path), piece.offset, piece.size, piece.fault))
                if found.known is None:
                    found.known = len(found.generation.deltas)
    return found


def _write_anew(
    life: Life, window: Window, last: int | None, found: _Found, applied: int, number: int, done: Repaired
) -> int:
    """Write what is certain, with the sequences that are not applied; return how many calls are left out."""
    size = window.max_batch_size
    batches = max(0, applied - window.first + 1)
    rest = Generation(create_missing=window.create_missing)
    left_out = 0
    assert found.known is not None
    if batches * size <= found.known:
        rest.deltas = dict(islice(found.generation.deltas.items(), batches * size, None))
        rest.followers = found.generation.followers
    else:
        behind = islice(found.generation.deltas.values(), found.known, None)
        left_out = sum(map(calls_of, (*behind, *found.generation.followers.values())))
    first = window.first + batches
    if last is not None and len(list(rest.batches(size))) > last - first + 1:
        rest, size = _in_one(rest)
    header = written(window.paths[0], copy=True).header
    anew = Header(
        life.producer,
        life.lane,
        life.epoch,
        life.database,
        number,
        header.window,
        True,
        size,
        window.create_missing,
        life.begun_at,
    )
    path = window.paths[0].parent / (sealed_name(life.producer, first, number) + _NEW)
    _write(path, anew, first, rest, size)
    path.rename(path.with_suffix(""))
    _sync(path.parent)
    for old in window.paths:
        _set_aside(old, done)
    return left_out


def _in_one(rest: Generation) -> tuple[Generation, int]:
    """Return *rest* as one batch: without what is lost it falls into more batches than it had."""
    one = Generation(create_missing=rest.create_missing)
    for delta in rest.all():
        before = next(one.of(delta.thread_id), None)
        one.put(delta if before is None else before.merge(delta), late=False)
    return one, max(1, len(one.deltas))


def _write(path: Path, header: Header, first: int, rest: Generation, size: int) -> None:
    data = bytearray(header.encode().ljust(HEADER_SIZE, b"\0"))
    for delta, late in rest.sums():
        data += encode_sum(delta, late=late)
    data += encode_mark(End(first, _count(rest.batches(size)), rest.calls))
    WORD.pack_into(data, FIRST_AT, word(first))
    WORD.pack_into(data, SYNCED_AT, word(len(data)))
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    _sync(path.parent)


def _count(batches: Iterable[object]) -> int:
    return sum(1 for _ in batches)


def _set_aside(path: Path, done: Repaired) -> None:
    aside = path.with_name(path.name + _ASIDE)
    path.rename(aside)
    done.aside.append(str(aside))


def _sync(directory: Path) -> None:
    file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
