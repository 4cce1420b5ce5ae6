"""Applying what a journal holds, by hand: a tracker that takes no calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client.registry import CollectorRegistry

from tracker_daemon.errors import FlushTimeout, JournalError
from tracker_daemon.settings import quoted
from tracker_daemon.tracker import Tracker

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Recovered:
    """What became of a journal.

    Attributes:
        calls: applied, or found applied.
        torn: bytes of torn records.
        skipped: damage that was passed over, a sentence each.
        problems: what stays there, and why.
    """

    calls: int
    torn: int
    skipped: list[str]
    problems: list[str]


def recover(
    directory: Path,
    database: str,
    *,
    table: tuple[str | None, str],
    create_missing: bool = True,
    skip_damage: bool = False,
    timeout: float = 600.0,
) -> Recovered:
    """Apply what is left in *directory* through the ledger.

    Raises:
        JournalError: there is no such directory, or another process uses it.
    """
    if not directory.is_dir():
        raise JournalError(f"{directory} is no directory")
    errors: list[BaseException] = []
    tracker = Tracker(
        database,
        journal=directory,
        table=quoted(table),
        create_missing=create_missing,
        registry=CollectorRegistry(),
        on_error=errors.append,
    )
    journal = tracker.journal
    assert journal is not None
    journal.skip_damage = skip_damage
    problems: list[str] = []
    with tracker:
        try:
            tracker.flush(timeout)
        except FlushTimeout as error:
            problems.append(str(error))
    problems += [str(error) for error in errors if isinstance(error, JournalError)]
    return Recovered(journal.recovered, journal.torn, list(journal.skipped), problems)
