"""What each request is answered, of a daemon in a process of its own."""

from __future__ import annotations

import http.client
import json
import signal
import threading
from contextlib import closing
from typing import TYPE_CHECKING
from uuid import uuid4

import psycopg
import pytest

from tests.daemon.harness import Daemon, serving, turn
from tests.helpers import PATIENCE, away, query, refusing_port, totals, wait_until
from tracker_daemon import Tracker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client import CollectorRegistry


TURN = turn("t", agent_name="a", tokens=3, cost="0.25")


@pytest.fixture
def daemon(database: str) -> Iterator[Daemon]:
    """A daemon on the test's database."""
    with serving(database) as found:
        yield found


def test_accepted(daemon: Daemon) -> None:
    """202 says how many were taken; `?wait=committed` answers 200 once they are in the database, before them as well."""
    reply = daemon.post(TURN * 3)
    assert (reply.status, reply.json) == (202, {"accepted": 3})
    assert daemon.post("").json == daemon.post("\n \r\n").json == {"accepted": 0}
    lines = [
        {"call": "ensure_conversation", "thread_id": "e", "at": "2026-01-31T12:00:00+02:00"},
        {"call": "record_turn", "thread_id": "e", "at": "2026-01-31T10:00:01.5Z", "cost": 0.1, "agent_name": None},
        {"call": "resolve", "thread_id": "e", "resolution_type": "done", "at": "2026-01-31T10:00:02Z"},
    ]
    reply = daemon.post("\r\n".join(map(json.dumps, lines)), wait=True)
    assert (reply.status, reply.json) == (200, {"accepted": 3})
    statement = "SELECT turn_count, total_tokens, total_cost_usd::text FROM conversations WHERE thread_id = 't'"
    assert query(daemon.database, statement) == [(3, 9, "0.75")]
    statement = (
        "SELECT started_at = '2026-01-31 10:00Z', last_activity = '2026-01-31 10:00:01.5Z',"
        " ended_at = '2026-01-31 10:00:02Z', total_cost_usd::text FROM conversations WHERE thread_id = 'e'"
    )
    assert query(daemon.database, statement) == [(True, True, True, "0.1")]


def test_nothing_of_a_request_with_an_error(daemon: Daemon) -> None:
    """400 names every wrong line, at most twenty; nothing of the request is taken, and they are counted as rejected."""
    body = TURN + "\n{\n" + TURN + '{"call": "record_turn", "thread_id": ""}\n' + turn("t", cost="NaN") + "[]\n"
    reply = daemon.post(body, wait=True)
    assert reply.status == 400
    assert [each["line"] for each in reply.json["errors"]] == [3, 5, 6, 7]
    assert all(each["error"] for each in reply.json["errors"])
    assert len(daemon.post("x\n" * 1_000).json["errors"]) == 20
    assert daemon.metric("tracker_calls_accepted_total") == 0
    assert daemon.metric("tracker_calls_rejected_total") == 24
    assert daemon.post(TURN, wait=True).status == 200
    assert totals(daemon.database).turns == 1


def test_idempotent_across_a_restart(daemon: Daemon) -> None:
    """A producer's request that comes again, or an older one, is acknowledged and not applied, also by the next daemon."""
    headers = {"Tracker-Producer": str(uuid4())}
    for sequence, duplicate in ((5, False), (5, True), (4, True), (9, False)):
        reply = daemon.post(TURN * 2, headers={**headers, "Tracker-Sequence": str(sequence)})
        assert (reply.status, reply.json) == (202, {"accepted": 2, "duplicate": duplicate, "dead_lettered": 0})
    assert totals(daemon.database).turns == 4
    assert daemon.stop() == 0
    daemon.start()
    for sequence, duplicate in ((9, True), (5, True), (10, False)):
        reply = daemon.post(TURN, wait=True, headers={**headers, "Tracker-Sequence": str(sequence)})
        assert (reply.status, reply.json) == (200, {"accepted": 1, "duplicate": duplicate, "dead_lettered": 0})
    assert daemon.post("", headers={**headers, "Tracker-Sequence": "11"}).json == {
        "accepted": 0,
        "duplicate": False,
        "dead_lettered": 0,
    }
    assert totals(daemon.database).turns == 5


