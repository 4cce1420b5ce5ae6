"""The three calls: validate, stamp, append.

Rules:
1. The path of an ordinary call takes no lock, does no I/O, touches no metric, and reads the clock once.
2. Whatever is not ordinary (an unusual type, a name not seen before, a worker asleep or not started, a bound near,
   a closed tracker, a process forked) fails one test there and goes the slow way, which knows what to do.
3. Nothing here waits: not for the database, not for the worker. A signal handler or a finalizer may call.
"""

from __future__ import annotations

import os
from contextlib import suppress
from threading import RLock
from time import time_ns
from typing import TYPE_CHECKING, Final, Protocol

from tracker_daemon import calls
from tracker_daemon.errors import InvalidCall, QueueFull, TrackerClosed
from tracker_daemon.generation import ENSURE, ensure, resolve
from tracker_daemon.logs import Rated, get_logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tracker_daemon.backlog import Backlog
    from tracker_daemon.clock import Clock
    from tracker_daemon.generation import Record

REJECTED_REASONS: Final = ("invalid", "full", "closed", "share", "batch")
"""The last two are a daemon's: a client has used up its share of what is bounded; a batch, which its sender keeps and
brings again, had no room."""
_KNOWN_AGENTS: Final = 1_024
_FORBIDDEN: Final = ("", *("\0",) * calls.NAME_BYTES)
"""By the length of a name in ASCII, what must not be found in it: in an empty one "" is; for a longer one there is
nothing here. One test for three rules: a call's cost is the number of its steps."""


class Worker(Protocol):
    """What the door needs of whoever empties the queue."""

    def wake(self) -> None:
        """Look at the queue now; start if need be."""
        ...


class Refusals:
    """Counts refused calls by reason, and logs them at a bounded rate.

    Its lock is taken on refusal only, and by no one for longer than a count.
    """

    def __init__(self, clock: Clock) -> None:
        self._lock = RLock()
        self._rated = Rated(clock)
        self.counts = dict.fromkeys(REJECTED_REASONS, 0)

    def add(self, reason: str, calls: int = 1) -> None:
        """Count some. Who made an invalid call is told by the exception alone."""
        with self._lock:
            self.counts[reason] += calls
            due = None if reason == "invalid" else self._rated.due(reason)
        if due is not None:
            with suppress(Exception):  # the host's logging must not reach the caller
                get_logger().error("calls_rejected", reason=reason, **due)

    @property
    def total(self) -> int:
        """All of them."""
        with self._lock:
            return sum(self.counts.values())


