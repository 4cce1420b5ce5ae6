"""`tracker-daemon consume` and `tracker-daemon stream`, as operators run them."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import psycopg
import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from tests.daemon.harness import Manager, socket_folder
from tests.helpers import away, listens, query, running, wait_until
from tests.stream.harness import Consuming
from tests.stream.test_consumer import publish
from tests.stream.test_sink import uuid4
from tracker_daemon import cli

if TYPE_CHECKING:
    from click.testing import Result

    from tests.stream.cluster import Cluster


def run(*arguments: str) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(cli.program, arguments)


def test_stream_create_and_status(cluster: Cluster, database: str) -> None:
    """The stream is made once; its status is a line a partition, with what is wrong, and an exit status."""
    url = cluster.url(f"s{uuid4().hex[:8]}")
    missing = run("stream", "status", "--stream", url)
    assert missing.exit_code == 1
    assert "tracker-daemon stream create" in missing.stderr
    create = ("stream", "create", "--stream", url, "--partitions", "2", "--max-bytes", str(64 << 20))
    made = run(*create)
    assert (made.exit_code, len(made.output.splitlines())) == (0, 2), made.output
    assert run(*create).output == "nothing to do\n"
    publish(url, uuid4(), 1)
    found = run("stream", "status", "--stream", url, "--database", database, "--json")
    facts = [json.loads(line)["facts"] for line in found.stdout.splitlines()]
    assert [(each["partition"], each["last"], each["current"]) for each in facts] == [(0, 1, 3), (1, 1, 3)]
    assert (found.exit_code, found.stdout.count("no consumer reads it")) == (1, 2)
    with Consuming(url, database):
        wait_until(lambda: run("stream", "status", "--stream", url, "--database", database).exit_code == 0, "a reader")
    other = run("stream", "create", "--stream", url, "--partitions", "4")
    assert other.exit_code == 1
    assert "with 2 partitions, not 4" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("consume", "--database", "host=x", "--stream", "nats://a"), "stream's name"),
        (("consume", "--database", "host=x", "--stream", "nats://a/b", "--lease", "0.1"), "lease"),
        (("consume", "--database", "host=x", "--stream", "nats://a/b", "--listen", "x"), "listen"),
        (("consume", "--database", "embedded:x", "--stream", "nats://a/b", "--check-config"), "must be a server's"),
        (("stream", "status", "--database", "embedded:x", "--stream", "nats://a/b"), "must be a server's"),
        (("stream", "adopt", "--database", "embedded:x", "--stream", "nats://a/b"), "must be a server's"),
        (("stream", "create", "--stream", "nats://a/b", "--partitions", "0"), "partitions"),
    ],
)
def test_wrong_settings(arguments: tuple[str, ...], words: str) -> None:
    """A wrong setting stops the start with a message that names it."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr


def test_commands_of_the_runbooks(stream: str, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command about a stream that a runbook asks for ends well on one that is as it should be."""
    monkeypatch.setenv("TRACKER_STREAM", stream)
    monkeypatch.setenv("TRACKER_DATABASE", database)
    commands = {
        command
        for book in (Path(__file__).parent.parent.parent / "deploy" / "runbooks").glob("*.md")
        for command in re.findall(r"^\$ tracker-daemon (.+)$", book.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert {command.split(" --")[0] for command in commands} == {"stream status", "stream adopt"}
    for command in commands:
        result = run(*shlex.split(os.path.expandvars(command)))
        assert result.exit_code == 0, result.output


def test_a_second_signal_ends_a_consumer_at_once(stream: str, database: str) -> None:
    """A consumer whose transaction waits for a lock ends at the second signal, and its messages stay in the stream."""
    command = [sys.executable, "-m", "tracker_daemon", "consume", "--database", database, "--stream", stream]
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with psycopg.connect(database) as lock:
        lock.execute("LOCK TABLE conversations IN ACCESS EXCLUSIVE MODE")
        publish(stream, uuid4(), 1)
        process = subprocess.Popen(
            [*command, "--shutdown-timeout", "600", "--lease", "300"], stderr=subprocess.PIPE, text=True
        )
        try:
            wait_until(lambda: query(database, waiting) != [(0,)], "a transaction that waits")
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.communicate()
    publish(stream, uuid4(), 1)
    with Consuming(stream, database):
        wait_until(lambda: query(database, "SELECT sum(turn_count) FROM conversations") == [(40,)], "all of them")


def test_consume(stream: str, database: str) -> None:
    """A consumer is ready, shows its partitions in metrics and status page, and ends at SIGTERM with its leases given up."""
    with tempfile.TemporaryDirectory(prefix="trk-") as folder:
        socket = Path(folder) / "s"
        command = [sys.executable, "-m", "tracker_daemon", "consume", "--database", database, "--stream", stream]
        process = subprocess.Popen(
            [*command, "--listen", f"unix:{socket}", "--flush-interval", "0.05"],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ},
        )
        try:
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://consumer") as client:
                wait_until(lambda: listens(socket), "the socket")
                wait_until(lambda: client.get("/readyz").status_code == 200, "readiness")
                publish(stream, uuid4(), 1)
                wait_until(lambda: query(database, "SELECT count(*) FROM conversations") == [(20,)], "the rows")
                wait_until(lambda: all(each["owned"] for each in client.get("/status.json").json()["stream"]), "owners")
                families = {each.name: each for each in text_string_to_metric_families(client.get("/metrics").text)}
                owned = {
                    each.labels["partition"]: each.value for each in families["tracker_stream_partition_owned"].samples
                }
                assert owned == {"0": 1.0, "1": 1.0}
                assert families["tracker_stream_deltas"].samples[0].value == 20
                applied = {each.labels["call"]: each.value for each in families["tracker_calls_applied"].samples}
                assert applied["record_turn"] == 20
                assert client.get("/").status_code == 200
                assert client.post("/v1/calls").status_code in (404, 405)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()
            _, log = process.communicate()
    assert "partition_claimed" in log
    assert query(database, "SELECT count(*) FROM tracker_partitions WHERE owner IS NOT NULL") == [(0,)]


def test_manager_of_a_consumer(stream: str, database: str) -> None:
    """Systemd is told READY at once, since when it is not ready and what waits, that it is, and that it ends."""
    since = r"STATUS=not ready since [\d-]+ [\d:]+ UTC, "
    with socket_folder() as folder, Manager(str(folder / "notify")) as manager:
        command = [sys.executable, "-m", "tracker_daemon", "consume", "--database", database, "--stream", stream]
        with running(command, manager.environment) as consumer:
            assert manager.hears() == "READY=1"
            manager.hears_until(since + "0 messages wait: the stream was not reached yet")
            manager.hears_until("STATUS=ready")
            with away(database):
                manager.hears_until(since + "0 messages wait: .*not currently accepting connections.*")
            manager.hears_until("STATUS=ready")
            consumer.process.terminate()
            manager.hears_until("STOPPING=1")
            assert consumer.end().returncode == 0
