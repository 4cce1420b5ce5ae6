"""Which URLs name a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tracker_daemon.errors import ConfigError
from tracker_daemon.stream.address import Address, address

if TYPE_CHECKING:
    from pathlib import Path


def test_parts(tmp_path: Path) -> None:
    """Servers with and without a port, a login, and credentials are read; the password is never shown."""
    credentials = tmp_path / "c.creds"
    credentials.touch()
    found = address(f"nats://me:p%40ss@a,b:4333,[::1]:1/chat-1?credentials={credentials}")
    servers = ("nats://a:4222", "nats://b:4333", "nats://[::1]:1")
    assert found == Address("chat-1", servers, "me", "p@ss", credentials)
    assert "p@ss" not in f"{found} {found!r}"
    assert address("tls://h/x").servers == ("tls://h:4222",)


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("http://a/x", "nats://HOST"),
        ("nats:a/x", "nats://HOST"),
        ("nats://a", "name"),
        ("nats://a/", "name"),
        ("nats://a/x.y", "name"),
        ("nats://a/x y", "name"),
        ("nats:///x", "servers"),
        ("nats://a,,b/x", "servers"),
        ("nats://a:0/x", "servers"),
        ("nats://a:99999/x", "servers"),
        ("nats://me@a/x", "USER:PASSWORD"),
        ("nats://a/x?token=1", "credentials"),
        ("nats://a/x?credentials=", "credentials"),
        ("nats://a/x?credentials=/no/such.creds", "not there"),
    ],
)
def test_wrong(url: str, fault: str) -> None:
    """What names no stream is refused with what is wrong, and is not repeated."""
    with pytest.raises(ConfigError, match=fault):
        address(url)
