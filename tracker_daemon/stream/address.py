"""Which stream: `nats://HOST[:PORT][,HOST…]/NAME[?credentials=PATH]`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from tracker_daemon.errors import ConfigError

_HOST: Final = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:(?P<port>\d{1,5}))?")
# What JetStream takes for a name, and no dot: the name is a part of subjects.
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class Address:
    """A stream on the servers of a cluster.

    Attributes:
        name: of the stream; its partitions are the JetStream streams NAME-0, NAME-1, ….
        servers: `nats://host:port`, or `tls://…`; any of them leads to all.
        user, password: or empty.
        credentials: the file with a JWT and its seed, as `nsc` writes it, or `None`.
    """

    name: str
    servers: tuple[str, ...]
    user: str = ""
    password: str = field(default="", repr=False)
    credentials: Path | None = None

    def __str__(self) -> str:
        return f"{','.join(self.servers)}/{self.name}"


def address(url: str, setting: str = "stream") -> Address:
    """Return what *url* names.

    Raises:
        ConfigError: it names no stream. The value is not repeated: it may hold a password.
    """
    scheme, _, rest = url.partition("://")
    if scheme not in ("nats", "tls"):
        raise ConfigError(setting, "must be nats://HOST:PORT,…/NAME or tls://HOST:PORT,…/NAME")
    where, question, query = rest.partition("?")
    key, _, file = query.partition("=")
    if question and (key != "credentials" or not file):
        raise ConfigError(setting, "may end in ?credentials=PATH and in nothing else after a question mark")
    hosts, slash, name = where.rpartition("/")
    login, at, hosts = hosts.rpartition("@")
    if not slash or _NAME.fullmatch(name) is None:
        raise ConfigError(
            setting, "must end in the stream's name: /NAME, up to 64 letters, digits, hyphens and underscores"
        )
    user, colon, password = login.partition(":")
    if at and not (user and colon):
        raise ConfigError(setting, "must name user and password as nats://USER:PASSWORD@HOST")
    servers = []
    for host in hosts.split(","):
        match = _HOST.fullmatch(host)
        if match is None or not 0 < int(match["port"] or 4222) < 65_536:
            raise ConfigError(setting, "must name its servers as HOST or HOST:PORT, with a comma between two")
        servers.append(f"{scheme}://{host if match['port'] else f'{host}:4222'}")
    credentials = Path(unquote(file)) if question else None
    if credentials is not None and not credentials.is_file():
        raise ConfigError(setting, "names a file of credentials that is not there, or may not be seen")
    return Address(name, tuple(servers), unquote(user), unquote(password), credentials)
