"""What stands in a journal's directory, without touching it: also while a tracker uses it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tracker_daemon.errors import JournalError
from tracker_daemon.journal.records import Sum
from tracker_daemon.journal.windows import Damage, life_of, producer_of

if TYPE_CHECKING:
    from pathlib import Path
    from uuid import UUID

    from tracker_daemon.journal.windows import Life, Window


@dataclass(frozen=True, slots=True)
class Seen:
    """One window, or one life that cannot be read.

    Attributes:
        producer: whose it is.
        first, last: the sequences of its batches; `last` is `None` where only applying it tells.
        sealed: whether its name says so; else it was open when the process ended, or is now.
        files, size: how many, and their bytes.
        calls: that can be read.
        torn: bytes at the end of what was written that are no record.
        damage: where it is not whole, or `None`.
    """

    producer: str
    first: int
    last: int | None
    sealed: bool
    files: list[str]
    size: int
    calls: int
    torn: int
    damage: str | None

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


def inspect(directory: Path) -> list[Seen]:
    """Return every window in *directory* and in the places of its forks, the oldest life first.

    Raises:
        JournalError: there is no such directory.
    """
    if not directory.is_dir():
        raise JournalError(f"{directory} is no directory")
    by_producer: dict[UUID, list[Path]] = {}
    for path in [*directory.glob("*.journal"), *directory.glob("forks/*/*.journal")]:
        if (producer := producer_of(path.name)) is not None:
            by_producer.setdefault(producer, []).append(path)
    found: list[tuple[int, list[Seen]]] = []
    for producer, paths in by_producer.items():
        try:
            life = life_of(producer, paths)
            found.append((life.begun_at, [_seen(life, window) for window in life.windows]))
        except FileNotFoundError:
            continue  # applied and deleted meanwhile
        except (Damage, OSError) as error:
            names = [path.name for path in paths]
            size = sum(path.stat().st_size for path in paths if path.exists())
            found.append((0, [Seen(str(producer), 0, None, False, names, size, 0, 0, str(error))]))
    return [seen for _, windows in sorted(found, key=lambda pair: pair[0]) for seen in windows]


def _seen(life: Life, window: Window) -> Seen:
    calls, damage = 0, None
    try:
        for item in window.read():
            calls += item.delta.calls if isinstance(item, Sum) else 1
    except Damage as error:
        damage = str(error)
    return Seen(
        producer=str(life.producer),
        first=window.first,
        last=window.last,
        sealed="-open-" not in window.paths[0].name,
        files=[path.name for path in window.paths],
        size=sum(path.stat().st_size for path in window.paths),
        calls=calls,
        torn=window.torn,
        damage=damage,
    )
