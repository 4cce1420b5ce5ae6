"""Host names of a database are looked up within `connect_timeout`, whatever the resolver does."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.names import with_addresses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

real = socket.getaddrinfo


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Answers as told: a list of addresses, an error, or an event that is waited for."""
    hang = threading.Event()

    def answers(known: dict[str, Any]) -> None:
        def look_up(host: Any, *arguments: Any, **named: Any) -> Any:
            answer = known.get(host)
            if answer is None:
                return real(host, *arguments, **named)
            if answer == "hangs":
                hang.wait()
                answer = socket.gaierror(socket.EAI_AGAIN, "too late")
            if isinstance(answer, Exception):
                raise answer
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in answer]

        monkeypatch.setattr(socket, "getaddrinfo", look_up)

    yield answers
    hang.set()


def test_a_resolver_that_hangs(resolver: Callable[[dict[str, Any]], None]) -> None:
    """A name whose lookup does not end is given up after `connect_timeout`, while it still hangs; the error names it."""
    resolver({"db.hangs": "hangs"})
    with pytest.raises(psycopg.OperationalError, match=r"'db\.hangs' was not found within 2 s"):
        asyncio.run(Connector("host=db.hangs connect_timeout=2").connect())


def test_another_host_is_taken(database: str, resolver: Callable[[dict[str, Any]], None]) -> None:
    """Of several hosts those that are not found are passed over, and each address of a name is tried."""
    resolver({"db.none": socket.gaierror(socket.EAI_NONAME, "no such name"), "db.two": ["127.0.0.3", "127.0.0.1"]})
    given = conninfo_to_dict(database)
    port = str(given["port"])

    async def ask() -> tuple[Any, ...] | None:
        conninfo = make_conninfo(database, host="db.none,db.two", port=port, connect_timeout=2)
        async with await Connector(conninfo).connect() as connection:
            return await (await connection.execute("SELECT 1")).fetchone()

    assert asyncio.run(ask()) == (1,)


def test_what_the_driver_is_given(resolver: Callable[[dict[str, Any]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Names get their addresses beside them; addresses, sockets and what has addresses already stay as they are."""
    resolver({"a": ["10.0.0.1", "10.0.0.2"], "b": ["10.0.0.3"]})

    def given(**parameters: Any) -> dict[str, Any]:
        return asyncio.run(with_addresses(parameters))

    assert given(host="a,b", port="1,2") == {"host": "a,a,b", "hostaddr": "10.0.0.1,10.0.0.2,10.0.0.3", "port": "1,1,2"}
    assert given(host="/run,b,::1") == {"host": "/run,b,::1", "hostaddr": ",10.0.0.3,::1", "port": "5432,5432,5432"}
    for plain in ({}, {"host": "/run"}, {"host": "127.0.0.1"}, {"host": "a", "hostaddr": "10.0.0.9"}, {"dbname": "x"}):
        assert given(**plain) == plain
    monkeypatch.setenv("PGHOST", "b")
    monkeypatch.setenv("PGPORT", "7")
    assert given() == {"host": "b", "hostaddr": "10.0.0.3", "port": "7"}
