"""Fixtures: a daemon that really runs, what its `/metrics` says; podman, and the images, each made once."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import httpx
import psycopg
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from psycopg import sql

from tests.deploy import report
from tests.deploy.manifests import ROOT, known_path
from tests.deploy.podman import Podman, make_daemon, make_nats, make_podman, make_postgres, make_prometheus
from tests.helpers import running, wait_until
from tracker_daemon.clock import SystemClock
from tracker_daemon.daemon.health import ask
from tracker_daemon.daemon.options import Listen
from tracker_daemon.stream.address import address
from tracker_daemon.stream.consumer import Consumer
from tracker_daemon.stream.metrics import StreamCollector
from tracker_daemon.stream.partition import Following, PartitionNumbers

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

    from tracker_daemon.embedded import EmbeddedPostgres


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note in each report what the test is about."""
    found = yield
    if call.when != "teardown" or found.failed:
        found.user_properties += [("artefact", mark.args) for mark in item.iter_markers("artefact")]
    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print which artefact was exercised by which tool, and what was skipped and why."""
    if config.getoption("markexpr") == "not containers":
        return
    results, reasons = [], Counter[str]()
    for outcome in report.OUTCOMES:
        for each in terminalreporter.getreports(outcome):
            marks = [args for name, args in each.user_properties if name == "artefact"]
            results += [(path, tuple(tools), outcome) for path, *tools in marks]
            if outcome == "skipped" and str(each.fspath).startswith("tests/deploy"):
                reason = each.longrepr[2] if isinstance(each.longrepr, tuple) else str(each.longrepr)
                reasons[reason.removeprefix("Skipped: ")] += 1
    terminalreporter.section("what of deploy/ was exercised, by what")
    paths = {name: known_path(name) for name in ("helm", "kubectl", "promtool", "pg_dump", "pg_restore", "psql")}
    for line in report.lines(results, reasons, paths):
        terminalreporter.line(line)


Samples: TypeAlias = "dict[str, dict[str, set[str]]]"


@dataclass(frozen=True)
class Daemon:
    """A running daemon: where it listens, writes its journal, and has its tables."""

    socket: Path
    journal: Path
    database: str

    def client(self) -> httpx.Client:
        """Return a client of its socket."""
        return httpx.Client(transport=httpx.HTTPTransport(uds=str(self.socket)), base_url="http://daemon", timeout=30)


@pytest.fixture(scope="session")
def daemon(postgres: EmbeddedPostgres, template: str, server_folder: Path) -> Iterator[Daemon]:
    """One daemon for the run, that has taken each kind of call and committed it."""
    with psycopg.connect(postgres.conninfo, autocommit=True) as connection:
        statement = sql.SQL("CREATE DATABASE deploy TEMPLATE {}").format(sql.Identifier(template))
        connection.execute(statement)
    conninfo = psycopg.conninfo.make_conninfo(postgres.conninfo, dbname="deploy")
    found = Daemon(server_folder / "tracker.sock", server_folder / "journal", conninfo)
    command = [sys.executable, "-m", "tracker_daemon", "serve", "--database", conninfo]
    command += ["--listen", f"unix:{found.socket}", "--journal", str(found.journal)]
    with running(command, {"PYTHONPATH": str(ROOT)}) as program, found.client() as client:

        def ready() -> bool:
            assert program.process.poll() is None, "".join(program.errors)
            return ask(Listen(path=found.socket), 10)[0]

        wait_until(ready, "the daemon is ready")
        calls = (
            '{"call": "ensure_conversation", "thread_id": "t"}\n'
            '{"call": "record_turn", "thread_id": "t", "agent_name": "a", "tokens": 1, "cost": "0.1"}\n'
            '{"call": "resolve", "thread_id": "t", "resolution_type": "r"}\n'
        )
        answer = client.post("/v1/calls", params={"wait": "committed"}, content=calls)
        assert answer.status_code == 200, answer.text
        yield found


@pytest.fixture(scope="session")
def scraped(daemon: Daemon) -> str:
    """What the daemon's `/metrics` says."""
    with daemon.client() as client:
        return client.get("/metrics").raise_for_status().text


def _unused(*_: Any) -> Any:
    raise AssertionError("nothing is consumed here")


def of_a_consumer() -> str:
    """Return what the `/metrics` of a stream's consumer adds to those of every flush."""
    following = Following()
    consumer = Consumer(address("nats://localhost/s"), _unused, _unused, SystemClock(), following)
    consumer.partitions = [PartitionNumbers(owned=True)]
    registry = CollectorRegistry()
    registry.register(StreamCollector(consumer))
    return generate_latest(registry).decode()


@pytest.fixture(scope="session")
def samples(scraped: str) -> Samples:
    """Every sample's name in a scrape, with the values of each of its labels."""
    found: Samples = {}
    for family in text_string_to_metric_families(scraped + of_a_consumer()):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for name, value in sample.labels.items():
                labels.setdefault(name, set()).add(value)
    return found


@pytest.fixture(scope="session")
def podman() -> Iterator[Podman]:
    """Podman on storage of its own; what runs at the end is ended."""
    podman = make_podman()
    podman.end()
    yield podman
    podman.end()


@pytest.fixture(scope="session")
def daemon_image(podman: Podman) -> str:
    """The project's image, from the Dockerfile as it stands."""
    return make_daemon(podman)


@pytest.fixture(scope="session")
def postgres_image(podman: Podman) -> str:
    """The stand-in for Postgres' image."""
    return make_postgres(podman)


@pytest.fixture(scope="session")
def prometheus_image(podman: Podman) -> str:
    """The stand-in for Prometheus' image."""
    return make_prometheus(podman)


@pytest.fixture(scope="session")
def nats_image(podman: Podman) -> str:
    """The stand-in for the image of the stream's brokers."""
    return make_nats(podman)
