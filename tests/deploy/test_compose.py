"""compose.yml brought up as it stands: traffic in the table, numbers in Prometheus, an alert when the database stops."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.deploy.compose import brought_up, images_of
from tests.deploy.manifests import DEPLOY
from tests.deploy.podman import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.deploy.compose import Compose
    from tests.deploy.podman import Podman

pytestmark = [
    pytest.mark.containers,
    pytest.mark.artefact("deploy/compose", "docker-compose", "podman", "runc", "prometheus"),
]

# All but Grafana, of which there is nothing to stand in.
JOBS = {"tracker-daemon", "chat-server"}
SERVICES = ("postgres", "migrate", "daemon", "traffic", "prometheus")
# The alert of a database that is away waits two minutes; here some seconds.
SOONER = {
    "instance:tracker_pending_age:seconds > 60\n        for: 1m": "instance:tracker_pending_age:seconds > 4\n        for: 2s"
}


@pytest.fixture(scope="module")
def compose(podman: Podman, daemon_image: str, postgres_image: str, prometheus_image: str) -> Iterator[Compose]:
    """The stack, up; down and without a trace at the end."""
    file = DEPLOY / "compose/compose.yml"
    assert {daemon_image, postgres_image, prometheus_image} <= images_of(file)
    with brought_up(podman, "trackertest", [file], SERVICES, SOONER) as compose:
        yield compose


def turns(compose: Compose) -> int:
    """Return how many turns the table shows."""
    statement = "SELECT coalesce(sum(turn_count), 0) FROM conversations"
    words = ("exec", compose.name("postgres"), "psql", "-U", "chat", "-d", "chat", "-At", "-c", statement)
    return int(compose.podman(*words))


def test_traffic_reaches_the_table(compose: Compose) -> None:
    """After `up` the table is made, and the traffic's turns appear in it, more and more."""
    assert compose.exit_code("migrate") == 0
    eventually(lambda: turns(compose) > 0, "traffic")
    seen = turns(compose)
    eventually(lambda: turns(compose) > seen + 200, "more traffic")


def test_recording_rules(compose: Compose) -> None:
    """The shipped rules are loaded, without a fault, and their recordings have the traffic's rate as value."""
    # A rate over five minutes, of which the first seconds are known.
    rate = 'instance:tracker_calls_applied:rate5m{job="tracker-daemon"}'
    eventually(lambda: compose.value(rate) > 5, "the recorded rate")
    eventually(
        lambda: compose.ask('instance:tracker_commit_lag_seconds:p99_rate5m{job="tracker-daemon"}'), "the recorded lag"
    )
    assert compose.value("sum(up)") == 2
    assert compose.value("sum(prometheus_rule_evaluation_failures_total)") == 0


def test_alert_when_the_database_stops(compose: Compose) -> None:
    """The alert fires, for the chat server and the daemon, while the database is stopped; nothing is lost by that."""
    firing = 'ALERTS{alertname="TrackerFlushStalled", alertstate="firing"}'
    assert compose.ask(firing) == []
    compose("stop", "postgres")
    eventually(lambda: {each["metric"]["job"] for each in compose.ask(firing)} == JOBS, "the alert for both")
    compose("start", "postgres")
    eventually(lambda: not compose.ask(firing), "the end of the alert")
    assert compose.value("sum(tracker_calls_lost_total)") == 0


def test_ends(compose: Compose) -> None:
    """`stop` ends traffic and daemon with status 0, and every call that was made is in the table."""
    compose("stop", "traffic")
    log = compose.log("traffic")
    assert compose.exit_code("traffic") == 0, log
    assert re.search(r"^APPLIED  [\d,]+ calls on \d+ conversations; 0 refused, set aside or lost$", log, re.MULTILINE)
    compose("stop", "daemon")
    assert compose.exit_code("daemon") == 0, compose.log("daemon")