def test_dead_letters_are_told(daemon: Daemon) -> None:
    """A producer's request whose calls the table refuses says how many are set aside, also when it comes again."""
    with psycopg.connect(daemon.database, autocommit=True) as connection:
        connection.execute("ALTER TABLE conversations ADD CHECK (thread_id <> 'refused')")
    headers = {"Tracker-Producer": str(uuid4()), "Tracker-Sequence": "1"}
    for duplicate in (False, True):
        reply = daemon.post(TURN + turn("refused") * 2, wait=True, headers=headers)
        assert (reply.status, reply.json) == (200, {"accepted": 3, "duplicate": duplicate, "dead_lettered": 2})
    assert totals(daemon.database).turns == 1


def test_every_json_body_is_a_line(daemon: Daemon) -> None:
    """Whatever is answered in JSON ends with a newline, errors too."""
    replies = [daemon.get(path) for path in ("/livez", "/readyz", "/status.json", "/nothing")]
    replies += [daemon.post(TURN), daemon.post("{"), daemon.post(TURN, headers={"Tracker-Producer": "x"})]
    assert [reply.status for reply in replies] == [200, 200, 200, 404, 202, 400, 400]
    for reply in replies:
        assert reply.body.endswith(b"}\n")
        assert reply.body.count(b"\n") == 1


def test_headers_that_name_nothing(daemon: Daemon) -> None:
    """Half an identity, or one that is none, is refused and nothing is taken."""
    good = {"Tracker-Producer": str(uuid4()), "Tracker-Sequence": "1"}
    for wrong in (
        {"Tracker-Producer": good["Tracker-Producer"]},
        {"Tracker-Sequence": "1"},
        {**good, "Tracker-Producer": "no uuid"},
        *({**good, "Tracker-Sequence": text} for text in ("0", "-1", "1.5", "x", "", str(2**63), "9" * 4_000)),
    ):
        reply = daemon.post(TURN, headers=wrong)
        assert (reply.status, list(reply.json)) == (400, ["error"]), wrong
    assert daemon.post(TURN, headers={**good, "Tracker-Sequence": str(2**63 - 1)}).status == 202
    assert totals(daemon.database).turns == 1


def test_methods_and_paths_as_json(daemon: Daemon) -> None:
    """What is not there, or not so, is said in JSON; HEAD has no body; every answer carries the security headers."""
    for method, path, status in (
        ("GET", "/v1/calls", 405),
        ("PUT", "/metrics", 405),
        ("DELETE", "/v1/batches", 405),
        ("GET", "/nowhere", 404),
        ("GET", "/page/..%2Fapp.py", 404),
        ("GET", "/page/../app.py", 404),
        ("DELETE", "/v1/producers/none/0", 404),
    ):
        reply = daemon.request(method, path)
        assert (reply.status, list(reply.json)) == (status, ["error"]), path
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'self'" in reply.headers["content-security-policy"]
        assert reply.headers["server"] is None
    for path in ("/", "/metrics", "/livez", "/readyz", "/status.json"):
        reply = daemon.request("HEAD", path)
        assert (reply.status, reply.body) == (200, b""), path
    assert daemon.request("POST", "/v1/calls?wait=later", TURN).status == 400
    assert daemon.request("POST", "/v1/batches", b"x").status == 415


