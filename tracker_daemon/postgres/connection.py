"""How a connection of our own is made: from a conninfo, or as the server's pool would make it.

Rules:
1. Everything is read again at each connect: callables, environment, password files, host names.
2. What the user set stays; where nothing is set, a dead peer is noticed within half a minute and a standby refused.
3. A connection is in autocommit: transactions are explicit, and say READ COMMITTED whatever the server's default.
"""

from __future__ import annotations

import inspect
import os
import re
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg.conninfo import conninfo_to_dict

from tracker_daemon.errors import ConfigError
from tracker_daemon.postgres.names import with_addresses

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from psycopg_pool import AsyncConnectionPool

DEFAULTS: Final[dict[str, str | int]] = {
    "application_name": "tracker-daemon",
    "connect_timeout": 10,
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
    # A former primary that is read-only now is refused here, and the next host or address is tried.
    "target_session_attrs": "read-write",
}
_VARIABLES: Final = {
    "application_name": "PGAPPNAME",
    "connect_timeout": "PGCONNECT_TIMEOUT",
    "target_session_attrs": "PGTARGETSESSIONATTRS",
}
# Of the driver, not of libpq: ours are fixed below, these are the user's.
_DRIVER_KEYS: Final = ("prepare_threshold", "context")


async def _value(setting: Any) -> Any:
    """Return *setting*, or what it returns if it is a function, awaited if need be."""
    found = setting() if callable(setting) else setting
    return await found if inspect.isawaitable(found) else found


def _check(conninfo: str) -> None:
    """Raise `ConfigError` for what libpq cannot read. The text itself is not repeated: it may hold a password."""
    try:
        parameters = conninfo_to_dict(conninfo)
        if "\0" in conninfo:
            raise psycopg.ProgrammingError("libpq would end at the NUL")
    except (psycopg.ProgrammingError, UnicodeError):
        raise ConfigError(
            "sink", "is not a Postgres URL (postgresql://user:password@host:port/database) or key=value conninfo"
        ) from None
    scheme, _, rest = conninfo.partition(":")
    if scheme in ("postgresql", "postgres") and _badly_escaped(rest):
        raise ConfigError(
            "sink",
            "has a character in its user or password that a URL must have as %XX (@ %40, / %2F, : %3A, ? %3F), "
            "or a port that is no number",
        )
    for port in str(parameters.get("port", "")).split(","):
        if port and not (port.isdecimal() and 0 < int(port) < 65_536):
            raise ConfigError("sink", "has a port that is not a number from 1 to 65535")


def _badly_escaped(rest: str) -> bool:
    """Tell whether libpq would take part of a password for the host, port or database, and show it in an error."""
    # As libpq reads it: the user and password end at the first @, if that comes before the first slash.
    text = rest.removeprefix("//")
    user, at, after = text.partition("@")
    location = (after if at and "/" not in user else text).partition("?")[0]
    hosts = [re.sub(r"\[.*?(\]|$)", "", host) for host in location.partition("/")[0].split(",")]
    ports = [host.partition(":")[2] for host in hosts]
    return "@" in location or any(port and not port.isdecimal() for port in ports)


class Connector:
    """Makes connections.

    Args:
        conninfo: a libpq URL or key=value string, or a function that returns one.
        kwargs: further parameters, or a function that returns them.
        configure: awaited with every new connection.
    """

    def __init__(
        self,
        conninfo: str | Callable[[], Any],
        kwargs: dict[str, Any] | Callable[[], Any] | None = None,
        configure: Callable[[Any], Awaitable[None]] | None = None,
    ) -> None:
        if isinstance(conninfo, str):
            _check(conninfo)
        self._conninfo, self._kwargs, self._configure = conninfo, kwargs, configure

    @classmethod
    def of_pool(cls, pool: AsyncConnectionPool[Any]) -> Connector:
        """Return what makes connections as *pool* does; its own stay untouched."""
        return cls(pool.conninfo, pool.kwargs, pool._configure)  # noqa: SLF001 - psycopg_pool has no other way

    async def connect(self) -> psycopg.AsyncConnection[Any]:
        """Return a new connection; raises what the driver raises."""
        kwargs = dict(await _value(self._kwargs) or {})
        driver = {key: kwargs.pop(key) for key in _DRIVER_KEYS if key in kwargs}
        for key in ("autocommit", "row_factory", "cursor_factory"):
            kwargs.pop(key, None)
        parameters = {**conninfo_to_dict(await _value(self._conninfo) or ""), **kwargs}
        # A service file may set any of them, which is not seen here.
        service = "service" in parameters or os.environ.get("PGSERVICE")
        defaults = {} if service else {k: v for k, v in DEFAULTS.items() if not os.environ.get(_VARIABLES.get(k, ""))}
        parameters = {**defaults, **parameters, "client_encoding": "UTF8"}
        if not service:
            parameters = await with_addresses(parameters)
        connection: psycopg.AsyncConnection[Any] = await psycopg.AsyncConnection.connect(
            **parameters, autocommit=True, **driver
        )
        if self._configure is not None:
            try:
                await self._configure(connection)
                if connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
                    await connection.rollback()
                await connection.set_autocommit(True)
            except BaseException:
                await connection.close()
                raise
        return connection
