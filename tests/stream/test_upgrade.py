"""What docs/stream.md says of upgrades: brokers one after the other, and a journal that a tracker left."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.digits import Digits
from tests.helpers import query, wait_until
from tests.stream.cluster import Cluster
from tests.stream.conftest import make_stream
from tests.stream.harness import Consuming
from tests.stream.test_command import run
from tests.stream.test_sink import total

if TYPE_CHECKING:
    from tests.helpers import Trackers

GUIDE = (Path(__file__).parent.parent.parent / "docs" / "stream.md").read_text(encoding="utf-8")


def test_brokers_one_after_the_other(database: str, trackers: Trackers, tmp_path: Path) -> None:
    """Each ends and comes again once all follow, by `stream status`; calls go on meanwhile, and each is counted once."""
    digits = Digits()
    with Cluster(tmp_path, sync="2m") as cluster:
        url = cluster.url("chat")
        make_stream(url, 2)
        tracker = trackers(url, flush_interval=0.01)

        def call() -> None:
            for number in range(10):
                assert tracker.record_turn(f"t{number}", "a", digits.tokens(f"t{number}"))

        def exact() -> bool:
            rows = query(database, "SELECT thread_id, total_tokens::bigint FROM conversations")
            return digits.read(dict(rows)).exact

        with Consuming(url, database):
            for broker in cluster:
                cluster.kill(broker, number=signal.SIGTERM)
                call()
                wait_until(exact, "calls with one broker away")
                assert run("stream", "status", "--stream", url).exit_code == 1
                cluster.start(broker)
                wait_until(lambda: run("stream", "status", "--stream", url).exit_code == 0, "all to follow", 60)
                call()
            wait_until(exact, "every call")
        create = ("stream", "create", "--stream", url, "--partitions", "2", "--replicas", "3")
        assert run(*create).output == "nothing to do\n"


def test_what_a_journal_has_left(stream: str, database: str, trackers: Trackers, tmp_path: Path) -> None:
    """The guide's command publishes it."""
    tracker = trackers(stream, journal=tmp_path, flush_interval=60)
    for number in range(3):
        assert tracker.record_turn("t0", "a", 4**number)
    assert tracker.close(0).journaled == 3
    [command] = re.findall(r"`(python -c .+?)`", GUIDE)
    [_, *arguments] = shlex.split(command.replace("nats://n1,n2,n3/chat", stream).replace("DIR", str(tmp_path)))
    subprocess.run([sys.executable, *arguments], check=True, timeout=100)
    with Consuming(stream, database):
        wait_until(lambda: total(database) == 1 + 4 + 16, "the calls")
