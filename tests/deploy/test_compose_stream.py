"""The stream beside compose.yml, brought up as it stands: a cluster, consumers that share it, and a broker that stops."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client import CollectorRegistry

from tests.deploy.compose import brought_up, images_of
from tests.deploy.manifests import DEPLOY
from tests.deploy.podman import eventually
from tests.digits import Digits
from tests.faults.harness import Errors, sums, tracking
from tests.faults.servers import Stream
from tests.helpers import query

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.deploy.compose import Compose
    from tests.deploy.podman import Podman

pytestmark = [
    pytest.mark.containers,
    pytest.mark.artefact("deploy/stream/compose.yml", "docker-compose", "podman", "runc", "nats-server", "prometheus"),
]

FILES = [DEPLOY / "compose/compose.yml", DEPLOY / "stream/compose.yml"]
# With what they depend on: Postgres and its tables, the brokers and the stream. The daemon and its traffic are not needed.
SERVICES = ("consumer", "prometheus")
BROKERS = ("n1", "n2", "n3")
CONSUMERS = (1, 2)
PARTITIONS = 4


@pytest.fixture(scope="module")
def compose(
    podman: Podman, daemon_image: str, postgres_image: str, prometheus_image: str, nats_image: str
) -> Iterator[Compose]:
    """The stack, up; down and without a trace at the end."""
    first, second = map(images_of, FILES)
    assert {daemon_image, postgres_image, prometheus_image} <= first
    assert second == {daemon_image, nats_image}
    with brought_up(podman, "streamtest", FILES, SERVICES, {}) as compose:
        yield compose


@pytest.fixture(scope="module")
def database(compose: Compose) -> str:
    """The database as the secret has it, by its container's address."""
    secret = (DEPLOY / "compose/secrets/database").read_text(encoding="utf-8").strip()
    return secret.replace("@postgres/", f"@{compose.address('postgres')}/")


@pytest.fixture(scope="module")
def stream(compose: Compose) -> str:
    """The stream as the secret has it, by its containers' addresses."""
    secret = (DEPLOY / "stream/secrets/stream").read_text(encoding="utf-8").strip()
    for name in BROKERS:
        secret = secret.replace(f"{name}:", f"{compose.address(name)}:")
    return secret


def status(compose: Compose) -> tuple[int, list[dict[str, Any]]]:
    """Return what `stream status` says in a consumer's container, with its settings: exit status, partitions."""
    asked = compose.podman.try_("exec", compose.name("consumer"), "tracker-daemon", "stream", "status", "--json")
    return asked.returncode, [json.loads(line) for line in asked.stdout.splitlines()]


def followed(compose: Compose) -> tuple[int, set[int]]:
    """Return the exit status of `stream status`, and by how many of their replicas the partitions are followed."""
    code, partitions = status(compose)
    return code, {each["facts"]["current"] for each in partitions}


def turns(database: str) -> int:
    """Return how many turns the table shows."""
    ((found,),) = query(database, "SELECT coalesce(sum(turn_count), 0)::bigint FROM conversations")
    return int(found)


def owned(database: str) -> list[int]:
    """Return how many partitions each consumer has."""
    found = query(database, "SELECT count(*) FROM tracker_partitions WHERE owner IS NOT NULL GROUP BY owner")
    return [int(number) for (number,) in found]


def test_the_stream_is_made(compose: Compose) -> None:
    """The brokers are one cluster, and the stream is made there, at the first go, with three replicas that all follow."""
    assert compose.exit_code("migrate") == 0
    assert compose.exit_code("stream") == 0
    assert compose.podman.inspect(compose.name("stream"))["RestartCount"] == 0
    assert compose.log("stream").splitlines() == [f"made chat-{number}" for number in range(PARTITIONS)]
    eventually(lambda: status(compose)[0] == 0, "a stream with which nothing is wrong")
    _, partitions = status(compose)
    facts = [each["facts"] for each in partitions]
    assert [(each["replicas"], each["current"], set(each["peers"])) for each in facts] == PARTITIONS * [
        (3, 3, {*BROKERS})
    ]


def test_consumers_share_it(compose: Compose, database: str) -> None:
    """Both consumers are healthy by the image's own check, and each has half of the partitions."""
    for number in CONSUMERS:
        eventually(lambda number=number: compose.podman.healthy(compose.name("consumer", number)), "a consumer")  # type: ignore[misc]
    eventually(lambda: owned(database) == [2, 2], "shares")


def test_a_broker_stops(compose: Compose, database: str, stream: str) -> None:
    """Calls of a tracker go on to the table while a broker that leads is away, and when it is back; each counts once."""
    digits = Digits()
    with tracking(stream, Errors(), CollectorRegistry()) as tracker, Stream(tracker, digits) as calls:
        eventually(lambda: turns(database), "calls in the table")
        leader = status(compose)[1][0]["facts"]["leader"]
        assert leader in BROKERS
        compose("stop", leader)
        seen = calls.made
        eventually(lambda: turns(database) > seen, "calls that were made while it was away")
        eventually(lambda: followed(compose) == (1, {2}), "a status that tells it")
        # As docs/stream.md has an upgrade: another container with the same volume.
        compose("up", "--detach", "--no-deps", "--force-recreate", "--no-build", "--pull", "never", leader)
        eventually(lambda: followed(compose) == (0, {3}), "replicas that follow")
        seen = calls.made
        eventually(lambda: turns(database) > seen, "calls that were made afterwards")
    eventually(lambda: not digits.read(sums(database)).missing, "the last calls")
    verdict = digits.read(sums(database))
    assert (verdict.missing, verdict.doubled, verdict.once) == ([], [], calls.made)


def test_scraped(compose: Compose) -> None:
    """Prometheus has both consumers, by the service's name, and the rule that one must be there; nothing is amiss."""
    eventually(lambda: compose.value('sum(up{job="tracker-consumer"})') == 2, "both consumers in the scrape")
    eventually(lambda: compose.value("sum(tracker_stream_partition_owned)") == PARTITIONS, "partitions with a reader")
    eventually(lambda: compose.value("tracker_stream_expected") == 1, "the rule")
    eventually(lambda: compose.value("sum(tracker_stream_messages_total)") > 0, "messages")
    assert compose.ask('ALERTS{alertname=~"TrackerStream.+"}') == []
    assert compose.value("sum(prometheus_rule_evaluation_failures_total)") == 0


def test_ends(compose: Compose, database: str) -> None:
    """SIGTERM ends a consumer with 0, and the other one has all partitions then; it ends as well."""
    compose.podman("stop", compose.name("consumer", 1))
    assert compose.exit_code("consumer", 1) == 0, compose.log("consumer", 1)
    eventually(lambda: owned(database) == [PARTITIONS], "the other one with all of it")
    compose("stop", "consumer")
    assert compose.exit_code("consumer", 2) == 0, compose.log("consumer", 2)
    assert owned(database) == []
