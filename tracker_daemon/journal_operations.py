"""What an operator does with a journal's directory: look at it, and apply what is left in it without a tracker."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tracker_daemon.backlog import Backlog
from tracker_daemon.clock import SystemClock
from tracker_daemon.errors import JournalError
from tracker_daemon.flush_numbers import FlushNumbers
from tracker_daemon.flusher import Flusher
from tracker_daemon.journal.inspection import Fault, LifeReport, Report, WindowReport, files_in, inspect
from tracker_daemon.journal.journal import Journal
from tracker_daemon.journal.repair import repair
from tracker_daemon.journal.windows import Damage
from tracker_daemon.operations import opened_session, running_conninfo
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.sink import PostgresSink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path
    from uuid import UUID

    from tracker_daemon.operations import Table

_RETAIN = 600.0


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
            await cursor.execute(session.statements["position"], {"producer": producer, "lane": 0})
            row = await cursor.fetchone()
            found[producer] = None if row is None else row[1]
    return found


# -- recovery --------------------------------------------------------------------------------------


@dataclass(slots=True)
class Recovered:
    """What became of one life, in calls.

    Attributes:
        producer: whose it is.
        applied: now, by this command.
        found_applied: by the process itself, or an earlier recovery.
        pending: not applied; `fault` says why.
        left_out: that can be read, and may have been applied or not: damage hides which.
        torn: bytes that a loss of power has spoilt.
        skipped: damage that was passed over.
        aside: the damaged files, under their new names.
    """

    producer: str
    applied: int = 0
    found_applied: int = 0
    pending: int = 0
    left_out: int = 0
    torn: int = 0
    skipped: list[Fault] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)
    fault: str = ""


@dataclass(slots=True)
class Recovery:
    """What `recover` did: each life, and the errors."""

    lives: list[Recovered]
    faults: list[str]
    dead_lettered: int


async def recover(
    directory: Path, database: str, table: Table, *, skip_damage: bool, tell: Callable[[str], object]
) -> Recovery:
    """Apply what is left in *directory*, which no tracker uses, exactly once through the ledger.

    With *skip_damage* damaged windows are written anew with what can be read and is certain. *tell* is called with
    what holds it up meanwhile.

    Raises:
        JournalError: the directory is in use, or is none.
    """
    _check(directory)
    async with running_conninfo(database) as conninfo:
        journal = Journal(
            directory, sync_interval=0.0, retain=_RETAIN, quota=2**62, max_batch_size=1, create_missing=True
        )
        try:
            journal.adopt()
            return await _recover(journal, conninfo, table, skip_damage=skip_damage, tell=tell)
        finally:
            journal.end()


async def _recover(
    journal: Journal, conninfo: str, table: Table, *, skip_damage: bool, tell: Callable[[str], object]
) -> Recovery:
    positions = await _positions(conninfo, table, journal.left)
    lives = {producer: Recovered(str(producer)) for producer in journal.left}
    faults: list[str] = []
    if skip_damage:
        for producer, paths in journal.left.items():
            try:
                done = repair(producer, paths, positions[producer] or 0)
            except (Damage, OSError) as error:
                faults.append(f"what {producer} left cannot be repaired: {error}")
            else:
                life = lives[producer]
                life.skipped, life.left_out, life.aside = done.skipped, done.left_out, done.aside
        journal.look_again()
    before = {life.producer: life for life in inspect(journal.base, positions).lives}
    backlog = Backlog(max_queue_size=1, max_pending=1, max_batch_size=1, create_missing=True, journal=journal)
    sink = PostgresSink(Connector(conninfo), table)

    def on_error(error: BaseException) -> None:
        if isinstance(error, JournalError):
            faults.append(str(error))
        else:
            tell(f"{error}; trying again")

    try:
        await Flusher(backlog, sink, SystemClock(), FlushNumbers(), on_error, journal).recover()
    finally:
        await sink.aclose(journal.producer, journal.lane, clean=False)  # the ledger's rows stay as they are
    after = {life.producer: life for life in inspect(journal.base, await _positions(conninfo, table, lives)).lives}
    for producer, life in lives.items():
        if (was := before.get(producer.hex)) is not None:
            now = after.get(producer.hex)
            life.pending = now.pending if now is not None else 0
            life.applied = was.pending - life.pending
            life.found_applied = sum(window.calls for window in was.windows) - was.pending
            life.torn = sum(window.torn for window in was.windows) + sum(file.torn for file in was.other)
            life.fault = was.fault
    if faults and not skip_damage and any(life.damage for life in after.values()):
        faults.append("to apply what can be read and is certain, and pass over the rest, add --skip-damage")
    return Recovery(list(lives.values()), faults, sum(backlog.books().dead_lettered.values()))


# -- what is printed -------------------------------------------------------------------------------


def as_values(report: Report) -> list[dict[str, Any]]:
    """Return *report* as JSON has it: an object a window; files that are in none stand in one without a sequence."""
    values = []
    for life in report.lives:
        windows = list(life.windows)
        if life.other:
            windows.append(WindowReport(None, None, False, life.other))
        of_life = {
            name: getattr(life, name) for name in ("producer", "lane", "epoch", "begun_at", "directory", "ledger")
        }
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
    for life in report.lives:
        lines += ["", *_life_lines(life)]
    return lines if report.lives else [*lines, "nothing is left in it"]


def _life_lines(life: LifeReport) -> list[str]:
    begun = datetime.fromtimestamp(life.begun_at / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%SZ") if life.begun_at else "?"
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
    return (
        f"{window.first}-{last}",
        "damaged" if window.damage else "sealed" if window.sealed else "open",
        *map(str, numbers),
        pending,
        str(window.torn),
    )


def told_of(recovery: Recovery) -> list[str]:
    """Return what `recover` did, a sentence each."""
    lines = []
    for life in recovery.lives:
        lines.append(f"life {life.producer}: applied {life.applied} calls, found {life.found_applied} applied")
        if life.torn:
            lines.append(f"  {life.torn} bytes were torn: calls in the middle of which the power went")
        if life.pending:
            lines.append(f"  {life.pending} calls are not applied")
    if recovery.dead_lettered:
        lines.append(f"{recovery.dead_lettered} calls became dead letters: see `tracker-daemon dead-letters list`")
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
