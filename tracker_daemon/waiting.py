"""Calls that wait in a queue, as they were at one instant: for whoever looks in."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from tracker_daemon.generation import TURN

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tracker_daemon.generation import Record

FIELDS: Final = 5


class Waiting:
    """Calls as they were at one instant.

    Args:
        fields: of all of them, one after the other.
    """

    def __init__(self, fields: Sequence[Any] = ()) -> None:
        self._fields = fields

    def __len__(self) -> int:
        return len(self._fields) // FIELDS

    def __iter__(self) -> Iterator[Record]:
        """Yield them one by one, each made in its turn: a whole queue of them would bring the collector about."""
        return zip(*(iter(self._fields),) * FIELDS, strict=True)

    @property
    def threads(self) -> Sequence[str]:
        """The thread of each."""
        return self._fields[::FIELDS]

    @property
    def methods(self) -> Counter[str]:
        """How many there are by method."""
        others = [tokens for tokens in self._fields[2::FIELDS] if type(tokens) is not int]
        return Counter(others) + Counter({TURN: len(self) - len(others)})

    def of(self, thread_id: str) -> list[Record]:
        """Return those of one thread."""
        return [record for record in self if record[0] == thread_id]
