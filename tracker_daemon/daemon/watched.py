"""What operators see of a process, a daemon or a consumer: its state, its last minutes, its errors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

import anyio

from tracker_daemon.applier import kind_of
from tracker_daemon.clock import SystemClock
from tracker_daemon.collector import collector_of
from tracker_daemon.daemon.history import Error, General, History, Totals

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prometheus_client.registry import CollectorRegistry

    from tracker_daemon.daemon.history import Status
    from tracker_daemon.daemon.options import Options

_SAMPLE: Final = 1.0
_ERRORS: Final = 50
_TEXT: Final = 400


def words_of(error: BaseException) -> str:
    """Return what an error says, on one line and cut at some hundred characters."""
    return " ".join(str(error).split())[:_TEXT]


class Watched(ABC):
    """A process as operators see it.

    Args:
        options: where it is shown; `None`: nowhere.
        registry: what `/metrics` shows.
        config: what the status page shows of the settings; no secrets.

    Attributes:
        draining: whether it was told to end.
        queue_calls: accepted and not settled, when the last sample was taken.
    """

    name: ClassVar[str]

    def __init__(self, options: Options | None, registry: CollectorRegistry, config: Mapping[str, Any]) -> None:
        self.registry = registry
        self.collector = collector_of(registry)
        self.clock = SystemClock()
        self.draining = False
        self.queue_calls = 0
        self._options, self._config = options, dict(config)
        self._history = History(interval=_SAMPLE)
        self._started_at = self.clock.wall()
        self._errors: deque[Error] = deque(maxlen=_ERRORS)

    @property
    @abstractmethod
    def fault(self) -> str | None:
        """Why it cannot write, or `None`."""

    @property
    @abstractmethod
    def waiting(self) -> str:
        """What waits to be written, and how much of it."""

    @abstractmethod
    def status(self, since: str | None) -> Status:
        """Return the status page's document; *since* as `history` says."""

    @property
    def state(self) -> Literal["ready", "not_ready", "draining"]:
        """Whether it can accept and write."""
        if self.draining:
            return "draining"
        return "ready" if self.fault is None else "not_ready"

    @property
    def reason(self) -> str | None:
        """Why it is not ready, or `None`."""
        return f"the {self.name} is shutting down" if self.draining else self.fault

    def shown(self, error: BaseException) -> str:
        """Return an error as whoever asks may see it: libpq's words name hosts and users."""
        if self._options is None or all(address.is_loopback for address in self._options.listen):
            return words_of(error)
        return f"the database cannot be written: {kind_of(error)}; the log has the words"

    def note(self, error: BaseException) -> None:
        """Keep an error for the status page. Called from any thread."""
        at = round(self.clock.wall(), 3)
        self._errors.appendleft({"at": at, "class": kind_of(error), "text": self.shown(error)})

    async def sample(self) -> None:
        """Take samples until cancelled."""
        while True:
            reading = await anyio.to_thread.run_sync(self.collector.reading)
            self.queue_calls = reading.books.queue_calls
            self._history.add(reading, at=self.clock.wall(), monotonic=self.clock.monotonic())
            await anyio.sleep(_SAMPLE)

    def general(self, since: str | None) -> General:
        """Return what the status page's document has of any process."""
        try:
            after = None if since is None else float(since)
        except ValueError:
            after = None
        reading = self.collector.reading()
        books = reading.books
        return General(
            version=version("tracker-daemon"),
            now=round(self.clock.wall(), 3),
            started_at=round(self._started_at, 3),
            state=self.state,
            reason=self.reason,
            history=self._history.columns(after),
            totals=Totals(
                accepted=sum(books.accepted.values()),
                applied=sum(books.applied.values()),
                dead_lettered=sum(books.dead_lettered.values()),
                lost=sum(books.lost.values()),
                rejected=sum(reading.rejected.values()),
                pending=books.queue_calls,
            ),
            queue_limit=reading.queue_limit,
            errors=list(self._errors),
            config=self._config,
        )
