"""The queue of calls in memory: callers put, the worker folds.

The journal has one of the same shape, whose calls are in files.

A call's five fields stand in one list, behind those of the call before. A tuple for each would be something that the
garbage collector has to look at while calls come faster than they are folded, and three times the memory.
"""

from __future__ import annotations

from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Protocol

from tracker_daemon.waiting import FIELDS, Waiting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sized

    from tracker_daemon.generation import Record

# The list is cut when this many fields at least are read, and at least as many as still wait: what is moved then is no
# more than what was read.
_CUT: Final = 5_000


class Calls(Protocol):
    """What the backlog needs of a queue of calls."""

    @property
    def on_disk(self) -> bool:
        """Whether calls go to a file, so that they need no memory until they are folded."""
        ...

    def __len__(self) -> int: ...

    @property
    def put(self) -> Callable[[Record], object]:
        """Take one call, from any thread, without a lock."""
        ...

    def drain(self, fold_all: Callable[[Iterable[Record]], object], limit: int, held: Sized, most: int) -> int:
        """Fold at most *limit* calls, and on a disk no more than until *held* has *most* items; return how many.

        *fold_all* takes the calls one by one: each is taken off when the next one is asked for.
        """
        ...

    def waiting(self) -> Waiting:
        """Return the calls that wait, in order."""
        ...

    @property
    def folding(self) -> Waiting:
        """Return calls that are taken off, and folded, and not counted yet as folded."""
        ...

    @property
    def unfolded(self) -> int:
        """How many calls are not counted yet as folded."""
        ...


class CallQueue:
    """A list of fields; to extend it by a call's is the whole cost of a call here.

    CPython does so in one step, all five or, out of memory, none.
    """

    on_disk = False

    def __init__(self) -> None:
        self._fields: list[Any] = []
        self.put: Callable[[Record], object] = self._fields.extend
        self._following: Any = iter(self._fields)
        """Where it stands the calls begin that are not folded, and nothing else tells: whatever raises, that is so."""
        self._start = 0
        """Where the part under way begins."""
        self._is_folding = False
        self._blank = 0
        """Up to here nothing is left."""

    def __len__(self) -> int:
        taken = self._taken  # looked at first: what is put meanwhile counts
        return max(0, len(self._fields) - taken) // FIELDS

    @property
    def _taken(self) -> int:
        """Where the calls begin that are not folded; amid a fold the last one asked for is not in yet."""
        asked: int = self._following.__reduce__()[2]
        return max(self._start, asked - FIELDS) if self._is_folding else asked

    def drain(
        self,
        fold_all: Callable[[Iterable[Record]], object],
        limit: int,
        held: Sized,  # noqa: ARG002
        most: int,  # noqa: ARG002
    ) -> int:
        """Fold at most *limit* calls; return how many. A call is folded before it is taken off."""
        self._end_part()
        following, self._start = self._following, self._taken
        # Never so far that the iterator meets the end of the list: from there it would not go on.
        number = min(limit, (len(self._fields) - self._start) // FIELDS)
        self._is_folding = True
        try:
            # The tuple is the same one for all of them, filled anew.
            fold_all(islice(zip(*(following,) * FIELDS, strict=False), number))
        except BaseException:
            with suppress(MemoryError):  # else the next one does it
                self._end_part()
                self._let_go()
            raise
        self._is_folding = False
        with suppress(MemoryError):  # the next one lets go of both
            self._let_go()
        return number

    def _end_part(self) -> None:
        """Go back to the call at which a fold has failed."""
        if self._is_folding:
            self._following.__setstate__(self._taken)
            self._is_folding = False

    def _let_go(self) -> None:
        fields, end = self._fields, self._taken
        # In the place of what is read, so that nothing else moves; a part at a time, as they were folded.
        fields[self._blank : end] = [None] * (end - self._blank)
        self._blank = end
        if end >= _CUT and 2 * end >= len(fields):
            del fields[:end]
            # Nothing that can fail in between.
            self._following.__setstate__(0)
            self._blank = 0

    @property
    def folding(self) -> Waiting:
        """Those of the part under way that are taken off: for a finalizer that looks in amid the fold."""
        return Waiting(self._fields[self._start : self._taken] if self._is_folding else ())

    def waiting(self) -> Waiting:
        """Return the calls that wait, in order."""
        return Waiting(self._fields[self._taken :])

    @property
    def unfolded(self) -> int:
        """How many calls are not counted yet as folded."""
        start = self._start if self._is_folding else self._taken
        return (len(self._fields) - start) // FIELDS
