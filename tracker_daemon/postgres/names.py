"""Host names of a database, looked up within `connect_timeout`.

The driver looks names up itself before its timeout runs, and a resolver whose servers do not answer takes half a minute
and more. With addresses beside the names it has nothing to look up. Each lookup runs in a thread of its own: one that
hangs holds up neither the next one nor the end of the process.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg.conninfo import timeout_from_conninfo

from tracker_daemon.late_executor import LateExecutor

if TYPE_CHECKING:
    from collections.abc import Mapping

_VARIABLES: Final = {"host": "PGHOST", "hostaddr": "PGHOSTADDR", "port": "PGPORT"}
_PORT: Final = "5432"


async def with_addresses(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return *parameters* with the addresses of their hosts, one entry each; as they are where nothing is to look up.

    Raises:
        psycopg.OperationalError: no name was found, or not in time.
    """
    given = dict(parameters)
    hosts, addresses, ports = (_list(given, key) for key in _VARIABLES)
    if addresses or not any(_is_name(host) for host in hosts):
        return given
    if len(ports) not in (0, 1, len(hosts)):
        return given  # the driver says what is wrong
    ports = ports * len(hosts) if len(ports) == 1 else ports or [_PORT] * len(hosts)
    timeout = timeout_from_conninfo(given)
    found = await asyncio.gather(
        *(_look_up(host, port or _PORT, timeout) for host, port in zip(hosts, ports, strict=True)),
        return_exceptions=True,
    )
    entries = [
        (host, address, port)
        for host, port, each in zip(hosts, ports, found, strict=True)
        if not isinstance(each, BaseException)
        for address in each
    ]
    if not entries:
        raise next(each for each in found if isinstance(each, BaseException))
    joined = (",".join(each) for each in zip(*entries, strict=True))
    return given | dict(zip(_VARIABLES, joined, strict=True))


def _list(parameters: Mapping[str, Any], key: str) -> list[str]:
    text = str(parameters[key] if key in parameters else os.environ.get(_VARIABLES[key], ""))
    return text.split(",") if text else []


def _is_name(host: str) -> bool:
    """Tell a name from a socket's directory, an address, and nothing."""
    if not host or host.startswith(("/", "@")):
        return False
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return True
    return False


async def _look_up(host: str, port: str, timeout: float) -> list[str]:  # noqa: ASYNC109 - of the lookup alone
    if not _is_name(host):
        return ["" if not host or host.startswith(("/", "@")) else host]
    executor = LateExecutor(max_workers=1)
    try:
        async with asyncio.timeout(timeout):
            answers = await asyncio.get_running_loop().run_in_executor(
                executor, lambda: socket.getaddrinfo(host, port, proto=socket.IPPROTO_TCP, type=socket.SOCK_STREAM)
            )
    except TimeoutError:
        raise psycopg.OperationalError(
            f"host {host!r} was not found within {timeout:g} s (connect_timeout): does the resolver answer?"
        ) from None
    except OSError as error:
        raise psycopg.OperationalError(f"failed to resolve host {host!r}: {error}") from None
    return [str(answer[4][0]) for answer in answers]