def test_metrics_by_accept(daemon: Daemon) -> None:
    """Prometheus' text, or OpenMetrics for who accepts it; the books add up over calls and trackers' batches."""
    daemon.post(TURN * 5, wait=True)
    daemon.post(TURN, headers={"Tracker-Producer": str(uuid4()), "Tracker-Sequence": "1"})
    text = daemon.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain; version=")
    open_metrics = daemon.get("/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert open_metrics.headers["content-type"].startswith("application/openmetrics-text")
    assert open_metrics.body.endswith(b"# EOF\n")
    assert b'tracker_calls_accepted_total{call="record_turn"} 6.0' in open_metrics.body
    assert daemon.metric("tracker_calls_applied_total") == 6
    assert daemon.metric("tracker_queue_calls") == 0
    assert daemon.metric("tracker_build_info") == 1


def test_instants_that_clients_give(daemon: Daemon) -> None:
    """Commit lag and the oldest pending call are of the taking, whatever instant a call carries."""
    before = daemon.metric("process_start_time_seconds")
    for at in ("1990-01-01T00:00:00Z", "0001-01-01T00:00:00Z", "2999-01-01T00:00:00Z"):
        daemon.post(turn("t", at=at) + TURN, wait=True)
        assert daemon.post(turn("t", at=at)).status == 202
        oldest = daemon.metric("tracker_oldest_pending_timestamp_seconds")
        assert oldest == 0 or before < oldest < before + 600
        daemon.post("", wait=True)
    assert 0 < daemon.metric("tracker_commit_lag_seconds_sum") < 60


def test_ready_when_the_database_is(daemon: Daemon, database: str) -> None:
    """`/readyz` says why not while the database refuses, and is ready again by itself; `/livez` and `/` are all the while."""
    with away(database):
        why = "not currently accepting connections"
        wait_until(lambda: why in str(daemon.get("/readyz").json.get("reason")), "the reason")
        reply = daemon.get("/readyz")
        assert (reply.status, reply.json["status"], reply.headers["retry-after"]) == (503, "not_ready", "1")
        assert daemon.get("/livez").status == daemon.get("/").status == daemon.get("/status.json").status == 200
        assert daemon.post(TURN).status == 202  # taken, for later
        headers = {"Tracker-Producer": str(uuid4()), "Tracker-Sequence": "1"}
        refused = daemon.post(TURN, headers=headers)
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
    wait_until(lambda: daemon.get("/readyz").status == 200, "ready")
    assert daemon.post(TURN, headers=headers).json == {"accepted": 1, "duplicate": False, "dead_lettered": 0}
    daemon.post("", wait=True)
    assert totals(database).turns == 2


def test_full(database: str) -> None:
    """429 with `Retry-After` at the tracker's bound, and before it at a client's share of it, which leaves room for others.

    Nothing of such a request is taken; calls on threads that are pending already go on being taken.
    """
    with refusing_port() as port:
        pass
    options = ["--max-queue-size", "10", "--max-pending", "15", "--flush-interval", "60"]
    with serving(database, *options, "--listen", f"127.0.0.1:{port}") as daemon:

        def post(names: str, numbers: int, address: str) -> tuple[int, str, str]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE, source_address=(address, 0))
            with closing(connection):
                connection.request("POST", "/v1/calls", "".join(turn(f"{names}{i}") for i in range(numbers)))
                reply = connection.getresponse()
                return reply.status, reply.headers["retry-after"] or "", str(json.loads(reply.read()).get("error"))

        greedy, honest = "127.0.0.1", "127.0.0.2"
        assert daemon.post(TURN * 11).status == 400  # never fits
        assert post("a", 10, greedy)[0] == 202
        wait_until(lambda: daemon.metric("tracker_queue_depth") == 10)
        status, again, why = post("b", 10, greedy)
        assert (status, again) == (429, "1")
        assert "max_pending is reached" in why
        status, again, why = post("b", 4, greedy)
        assert (status, again) == (429, "1")
        assert "this client" in why
        assert post("a", 10, greedy)[0] == 202
        wait_until(lambda: daemon.metric("tracker_queue_calls") == 20)
        assert post("c", 4, honest)[0] == 202
        assert daemon.metric("tracker_calls_accepted_total") == 24
        assert daemon.metric('tracker_calls_rejected_total{reason="full"}') == 10
        assert daemon.metric('tracker_calls_rejected_total{reason="share"}') == 4
        assert daemon.metric('tracker_requests_refused_total{status="429"}') == 2
        daemon.post("", wait=True)
        assert post("b", 4, greedy)[0] == 202
        daemon.post("", wait=True)
        assert totals(database).turns == 28


