"""Every exception of the package, under `TrackerError`.

Each message says what was wrong, with which value, and what to do. Arguments are positional, so that
`copy` and `pickle` work.
"""

from __future__ import annotations

_SHOWN = 80
# What a class is called; a metaclass may answer otherwise, or not at all.
_NAME_OF = type.__dict__["__name__"].__get__


def shown(value: object) -> str:
    """Return *value* as `repr` prints it, cut to 80 characters. Raises nothing but a Ctrl-C that comes meanwhile."""
    try:
        text = str.__add__("", repr(value))  # of a subclass, too, whose own methods never run
    except KeyboardInterrupt:
        raise
    except BaseException:  # a caller's broken __repr__ must not hide the message, nor end the host by sys.exit
        return f"<{_NAME_OF(type(value))} whose repr fails>"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def one_line(text: str) -> str:
    """Return *text* on one line; libpq says several things on as many lines, without an end to any of them."""
    return "; ".join(" ".join(line.split()) for line in text.splitlines() if line.strip())


class TrackerError(Exception):
    """The root of what this package raises."""


class InvalidCall(TrackerError, ValueError):  # noqa: N818 - the name is the public contract
    """An argument of a call was refused; nothing was enqueued."""

    def __init__(self, argument: str, fault: str, value: object = None) -> None:
        super().__init__(argument, fault, value)
        self.argument, self.fault, self.value = argument, fault, value

    def __str__(self) -> str:
        return f"{self.argument} {self.fault}, got {shown(self.value)}"


class QueueFull(TrackerError):  # noqa: N818 - the name is the public contract
    """The call was not accepted: a bound is reached. Raised with `overflow="raise"` only."""

    def __init__(self, bound: str, limit: int) -> None:
        super().__init__(bound, limit)
        self.bound, self.limit = bound, limit

    def __str__(self) -> str:
        return (
            f"the call was not accepted: {self.bound}={self.limit} is reached; "
            "call again later, raise the bound, or find out why the database does not keep up"
        )


class TrackerClosed(TrackerError):  # noqa: N818 - the name is the public contract
    """The call came after `close`; it was not accepted."""

    def __str__(self) -> str:
        return "the tracker is closed and accepts no calls; make a new Tracker"


class FlushTimeout(TrackerError, TimeoutError):  # noqa: N818 - the name is the public contract
    """The barrier was not reached in time. Nothing is lost: the calls stay pending and flushing goes on.

    The last error of the sink, if it has one, is `__cause__`.
    """

    def __init__(self, waited: float, pending: int, last_error: str = "") -> None:
        super().__init__(waited, pending, last_error)
        self.waited, self.pending, self.last_error = waited, pending, last_error

    def __str__(self) -> str:
        why = f"; last error: {self.last_error}" if self.last_error else ""
        if not self.pending:
            return f"calls that were waited for were lost: the tracker was closed meanwhile{why}"
        return f"after {self.waited:g} s {self.pending} calls are still pending{why}"


class ConfigError(TrackerError, ValueError):
    """A setting is wrong or unknown; the message names it, its value and what it may be."""

    def __init__(self, setting: str, fault: str, *value: object) -> None:
        super().__init__(setting, fault, *value)
        self.setting, self.fault, self.value = setting, fault, value

    def __str__(self) -> str:
        # A value that may hold a password is not handed in.
        return f"{self.setting} {self.fault}{''.join(f', got {shown(value)}' for value in self.value)}"


class SchemaError(TrackerError):
    """The database's tables are not what the flush needs; the message names the object and the mend."""


class JournalError(TrackerError):
    """The journal's directory cannot be used; the message names the file and the reason."""


class Fenced(TrackerError):  # noqa: N818 - the name is the public contract
    """Another life of this producer has opened the ledger; this one must not write again."""

    def __init__(self, producer: str, lane: int, epoch: int, found: int) -> None:
        super().__init__(producer, lane, epoch, found)
        self.producer, self.lane, self.epoch, self.found = producer, lane, epoch, found

    def __str__(self) -> str:
        return (
            f"producer {self.producer} lane {self.lane}: epoch {self.found} has replaced this one's {self.epoch}; "
            "this process writes nothing more. Give each process an identity (a journal directory) of its own"
        )


class EmbeddedPostgresError(TrackerError):
    """The embedded server cannot run: the message has the reason and the end of the server's log."""
