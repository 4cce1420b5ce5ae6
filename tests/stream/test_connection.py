"""What a connection to the brokers needs, and what it never says."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from nkeys import PREFIX_BYTE_USER, encode_seed

from tests.helpers import wait_until
from tests.stream.cluster import _free_ports, program
from tests.stream.conftest import make_stream
from tests.stream.test_sink import opened_broker
from tracker_daemon.sink import SinkFault
from tracker_daemon.stream.address import address
from tracker_daemon.stream.broker import Broker

if TYPE_CHECKING:
    from pathlib import Path

    from nats.aio.client import Client

    from tests.stream.cluster import Cluster

_INFO = json.dumps({"server_id": "x", "version": "2.11.0", "max_payload": 1 << 20, "proto": 1, "headers": True})


def test_tls_is_refused_without_tls(cluster: Cluster) -> None:
    """A server that has no TLS is not spoken to in clear where tls: was asked for."""
    url = cluster.url("plain").replace("nats://", "tls://")
    with pytest.raises(SinkFault, match="does not encrypt"):
        make_stream(url, 1)


def test_no_login_in_clear() -> None:
    """A login goes to nobody without TLS where tls: was asked for: not a byte is sent."""
    heard = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    peer, _ = listening.accept()
                except OSError:
                    return
                peer.settimeout(0.2)  # whoever says nothing is let go of, and comes again
                with peer, suppress(OSError):
                    peer.sendall(f"INFO {_INFO}\r\n".encode())
                    while data := peer.recv(4_096):
                        heard.extend(data)

        thread = threading.Thread(target=serve)
        thread.start()
        port = listening.getsockname()[1]
        try:
            with pytest.raises(SinkFault, match="no login was sent"):
                make_stream(f"tls://me:secret-word@127.0.0.1:{port}/x", 1)
        finally:
            listening.shutdown(socket.SHUT_RDWR)
    thread.join(10)
    assert not heard


_LOGIN = """\
listen: "127.0.0.1:{port}"
authorization {{ users = [ {{ user: "tracker", password: "example" }} ] }}
"""


def test_a_login_that_every_server_refuses_is_told(tmp_path: Path) -> None:
    """However often it is tried: the driver would go from server to server for ever."""
    ports, started = _free_ports(3), []
    for port in ports:
        file = tmp_path / f"{port}.conf"
        file.write_text(_LOGIN.format(port=port))
        started.append(subprocess.Popen([program(), "--config", file], stderr=subprocess.DEVNULL))
    url = f"nats://tracker:wrong@{','.join(f'127.0.0.1:{port}' for port in ports)}/x"

    async def ask() -> list[BaseException | Client]:
        # Many at once: each meets the end of its time in another place of the driver.
        brokers = [Broker(address(url)) for _ in range(12)]
        async with asyncio.timeout(60):
            return await asyncio.gather(*(broker.connect() for broker in brokers), return_exceptions=True)

    try:
        wait_until(lambda: all(map(_listens, ports)), "the servers")
        for answer in asyncio.run(ask()):
            assert isinstance(answer, SinkFault)
            assert answer.kind == "auth"
    finally:
        for process in started:
            process.kill()
            process.wait(30)


def test_servers_without_jetstream_are_told() -> None:
    """Where nobody answers for JetStream it is said what may be off, whatever is asked."""
    [port] = _free_ports(1)
    server = subprocess.Popen([program(), "--addr", "127.0.0.1", "--port", str(port)], stderr=subprocess.DEVNULL)

    async def ask() -> None:
        async with opened_broker(f"nats://127.0.0.1:{port}/x") as broker:
            with pytest.raises(SinkFault, match="JetStream is off") as asked:
                await broker.facts(0)
            assert asked.value.kind == "connection"

    try:
        wait_until(lambda: _listens(port), "the server")
        asyncio.run(ask())
    finally:
        server.kill()
        server.wait(30)


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
        return True
    return False


def test_credentials_can_be_read(cluster: Cluster, tmp_path: Path) -> None:
    """A file of credentials is used: what signs with its seed comes with the extra."""
    seed = encode_seed(bytes(range(32)), PREFIX_BYTE_USER).decode()
    file = tmp_path / "user.creds"
    file.write_text(
        "-----BEGIN NATS USER JWT-----\neyJ0eXAiOiJKV1QifQ.e30.c2ln\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    )
    assert len(make_stream(f"{cluster.url('by-credentials')}?credentials={file}", 1)) == 1
