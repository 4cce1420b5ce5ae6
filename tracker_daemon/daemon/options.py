"""The daemon's settings, checked."""

from __future__ import annotations

import grp
import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tracker_daemon.errors import ConfigError

DEFAULT_SOCKET: Final = "unix:/run/tracker-daemon/tracker.sock"
_ADDRESS: Final = re.compile(r"(?:\[(?P<six>[0-9a-fA-F:.]+)\]|(?P<host>[^:\[\]/]+)):(?P<port>\d{1,5})")


@dataclass(frozen=True, slots=True)
class Listen:
    """One address: a Unix socket's path, or host and port."""

    path: Path | None = None
    host: str = ""
    port: int = 0

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        if self.path is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def listen(value: str) -> Listen:
    """Return the address in *value*: `unix:PATH` or `HOST:PORT`.

    Raises:
        ConfigError: it is neither.
    """
    if value.startswith("unix:"):
        path = value.removeprefix("unix:")
        if not path:
            raise ConfigError("listen", "must name a path after unix:", value)
        if len(os.fsencode(path)) > 107:
            raise ConfigError("listen", "must have a socket path of at most 107 bytes", value)
        return Listen(path=Path(path))
    match = _ADDRESS.fullmatch(value)
    if match is None or int(match["port"]) > 65_535:
        raise ConfigError("listen", "must be unix:PATH or HOST:PORT", value)
    return Listen(host=match["six"] or match["host"], port=int(match["port"]))


def group_id(name: str) -> int:
    """Return the number of the group *name*, which may be a number itself.

    Raises:
        ConfigError: there is none.
    """
    if name.isdigit():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError("socket_group", "is no group of this machine", name) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The daemon's own settings; those of its tracker are in `settings`.

    Attributes:
        listen: where it is reached.
        token_file: whose first line is the bearer token for `/v1/…`; read again when it changes. `None`: none is asked
            for, which only addresses of this machine may do.
        socket_mode, socket_group: of Unix sockets.
        window: how long a batch of a client waits for others, seconds.
        max_body: bytes in a request.
        max_line: bytes in a line of NDJSON.
        max_connections: at once.
        read_timeout: seconds for a request's head, for each part of its body, and for its answer to be read.
        memory: bytes of requests under way at once.
        read_only: there is nothing that a token would guard.
    """

    listen: tuple[Listen, ...]
    token_file: Path | None = None
    socket_mode: int = 0o660
    socket_group: int | None = None
    window: float = 0.05
    max_body: int = 32 << 20
    max_line: int = 64 << 10
    max_connections: int = 2_000
    read_timeout: float = 20.0
    memory: int = 256 << 20
    read_only: bool = False

    def __post_init__(self) -> None:
        open_to_all = [address for address in self.listen if not address.is_loopback]
        if open_to_all and self.token_file is None and not self.read_only:
            raise ConfigError(
                "listen", "is reached from other machines, which needs --token-file", ", ".join(map(str, open_to_all))
            )
        if not 0.1 <= self.read_timeout <= 3_600:  # and no NaN, which compares with nothing
            raise ConfigError("read_timeout", "must be between 0.1 and 3600 seconds", self.read_timeout)
        for number, address in enumerate(self.listen):
            if address in self.listen[:number]:
                raise ConfigError("listen", "names an address twice", str(address))
        if not self.listen:
            raise ConfigError("listen", "must name at least one address")
