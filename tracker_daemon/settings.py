"""Every setting of a `Tracker`: its default, its unit and what it may be, once.

A wrong value raises `ConfigError` when the tracker is made, not later.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from prometheus_client.registry import REGISTRY, CollectorRegistry

from tracker_daemon.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

Overflow: TypeAlias = Literal["drop", "raise"]
_MOST_SECONDS = 86_400.0
_LEAST_QUOTA = 8 << 20
# Above 10,000 nothing is gained, and row locks are held for longer: 1 s at 50,000. The ids of 100,000 threads are up to
# 103 MB as one parameter, of which Postgres takes 1 GB; with every name of 512 bytes a flush of them takes 30 s.
_MOST_IN_A_BATCH = 100_000
_MOST_LANES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of a `Tracker`, checked."""

    flush_interval: float = 0.25
    """The window: the longest time from a call to the start of its flush, seconds."""
    max_batch_size: int = 10_000
    """Threads in one transaction, at most 100,000."""
    max_queue_size: int = 100_000
    """Calls taken and not yet coalesced."""
    max_pending: int = 1_000_000
    """Distinct threads with uncommitted change."""
    overflow: Overflow = "drop"
    create_missing: bool = True
    lanes: int = 1
    """Connections that flush disjoint threads at the same time."""
    table: str = "conversations"
    shutdown_timeout: float = 10.0
    """How long `close` drains, seconds."""
    registry: CollectorRegistry = REGISTRY
    on_error: Callable[[BaseException], object] | None = None
    journal: str | PathLike[str] | None = None
    """The directory of the journal; one tracker each."""
    journal_sync: float = 0.1
    """Seconds between two fsyncs of the journal; 0: every window before its flush."""
    journal_retain: float = 600.0
    """How long an applied window is kept for a database that forgets it, seconds."""
    journal_quota: int = 1 << 30
    """Bytes the journal may take; what is applied and kept takes at most a quarter of them."""

    def __post_init__(self) -> None:
        _seconds("flush_interval", self.flush_interval, least=0.001)
        _seconds("shutdown_timeout", self.shutdown_timeout, least=0.0)
        for name in ("max_batch_size", "max_queue_size", "max_pending"):
            _count(name, getattr(self, name))
        if self.max_batch_size > _MOST_IN_A_BATCH:
            raise ConfigError("max_batch_size", f"must be at most {_MOST_IN_A_BATCH}", self.max_batch_size)
        _count("lanes", self.lanes)
        if self.lanes > _MOST_LANES:
            raise ConfigError("lanes", f"must be at most {_MOST_LANES}", self.lanes)
        if self.overflow not in ("drop", "raise"):
            raise ConfigError("overflow", 'must be "drop" or "raise"', self.overflow)
        if type(self.create_missing) is not bool:
            raise ConfigError("create_missing", "must be True or False", self.create_missing)
        split_table(self.table)
        if not isinstance(self.registry, CollectorRegistry):
            raise ConfigError("registry", "must be a prometheus_client.CollectorRegistry or None", self.registry)
        if self.journal is not None and not _is_path(self.journal):
            raise ConfigError("journal", "must be a directory's path or None", self.journal)
        _seconds("journal_sync", self.journal_sync, least=0.0)
        _seconds("journal_retain", self.journal_retain, least=0.0)
        _count("journal_quota", self.journal_quota)
        if self.journal_quota < _LEAST_QUOTA:
            raise ConfigError("journal_quota", f"must be at least {_LEAST_QUOTA} bytes", self.journal_quota)
        if self.on_error is not None and not callable(self.on_error):
            raise ConfigError("on_error", "must be callable or None", self.on_error)


def _seconds(name: str, value: Any, *, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(name, "must be a number of seconds", value)
    if not least <= value <= _MOST_SECONDS:
        raise ConfigError(name, f"must be between {least:g} and {_MOST_SECONDS:g} seconds", value)


def _count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(name, "must be an integer", value)
    if value < 1:
        raise ConfigError(name, "must be at least 1", value)


def timeout(value: Any, default: float | None) -> float | None:
    """Return a caller's timeout in seconds, or *default* for `None`; `ConfigError` for anything that is no time."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:  # noqa: PLR0124 - NaN
        raise ConfigError("timeout", "must be a number of seconds or None", value)
    return float(min(max(0, value), _MOST_SECONDS * 365))


def quoted(table: tuple[str | None, str]) -> str:
    """Return what `split_table` takes apart, as SQL has it."""
    return ".".join('"' + part.replace('"', '""') + '"' for part in table if part is not None)


def split_table(table: Any) -> tuple[str | None, str]:
    """Return the schema (or `None`) and the name of *table*, each part plain or in double quotes, as SQL has it."""
    if not isinstance(table, str):
        raise ConfigError("table", "must be a str", table)
    parts: list[str] = []
    rest = table
    while True:
        part, rest = _identifier(table, rest)
        parts.append(part)
        if not rest:
            break
        if not rest.startswith("."):
            raise ConfigError("table", "must be a name or schema.name", table)
        rest = rest[1:]
    if len(parts) > 2:
        raise ConfigError("table", "must be a name or schema.name", table)
    return (parts[0], parts[1]) if len(parts) == 2 else (None, parts[0])


def _is_path(value: object) -> bool:
    path: object = fspath(value) if isinstance(value, str | PathLike) else None
    return isinstance(path, str) and bool(path) and "\0" not in path


def _identifier(table: str, text: str) -> tuple[str, str]:
    if text.startswith('"'):
        end = text.find('"', 1)
        while end != -1 and text[end : end + 2] == '""':
            end = text.find('"', end + 2)
        if end == -1:
            raise ConfigError("table", "has an open double quote", table)
        name, rest = text[1:end].replace('""', '"'), text[end + 1 :]
    else:
        end = next((i for i, c in enumerate(text) if not (c.isalnum() or c in "_$")), len(text))
        # Unquoted names fold to lower case, as in SQL.
        name, rest = text[:end].lower(), text[end:]
        if name[:1].isdigit() or name.startswith("$"):
            raise ConfigError("table", "must not begin with a digit or $ unless quoted", table)
    if "%" in name:
        raise ConfigError("table", "must not contain % (the driver's mark of a parameter)", table)
    if not name or "\0" in name:
        raise ConfigError("table", "must be a name or schema.name", table)
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise ConfigError("table", "must not contain a lone surrogate", table) from None
    if size > 63:
        raise ConfigError("table", "must have parts of at most 63 bytes (Postgres cuts longer names)", table)
    return name, rest
