"""Which partitions are for whom: each consumer's share, and what nobody reads."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from uuid import UUID

_LONG: Final = 3


class Free:
    """The partitions that nobody reads."""

    def __init__(self) -> None:
        self._looks: Counter[int] = Counter()

    def see(self, free: tuple[int, ...]) -> None:
        """Count how often each partition was seen free, without a break."""
        self._looks = Counter({number: self._looks[number] + 1 for number in free})

    def for_long(self, number: int) -> bool:
        """Whether a partition was seen free so often that whoever sees it takes it, share or not."""
        return self._looks[number] >= _LONG


def share_of(name: UUID, members: tuple[UUID, ...], partitions: int) -> int:
    """Return how many of the *partitions* are for *name*: all shares together are all of them."""
    if name not in members:
        return 0
    each, more = divmod(partitions, len(members))
    return each + (members.index(name) < more)
