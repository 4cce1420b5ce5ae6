"""The queue of calls in memory: callers append, the worker folds.

The journal has one of the same shape, whose calls are in files.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from itertools import chain, compress, islice, repeat, starmap
from operator import length_hint
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sized

    from tracker_daemon.generation import Record


class Calls(Protocol):
    """What the backlog needs of a queue of calls."""

    @property
    def on_disk(self) -> bool:
        """Whether calls go to a file, so that they need no memory until they are folded."""
        ...

    def __len__(self) -> int: ...

    def append(self, record: Record, /) -> None:
        """Take one call, from any thread, without a lock."""
        ...

    def drain(self, fold_all: Callable[[Iterable[Record]], object], limit: int, held: Sized, most: int) -> int:
        """Fold at most *limit* calls, and on a disk no more than until *held* has *most* items; return how many.

        *fold_all* takes the calls one by one: each is taken off when the next one is asked for.
        """
        ...

    def waiting(self) -> Collection[Record]:
        """Return the calls that wait, in order."""
        ...

    @property
    def folding(self) -> Collection[Record]:
        """Return calls that are taken off, and folded, and not counted yet as folded."""
        ...


class CallQueue(deque["Record"]):
    """A deque; `append` is the whole cost of a call here."""

    on_disk = False
    _part: tuple[list[Record], Iterator[Record]] | None = None

    def drain(
        self,
        fold_all: Callable[[Iterable[Record]], object],
        limit: int,
        held: Sized,  # noqa: ARG002
        most: int,  # noqa: ARG002
    ) -> int:
        """Fold at most *limit* calls; return how many. A call is folded before it is taken off."""
        part = self._first(limit)
        following = iter(part)
        self._part = part, following
        try:
            # With each record but the first the one before is taken off (and is true, as what lets this one through).
            # In Python it would cost a third of what the folding itself does.
            fold_all(compress(following, chain((True,), starmap(self.popleft, repeat(())))))
            if part:
                self.popleft()
        finally:
            self._part = None
        return len(part)

    @property
    def folding(self) -> list[Record]:
        """Those of the part under way that are taken off: for a finalizer that looks in amid the fold."""
        if self._part is None:
            return []
        part, following = self._part
        return part[: max(0, len(part) - length_hint(following) - 1)]

    def _first(self, limit: int) -> list[Record]:
        """Return the calls at the head, which stay."""
        while True:
            with suppress(RuntimeError):  # somebody appended between the iterator's making and its end: once more
                return list(islice(self, limit))

    def waiting(self) -> deque[Record]:
        """Return the calls that wait, in order."""
        return self.copy()