def test_greedy_while_the_database_is_away(database: str) -> None:
    """A client that posts new threads until it is refused leaves room: another one's calls are all taken meanwhile."""
    with refusing_port() as port:
        pass
    options = ["--max-pending", "4000", "--flush-interval", "0.01", "--listen", f"127.0.0.1:{port}"]
    with serving(database, *options) as daemon, psycopg.connect(database) as blocker:
        blocker.execute("LOCK TABLE conversations IN ACCESS EXCLUSIVE MODE")

        def post(name: str, address: str) -> tuple[int, str | None]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE, source_address=(address, 0))
            with closing(connection):
                connection.request("POST", "/v1/calls", "".join(turn(f"{name}-{i}") for i in range(100)))
                reply = connection.getresponse()
                return reply.status, reply.headers["retry-after"]

        taken, status = 0, 202
        while status == 202:
            status, again = post(f"greedy-{taken}", "127.0.0.1")
            taken += status == 202
        assert (status, again) == (429, "1")
        assert [post(f"honest-{number}", "127.0.0.2") for number in range(5)] == [(202, None)] * 5
        assert post(f"greedy-{taken}", "127.0.0.1")[0] == 429
        blocker.rollback()
        daemon.post("", wait=True)
        assert totals(database).turns == 100 * (taken + 5)
        assert post(f"greedy-{taken}", "127.0.0.1")[0] == 202


def test_trackers_batches_that_wait_are_seen(daemon: Daemon, registry: CollectorRegistry) -> None:
    """A daemon that serves trackers alone shows what they wait for while the database is away, from try to try."""
    tracker = Tracker(daemon.url, flush_interval=0.01, registry=registry)
    tracker.record_turn("before")
    tracker.flush(PATIENCE)
    assert daemon.metric("tracker_oldest_pending_timestamp_seconds") == 0
    with away(daemon.database):
        tracker.record_turn("t")
        tries = daemon.metric('tracker_flushes_total{outcome="retry"}')
        since = set()

        def tried(times: int) -> bool:
            since.add(daemon.metric("tracker_oldest_pending_timestamp_seconds"))
            return daemon.metric('tracker_flushes_total{outcome="retry"}') >= tries + times

        wait_until(lambda: tried(1), "a try")
        since.clear()
        wait_until(lambda: tried(4), "further tries")
        assert len(since) == 1
        assert since.pop() > 0
        assert (daemon.metric("tracker_queue_calls"), daemon.metric("tracker_queue_depth")) == (1, 1)
    assert tracker.close(PATIENCE).lost == 0
    assert (daemon.metric("tracker_queue_calls"), daemon.metric("tracker_calls_applied_total")) == (0, 2)


def test_draining(daemon: Daemon) -> None:
    """From the first moment of the drain: not ready, calls refused with `Retry-After`, alive until the end."""
    with psycopg.connect(daemon.database) as blocker:
        blocker.execute("LOCK TABLE conversations IN ACCESS EXCLUSIVE MODE")
        waiting: list[int] = []
        asked = threading.Thread(target=lambda: waiting.append(daemon.post(TURN, wait=True).status))
        asked.start()
        wait_until(lambda: daemon.metric("tracker_calls_accepted_total"), "the call")
        daemon.signal(signal.SIGTERM)
        daemon.says("stopping")
        reply = daemon.get("/readyz")
        assert (reply.status, reply.json["status"]) == (503, "draining")
        reply = daemon.post(TURN)
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
        assert daemon.get("/livez").status == 200
        blocker.rollback()
    assert daemon.end() == 0
    asked.join()
    assert waiting == [200]
    assert totals(daemon.database).turns == 1
