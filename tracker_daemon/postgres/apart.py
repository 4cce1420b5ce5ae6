"""Bad rows of a batch: found and set aside in the transaction at hand, so that the rest commits.

Rules:
1. Rows go in the order in which they are given, the order of the locks, and each ends merged or set aside.
2. A part that is refused is halved: one bad row among n costs about 2·log2(n) statements.
3. Where more than one row in 32 is refused, halving finds nothing: the rows that follow go one by one, in the server,
   a hundred in a statement, until more go through. So n bad rows cost about n/100 statements, and few lines in its log.
4. What the server cannot tell for certain (an error of a class that is not about rows alone, as a trigger may
   raise it) goes one by one from here.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final, Protocol

from tracker_daemon.postgres import encoding, faults
from tracker_daemon.sink import DeadLetter

if TYPE_CHECKING:
    from tracker_daemon.batch import Batch
    from tracker_daemon.delta import ThreadDelta
    from tracker_daemon.postgres.session import Session

_DENSITY: Final = 31
"""Rows that must go through for each refused one, or the next go one by one."""
_ENOUGH: Final = 8 * _DENSITY  # eight refused in a row
_MOST: Final = 2 * _ENOUGH
_BLOCK: Final = 100  # a row may take 0.3 s before the statement's deadline of 30 s is reached
_DATA_OR_DOUBT: Final = ("data", *faults.IN_DOUBT)


class Merge(Protocol):
    """Merges deltas under the savepoint `part`; returns the rows sent and written."""

    async def __call__(self, session: Session, batch: Batch, deltas: list[ThreadDelta], /) -> tuple[int, int]:
        """Do it; after an exception the savepoint stands."""
        ...


class Apart:
    """Merges the deltas of one batch apart from each other.

    Args:
        session: in a transaction, with constraints immediate.
        batch: whose deltas they are.
        timeout: seconds for one statement and what belongs to it.
        doubts: see `faults.may_be_of_a_row`.
        merge: merges some deltas at once.

    Attributes:
        sent, merged: rows sent and written.
        dead: what stands alone and is refused.
    """

    def __init__(
        self, session: Session, batch: Batch, timeout: float, doubts: list[Exception] | None, merge: Merge
    ) -> None:
        self._session, self._batch, self._timeout, self._doubts, self._merge = session, batch, timeout, doubts, merge
        self.sent = self.merged = 0
        self.dead: list[DeadLetter] = []
        self._badness = 0
        self._in_server = True

    async def run(self, deltas: list[ThreadDelta]) -> None:
        """Merge what can be."""
        parts = [deltas]
        while parts:
            part = parts.pop()
            if len(part) > 1 and self._badness >= _ENOUGH:
                at_once = _BLOCK if self._in_server else 1
                parts += [rest] if (rest := part[at_once:]) else []
                part = part[:at_once]
                if self._in_server and await self._merge_in_server(part):
                    continue
                if len(part) > 1:
                    parts.append(part)  # one by one from here
                    continue
            if not await self._merge_whole(part):
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]

    async def _merge_whole(self, part: list[ThreadDelta]) -> bool:
        """Merge *part*, or set it aside if it is one row; say `False` if it must be halved."""
        try:
            with self._session.deadline(self._timeout):
                sent, merged = await self._merge(self._session, self._batch, part)
        except Exception as error:
            if not faults.may_be_of_a_row(error, self._session.connection, self._doubts):
                raise
            await self._roll_back()
            if len(part) > 1:
                return False
            self._set_aside(part[0], getattr(error, "sqlstate", None) or "", str(error))
        else:
            self._went_through(len(part), sent, merged)
        return True

    async def _merge_in_server(self, part: list[ThreadDelta]) -> bool:
        """Merge each delta of *part* that can be, and set the others aside; say `False` if the server cannot tell."""
        try:
            with self._session.deadline(self._timeout):
                sent, merged, refused = await self._one_by_one(part)
        except Exception as error:
            if self._session.connection.broken or faults.kind_of(error) not in _DATA_OR_DOUBT:
                raise
            await self._roll_back()
            self._in_server = False
            return False
        self._went_through(len(part) - len(refused), sent, merged)
        for number, state, message in refused:
            self._set_aside(part[number], state, message)
        return True

    async def _one_by_one(self, part: list[ThreadDelta]) -> tuple[int, int, list[tuple[int, str, str]]]:
        session, cursor = self._session, self._session.cursor()
        await session.connection.execute("SAVEPOINT part")
        await cursor.execute(session.statements["settings"], encoding.arrays(part))
        await cursor.execute(session.statements.merging("one_by_one", self._batch), prepare=False)
        await cursor.execute("SELECT current_setting('tracker_daemon.outcome')")
        row = await cursor.fetchone()
        await session.connection.execute("RELEASE SAVEPOINT part")
        assert row is not None
        outcome: tuple[int, int, list[Any]] = json.loads(row[0])
        return outcome

    async def _roll_back(self) -> None:
        with self._session.deadline(self._timeout):
            await self._session.connection.execute("ROLLBACK TO SAVEPOINT part")

    def _went_through(self, rows: int, sent: int, merged: int) -> None:
        self.sent, self.merged = self.sent + sent, self.merged + merged
        self._badness = max(self._badness - rows, 0)

    def _set_aside(self, delta: ThreadDelta, state: str, message: str) -> None:
        self._badness = min(self._badness + _DENSITY, _MOST)
        self.dead.append(DeadLetter(delta, faults.reason_of_state(state), state, " ".join(message.split())))