class FrontDoor:
    """Takes calls from any thread into the backlog's queue."""

    _backlog: Backlog
    _worker: Worker
    _refusals: Refusals
    _raise: bool
    _pid: int
    _agents: dict[str | None, str | None]

    def ensure_conversation(self, thread_id: str) -> bool:
        """Create the conversation's row at the next flush if it does not exist.

        Args:
            thread_id: 1 to 512 bytes in UTF-8, no NUL, no lone surrogate.

        Returns:
            `True`: accepted. `False`: full or closed, with `overflow="drop"`; counted as rejected.

        Raises:
            InvalidCall: the argument is malformed; nothing was enqueued.
            QueueFull, TrackerClosed: not accepted, with `overflow="raise"`.
        """
        try:
            if type(thread_id) is str and thread_id.isascii() and _FORBIDDEN[len(thread_id)] not in thread_id:
                for put in self._backlog.gate:
                    put((thread_id, None, ENSURE, 0, time_ns()))
                    return True
        except IndexError:  # longer than any name: the slow way says so
            pass
        try:
            name = calls.name("thread_id", thread_id)
        except InvalidCall:
            self._refusals.add("invalid")
            raise
        return self._enter(ensure(name, time_ns()))

    def record_turn(self, thread_id: str, agent_name: str | None = None, tokens: int = 0, cost: calls.Cost = 0) -> bool:
        """Count one turn of the conversation.

        Args:
            thread_id: 1 to 512 bytes in UTF-8, no NUL, no lone surrogate.
            agent_name: the same, or `None`.
            tokens: an integer (anything with `__index__`, not `bool`), |n| < 2**63.
            cost: US dollars; `int`, `float` or `Decimal`, finite, of at most 2,000 digits before the point and 16,383
                after. A float counts as the decimal that `repr` prints.

        Returns:
            `True`: accepted. `False`: full or closed, with `overflow="drop"`; counted as rejected.

        Raises:
            InvalidCall: an argument is malformed; nothing was enqueued.
            QueueFull, TrackerClosed: not accepted, with `overflow="raise"`.
        """
        try:
            # Tokens below 2**30 compare as single digits; the rarer rest goes the slow way. No chain of
            # comparisons: in one the interpreter has no quick way for two ints or two floats.
            if (
                type(thread_id) is str
                and thread_id.isascii()
                and _FORBIDDEN[len(thread_id)] not in thread_id
                and (type(agent_name) is str or agent_name is None)
                and type(tokens) is int
                and tokens >= 0
                and tokens < 1_000_000_000
                and (type(cost) is float or type(cost) is int)
                and cost >= 0.0
                and cost < 1e9
            ):
                agent = self._agents[agent_name]
                for put in self._backlog.gate:
                    put((thread_id, agent, tokens, cost, time_ns()))
                    return True
        except LookupError:  # an agent not seen before, or longer than any name: the slow way says which
            pass
        try:
            record = (
                calls.name("thread_id", thread_id),
                calls.optional_name("agent_name", agent_name),
                calls.tokens(tokens),
                calls.cost(cost),
                time_ns(),
            )
        except InvalidCall:
            self._refusals.add("invalid")
            raise
        if len(self._agents) < _KNOWN_AGENTS:
            self._agents[record[1]] = record[1]
        return self._enter(record)

    def resolve(self, thread_id: str, resolution_type: str) -> bool:
        """Mark the conversation as resolved, now; of several the later wins.

        Args:
            thread_id: 1 to 512 bytes in UTF-8, no NUL, no lone surrogate.
            resolution_type: the same.

        Returns:
            `True`: accepted. `False`: full or closed, with `overflow="drop"`; counted as rejected.

        Raises:
            InvalidCall: an argument is malformed; nothing was enqueued.
            QueueFull, TrackerClosed: not accepted, with `overflow="raise"`.
        """
        try:
            record = resolve(
                calls.name("thread_id", thread_id),
                calls.name("resolution_type", resolution_type),
                time_ns(),
            )
        except InvalidCall:
            self._refusals.add("invalid")
            raise
        return self._enter(record)

    # Python's own TypeError for an argument that is missing or misspelt names the function by this.
    for _call in (ensure_conversation, record_turn, resolve):
        _call.__qualname__ = f"Tracker.{_call.__name__}"
    del _call

    def _enter(self, record: Record) -> bool:
        """Append a validated call, unless closed or full; see to it that a worker looks at it."""
        for put in self._backlog.gate:
            put(record)
            return True
        if os.getpid() != self._pid:
            self._after_fork()
        backlog = self._backlog
        try:
            bound = backlog.enter(record)
            # First the call, then the waking: the worker that looks finds it.
            if bound != "closed":
                self._worker.wake()
        except BaseException:  # of a signal's handler: the call may be in, and nobody woken; let the next one ask
            backlog.shut_gate()
            raise
        if bound == "closed":
            self._refusals.add("closed")
            if self._raise:
                raise TrackerClosed
            return False
        if bound is None:
            return True
        self._refusals.add("full")
        if self._raise:
            raise QueueFull(bound, getattr(backlog, bound))
        return False

    def take(self, records: Sequence[Record], taken_at: int = 0) -> str | None:
        """Take checked calls, with the instants in them, all or none; return `None`, or the bound that is reached.

        Args:
            records: the calls.
            taken_at: nanoseconds since 1970, where the instants in *records* may be others; else 0.
        """
        if os.getpid() != self._pid:
            self._after_fork()
        bound = self._backlog.enter_all(records, taken_at)
        self._worker.wake()
        if bound is not None:
            self._refusals.add("closed" if bound == "closed" else "full", len(records))
        return bound

    def _after_fork(self) -> None:
        """Begin a life of this process's own; whoever has the parts says how."""
        raise NotImplementedError
