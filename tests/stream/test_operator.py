"""`?credentials=`: a server in operator mode, which knows nobody but by tokens that its operator's accounts have signed."""

from __future__ import annotations

import json
import subprocess
import time
from base64 import urlsafe_b64encode
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import nkeys
import pytest

from tests.helpers import query, wait_until
from tests.stream.cluster import _free_ports, program
from tests.stream.conftest import make_stream
from tests.stream.harness import Consuming
from tests.stream.test_command import run
from tests.stream.test_connection import _listens
from tracker_daemon.sink import SinkFault

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.helpers import Trackers

_HEADER = {"typ": "JWT", "alg": "ed25519-nkey"}
_NO_LIMITS = dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1) | {"wildcards": True}
_STORAGE = dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), -1)
_CONFIGURATION = """\
listen: "127.0.0.1:{port}"
jetstream {{ store_dir: "{folder}" }}
operator: {operator}
system_account: {system}
resolver: MEMORY
resolver_preload: {{ {accounts} }}
"""


class Key:
    """A key of its own: an operator's, an account's or a user's, whose tokens it signs and is named in."""

    def __init__(self, prefix: int, number: int) -> None:
        self.seed = nkeys.encode_seed(bytes([number]) * 32, prefix)
        self._pair = nkeys.from_seed(bytearray(self.seed))
        self.name = self._pair.public_key.decode()

    def token(self, subject: Key, what: dict[str, Any], **more: Any) -> str:
        """Return a token about *subject*, signed by this one."""
        claims = {
            "jti": subject.name,
            "iat": int(time.time()),
            "iss": self.name,
            "name": "test",
            "sub": subject.name,
            "nats": {**what, "version": 2},
            **more,
        }
        signed = ".".join(_encoded(json.dumps(part).encode()) for part in (_HEADER, claims))
        return f"{signed}.{_encoded(self._pair.sign(signed.encode()))}"


def _encoded(data: bytes) -> str:
    return urlsafe_b64encode(data).decode().rstrip("=")


OPERATOR, SYSTEM, ACCOUNT, STRANGER = (
    Key(prefix, number)
    for number, prefix in enumerate([nkeys.PREFIX_BYTE_OPERATOR, *[nkeys.PREFIX_BYTE_ACCOUNT] * 3], 1)
)
USER = Key(nkeys.PREFIX_BYTE_USER, 9)


def credentials(file: Path, account: Key, **more: Any) -> Path:
    """Write a file of credentials of the user, in *account*, as `nsc` does."""
    token = account.token(USER, {"type": "user", "pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1}, **more)
    file.write_text(
        f"-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{USER.seed.decode()}\n------END USER NKEY SEED------\n"
    )
    return file


@contextmanager
def operated(folder: Path) -> Iterator[str]:
    """Yield the address of a server that knows the account, and no stranger."""
    [port] = _free_ports(1)
    account = {"type": "account", "limits": _NO_LIMITS, "default_permissions": {"pub": {}, "sub": {}}}
    accounts = {
        SYSTEM.name: OPERATOR.token(SYSTEM, account),
        ACCOUNT.name: OPERATOR.token(ACCOUNT, {**account, "limits": _NO_LIMITS | _STORAGE}),
    }
    (folder / "nats.conf").write_text(
        _CONFIGURATION.format(
            port=port,
            folder=folder / "store",
            operator=OPERATOR.token(OPERATOR, {"type": "operator", "system_account": SYSTEM.name}),
            system=SYSTEM.name,
            accounts=", ".join(f"{name}: {token}" for name, token in accounts.items()),
        )
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program(), "--config", folder / "nats.conf"], stdout=log, stderr=log)
    try:
        wait_until(lambda: _listens(port) or process.poll() is not None, "the server")
        assert process.poll() is None, (folder / "log").read_text()
        yield f"nats://127.0.0.1:{port}/chat"
    finally:
        process.kill()
        process.wait(30)


def test_credentials_let_in(database: str, trackers: Trackers, tmp_path: Path) -> None:
    """With a user's token and its seed the stream is made, published to, and read; without one nobody gets in."""
    with operated(tmp_path) as address:
        url = f"{address}?credentials={credentials(tmp_path / 'user.creds', ACCOUNT)}"
        made = run("stream", "create", "--stream", url, "--partitions", "1", "--replicas", "1")
        assert made.exit_code == 0, made.output
        tracker = trackers(url, flush_interval=0.01)
        with Consuming(url, database):
            assert tracker.record_turn("t", "a", 7)
            tracker.flush(30)
            wait_until(lambda: query(database, "SELECT total_tokens FROM conversations") == [(7,)], "the call")
        assert run("stream", "status", "--stream", url, "--database", database).exit_code == 0
        with pytest.raises(SinkFault) as refused:
            make_stream(address, 1)
        assert refused.value.kind == "auth"


@pytest.mark.parametrize("wrong", ["another's account", "expired", "another's seed"])
def test_credentials_that_do_not_let_in(tmp_path: Path, wrong: str) -> None:
    """A token of an account that the operator does not know, one that has ended, and another's seed are refused logins."""
    file = tmp_path / "user.creds"
    if wrong == "another's account":
        credentials(file, STRANGER)
    else:
        credentials(file, ACCOUNT, **({"exp": int(time.time()) - 60} if wrong == "expired" else {}))
    if wrong == "another's seed":
        seed = Key(nkeys.PREFIX_BYTE_USER, 10).seed.decode()
        file.write_text(file.read_text().replace(USER.seed.decode(), seed))
    with operated(tmp_path) as address, pytest.raises(SinkFault) as refused:
        make_stream(f"{address}?credentials={file}", 1)
    assert refused.value.kind == "auth"
    assert "correct it in the URL" in str(refused.value)
