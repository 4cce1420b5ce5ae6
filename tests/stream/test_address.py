"""Which URLs name a stream."""

from __future__ import annotations

from pathlib import Path

import pytest

from tracker_daemon.errors import ConfigError
from tracker_daemon.stream.address import Address, address


def test_parts() -> None:
    """Servers with and without a port, a login, and credentials are read; the password is never shown."""
    found = address("nats://me:p%40ss@a,b:4333,[::1]:1/chat-1?credentials=/run/c.creds")
    servers = ("nats://a:4222", "nats://b:4333", "nats://[::1]:1")
    assert found == Address("chat-1", servers, "me", "p@ss", Path("/run/c.creds"))
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
    ],
)
def test_wrong(url: str, fault: str) -> None:
    """What names no stream is refused with what is wrong, and is not repeated."""
    with pytest.raises(ConfigError, match=fault):
        address(url)
