"""What an operator does with a journal's directory: look at it, and apply what is left in it without a tracker."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from tracker_daemon.backlog import Backlog
from tracker_daemon.clock import SystemClock
from tracker_daemon.errors import JournalError
from tracker_daemon.flush_numbers import FlushNumbers
from tracker_daemon.flusher import Flusher
from tracker_daemon.journal.inspection import Fault, LifeReport, Report, WindowReport, files_in, inspect
from tracker_daemon.journal.journal import Journal
from tracker_daemon.journal.lives import life_of
from tracker_daemon.journal.repair import repair
from tracker_daemon.journal.windows import Damage
from tracker_daemon.operations import opened_session, running_conninfo
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.lanes import Lanes
from tracker_daemon.sink import BegunOnStream, LedgerMissing, Opened

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping
    from pathlib import Path

    from tracker_daemon.operations import Table

_RETAIN = 600.0
_HOW_AGAIN = (
    "if you have checked that the database has none of its calls that are still here, as after a restored backup: "
    "--again {} applies all of them"
)


async def look(directory: Path, database: str | None, table: Table) -> Report:
    """Return what stands in *directory*, and with a *database* what of it the ledger does not have; change nothing."""
    _check(directory)
    if database is None:
        return inspect(directory)
    return inspect(directory, await _positions(database, table, files_in(directory)))


def _check(directory: Path) -> None:
    if not directory.is_dir():
        raise JournalError(f"journal {directory}: there is no such directory")


async def _positions(database: str, table: Table, producers: Iterable[UUID]) -> dict[UUID, int | None]:
    """Return where the ledger stands for each producer; `None`: it has no row."""
    found: dict[UUID, int | None] = {}
    async with opened_session(database, table) as session:
        cursor = session.cursor()
        for producer in producers:
            await cursor.execute(session.statements["lanes"], {"producer": producer})
            found[producer] = min((applied for _, _, applied in await cursor.fetchall()), default=None)
    return found


# -- recovery --------------------------------------------------------------------------------------


@dataclass(slots=True)
class Recovered:
    """What became of one life, in calls.

    Attributes:
        producer: whose it is, as in the files' names.
        applied: now, by this command.
        found_applied: by the process itself, or an earlier recovery.
        pending: not applied; `fault` says why.
        left_out: that can be read, and may have been applied or not: damage hides which.
        torn: bytes that no fsync had covered, and that are no record.
        in_ledger: the ledger has a row of it.
        kept: windows that are applied and stay for a while.
        skipped: damage that was passed over.
        aside: the damaged files, under their new names.
    """

    producer: str
    applied: int = 0
    found_applied: int = 0
    pending: int = 0
    left_out: int = 0
    torn: int = 0
    in_ledger: bool = True
    kept: int = 0
    skipped: list[Fault] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)
    fault: str = ""

    def take(self, was: LifeReport, now: LifeReport | None) -> None:
        """Take in what was there before, and what is there now."""
        self.pending = now.pending if now is not None else 0
        self.applied = was.pending - self.pending
        self.found_applied = sum(window.calls for window in was.windows) - was.pending
        if now is not None and self.in_ledger:
            self.kept = sum(1 for window in now.windows if window.pending == 0)
        self.torn = sum(window.torn for window in was.windows) + sum(file.torn for file in was.other)
        self.fault = was.fault


@dataclass(slots=True)
class Recovery:
    """What `recover` did: each life, and the errors."""

    lives: list[Recovered]
    faults: list[str]
    dead_lettered: int


async def recover(
    directory: Path,
    database: str,
    table: Table,
    *,
    skip_damage: bool,
    tell: Callable[[str], object],
    again: Collection[UUID] = (),
) -> Recovery:
    """Apply what is left in *directory*, which no tracker uses, exactly once through the ledger.

    Args:
        directory: where it stands.
        database: where it goes.
        table: of the conversations there.
        skip_damage: write damaged windows anew with what can be read and is certain.
        tell: called with what is done, or holds it up, meanwhile.
        again: producers whose row the ledger does not have: all of theirs is applied, as if none of it had been.

    Raises:
        JournalError: the directory is in use, or is none; or it has nothing of one of *again*, or the ledger has its
            row, or it was begun on a stream.
    """
    _check(directory)
    async with running_conninfo(database) as conninfo:
        journal = Journal(
            directory, sync_interval=0.0, retain=_RETAIN, quota=2**62, max_batch_size=1, create_missing=True
        )
        try:
            journal.adopt(sys.maxsize)
            return await _recover(journal, conninfo, table, skip_damage=skip_damage, tell=tell, again=again)
        finally:
            journal.end()


async def _recover(
    journal: Journal,
    conninfo: str,
    table: Table,
    *,
    skip_damage: bool,
    tell: Callable[[str], object],
    again: Collection[UUID],
) -> Recovery:
    positions = await _positions(conninfo, table, journal.left)
    _check_again(journal, again, positions)
    lives = {producer: Recovered(producer.hex) for producer in journal.left}
    faults = [f"{path} cannot be looked at: {error}" for path, error in journal.not_adopted.items()]
    if skip_damage:
        _repair(journal, lives, positions, faults)
    backlog = Backlog(max_queue_size=1, max_pending=1, max_batch_size=1, create_missing=True, journal=journal)
    sink = Lanes(Connector(conninfo), table)

    def on_error(error: BaseException) -> None:
        if isinstance(error, JournalError):
            faults.append(str(error))
            if isinstance(error.__cause__, LedgerMissing) and not isinstance(error.__cause__, BegunOnStream):
                faults.append(_HOW_AGAIN.format(UUID(error.__cause__.producer).hex))
        else:
            tell(f"{error}; trying again")

    try:
        for producer in again:
            positions[producer] = await _register(journal, producer, sink, tell)
        before = {life.producer: life for life in inspect(journal.base, positions).lives}
        await Flusher(backlog, sink, SystemClock(), FlushNumbers(), on_error, journal).recover()
    finally:
        await sink.aclose(journal.producer, journal.lane, clean=False)  # the ledger's rows stay as they are
    positions = await _positions(conninfo, table, lives)
    after = {life.producer: life for life in inspect(journal.base, positions).lives}
    for producer, life in lives.items():
        life.in_ledger = positions[producer] is not None
        if (was := before.get(producer.hex)) is not None:
            life.take(was, after.get(producer.hex))
    if faults and not skip_damage and any(life.damage for life in after.values()):
        faults.append("to apply what can be read and is certain, and pass over the rest, add --skip-damage")
    order = {name: number for number, name in enumerate(before)}  # the oldest first, as `inspect` has them
    told = sorted(lives.values(), key=lambda life: order.get(life.producer, len(order)))
    return Recovery(told, faults, sum(backlog.books().dead_lettered.values()))


def _repair(
    journal: Journal, lives: Mapping[UUID, Recovered], positions: Mapping[UUID, int | None], faults: list[str]
) -> None:
    for producer, paths in journal.left.items():
        try:
            done = repair(producer, paths, positions[producer] or 0)
        except (Damage, OSError) as error:
            faults.append(f"what {producer.hex} left cannot be repaired: {error}")
        else:
            life = lives[producer]
            life.skipped, life.left_out, life.aside = done.skipped, done.left_out, done.aside
    journal.look_again()


def _check_again(journal: Journal, again: Collection[UUID], positions: Mapping[UUID, int | None]) -> None:
    for producer in again:
        if producer not in journal.left:
            raise JournalError(f"journal {journal.base} has nothing of producer {producer.hex}: see `journal inspect`")
        if (position := positions[producer]) is not None:
            raise JournalError(
                f"the ledger has producer {producer.hex}, at sequence {position}: what it does not have is applied "
                "without --again, exactly once"
            )


async def _register(journal: Journal, producer: UUID, sink: Lanes, tell: Callable[[str], object]) -> int | None:
    """Give a producer a row in the ledger again, right before the first window that is here; return the sequence.

    From then on it is a life like any other: killed at any point, a recovery goes on from there.
    """
    try:
        life = life_of(producer, journal.left[producer])
    except (Damage, OSError):
        return None  # it is not registered, and told with the rest
    if not life.windows:
        return None
    if Opened(life.epoch, 0, life.database).is_of_a_stream:
        raise JournalError(str(BegunOnStream(str(producer), life.lane)))
    after = life.windows[0].first - 1
    await sink.open(producer, life.lane, after=after)
    tell(
        f"life {producer.hex}: registered anew at sequence {after}; all that its {len(life.windows)} windows hold is "
        "applied, as if none of it had been"
    )
    return after


# -- what is printed -------------------------------------------------------------------------------


def as_values(report: Report) -> list[dict[str, Any]]:
    """Return *report* as JSON has it: an object a window; files that are in none stand in one without a sequence."""
    values = []
    for life in report.lives:
        windows = list(life.windows)
        if life.other:
            windows.append(WindowReport(None, None, False, life.other))
        of_life = {name: getattr(life, name) for name in ("producer", "lane", "epoch", "directory", "ledger")}
        of_life["begun_at"] = _instant(life.begun_at).isoformat() if life.begun_at else None
        for window in windows:
            sums = {"bytes": window.bytes, "torn": window.torn}
            damage = [asdict(fault) for fault in window.damage] or None
            values.append({"holder": report.holder, **of_life, **asdict(window), **sums, "damage": damage})
    return values


def faults_of(report: Report) -> list[str]:
    """Return what is damaged, a sentence each."""
    faults = [fault for life in report.lives for fault in life.damage]
    told = [f"{fault.file} is damaged at byte {fault.offset}: {fault.fault}" for fault in faults]
    return told + [life.fault for life in report.lives if life.fault]


def as_lines(report: Report) -> list[str]:
    """Return *report* as a table."""
    state = f"in use by process {report.holder}" if report.holder else "not in use"
    lines = [f"journal {report.directory}: {state}"]
    windows = [window for life in report.lives for window in life.windows]
    if any(window.pending is None for window in windows):
        lines.append("pending is ? because the ledger was not asked: give --database URL")
    if any(_is_applied(window) for window in windows):
        lines.append("what is applied is kept for journal_retain, in case the database forgets it")
    for life in report.lives:
        lines += ["", *_life_lines(life)]
    return lines if report.lives else [*lines, "nothing is left in it"]


def _instant(nanoseconds: int) -> datetime:
    return datetime.fromtimestamp(nanoseconds / 1e9, UTC)


def _is_applied(window: WindowReport) -> bool:
    return window.pending == 0 and window.calls > 0


def _life_lines(life: LifeReport) -> list[str]:
    begun = _instant(life.begun_at).strftime("%Y-%m-%d %H:%M:%SZ") if life.begun_at else "?"
    where = "" if life.ledger is None else f", ledger at {life.ledger}"
    rows: list[tuple[str, ...]] = [("sequences", "state", "files", "bytes", "calls", "pending", "torn")]
    rows += [_row(window) for window in life.windows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  "
        + "  ".join(
            text.ljust(w) if n < 2 else text.rjust(w) for n, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    others = [
        f"  {file.name} does not count: {file.bytes} bytes, torn {file.torn}" for file in life.other if not file.damage
    ]
    head = f"life {life.producer} begun {begun}, epoch {life.epoch}{where}, in {life.directory}"
    return [head, *table, *others]


def _row(window: WindowReport) -> tuple[str, ...]:
    pending = "?" if window.pending is None else str(window.pending)
    last = "" if window.last is None else str(window.last)
    numbers = (len(window.files), window.bytes, window.calls)
    state = "applied" if _is_applied(window) else "sealed" if window.sealed else "open"
    return (
        f"{window.first}-{last}",
        "damaged" if window.damage else state,
        *map(str, numbers),
        pending,
        str(window.torn),
    )


def told_of(recovery: Recovery) -> list[str]:
    """Return what `recover` did, a sentence each."""
    lines = []
    for life in recovery.lives:
        found = "were already in the database" if life.in_ledger else "are noted as applied, the ledger has no row"
        lines.append(f"life {life.producer}: applied {life.applied} calls, {life.found_applied} {found}")
        if life.torn:
            lines.append(
                f"  passed over {life.torn} bytes that no fsync had covered and that are no record: what a loss of "
                "power, or a kill in the middle of a write, leaves"
            )
        if life.pending:
            lines.append(f"  {life.pending} calls are not applied")
    if recovery.dead_lettered:
        lines.append(f"{recovery.dead_lettered} calls became dead letters: see `tracker-daemon dead-letters list`")
    if kept := sum(life.kept for life in recovery.lives):
        lines.append(
            f"{kept} windows that are applied stay there for journal_retain, in case the database forgets them; "
            "the next tracker deletes them then"
        )
    return lines or ["nothing is left to apply"]


def warned_of(recovery: Recovery) -> list[str]:
    """Return what `recover` passed over and left out, a sentence each."""
    lines = []
    for life in recovery.lives:
        lines += [f"passed over {fault.size} bytes at byte {fault.offset} of {fault.file}" for fault in life.skipped]
        if life.left_out:
            lines.append(
                f"left out {life.left_out} calls that can be read: their window was partly applied, and the damage "
                "hides which of them were; it cannot be exact"
            )
        lines += [f"kept {name}" for name in life.aside]
    return lines


def is_done(recovery: Recovery) -> bool:
    """Whether nothing is left to do."""
    return not recovery.faults and not any(life.pending for life in recovery.lives)
