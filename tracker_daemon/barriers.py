"""Who waits until the calls accepted before are settled.

Rules:
1. A barrier is reached when every call before it is settled, however many follow meanwhile.
2. At the end all are let go: each is told whether its calls are in the sink.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tracker_daemon.backlog import Backlog


@dataclass(frozen=True, slots=True)
class Barrier:
    """Somebody waits until the first *target* accepted calls are settled."""

    target: int
    done: Future[bool]


class Barriers:
    """The barriers of one life.

    Attributes:
        ending: calls may be given up from now on.
    """

    def __init__(self, backlog: Backlog) -> None:
        self._backlog = backlog
        self._waiting: list[Barrier] = []
        self.ending = False

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def add(self) -> Future[bool]:
        """Return what is done when every call accepted until now is settled: `False` if some are lost."""
        done: Future[bool] = Future()
        with self._backlog.lock:
            target = self._backlog.accepted
            if self._backlog.settled >= target and not self._backlog.recovering:
                done.set_result(not self._lost)
            else:
                self._waiting.append(Barrier(target, done))
        return done

    def leave(self, done: Future[bool]) -> None:
        """Forget a barrier's future: nobody waits for it any more."""
        with self._backlog.lock:
            self._waiting = [barrier for barrier in self._waiting if barrier.done is not done]

    @property
    def are_folded(self) -> bool:
        """Whether somebody waits for nothing but what is in the window."""
        return any(barrier.target <= self._backlog.folded for barrier in self._waiting)

    def release(self, *, everyone: bool = False) -> None:
        """Let those go who are reached, or everyone."""
        with self._backlog.lock:
            done = self._backlog.settled if not self._backlog.recovering else -1
            reached = [b for b in self._waiting if everyone or done >= b.target]
            for barrier in reached:
                self._waiting.remove(barrier)
        for barrier in reached:
            barrier.done.set_result(self._backlog.settled >= barrier.target and not self._lost)

    @property
    def _lost(self) -> bool:
        if not self.ending:
            return False
        books = self._backlog.books()
        return bool(books.journaled) or any(books.lost.values())
