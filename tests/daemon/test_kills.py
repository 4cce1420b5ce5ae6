"""Exactness while daemons and workers come and go."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING
from uuid import uuid4

import psycopg

from tests.daemon.between import Between
from tests.daemon.harness import Daemon, socket_folder, turn
from tests.daemon.kills import Kills
from tests.digits import Digits
from tracker_daemon import Tracker

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


def test_kills_in_short() -> None:
    """Workers, daemon and server killed in turn: nothing missing, nothing doubled, and trouble was really met."""
    words: list[str] = []
    with socket_folder() as folder:
        folder.chmod(0o755)
        kills = Kills(folder, 8, seed=11, say=words.append)
        assert kills.run(), "\n".join(words)
    for trouble in ("worker killed", "daemon killed", "answers lost", "found done", "tries failed"):
        assert kills.met[trouble], words


def test_rolling_restart(database: str, registry: CollectorRegistry) -> None:
    """Two daemons on one database, clients moved from one to the other and back: nothing lost, nothing doubled."""
    digits, moves = Digits(), 4
    with socket_folder() as folder:
        daemons = [Daemon(database, folder, "--relay-interval", "0.01") for _ in range(2)]
        try:
            for daemon in daemons:
                daemon.start()
            with Between(str(folder / "b"), daemons[0].path, lose_every=15) as between:
                tracker = Tracker(between.url, flush_interval=0.01, registry=registry)
                stop, producer, posted = threading.Event(), str(uuid4()), 0

                def call() -> None:
                    number = 0
                    while not stop.wait(0.001):
                        name = f"c{number // 31}"
                        assert tracker.record_turn(name, "a", digits.tokens(name))
                        number += 1

                calls = threading.Thread(target=call)
                calls.start()
                for move in range(1, moves + 1):
                    old, new = daemons[(move + 1) % 2], daemons[move % 2]
                    for _ in range(31):
                        posted += 1
                        line = turn(f"p{move}", tokens=digits.tokens(f"p{move}"))
                        headers = {"Tracker-Producer": producer, "Tracker-Sequence": str(posted)}
                        first = old.post(line, headers=headers).json
                        assert first == {"accepted": 1, "duplicate": False, "dead_lettered": 0}
                        assert new.post(line, headers=headers).json == {**first, "duplicate": True}
                    between.move(new.path)
                    assert old.stop() == 0
                    old.start()
                stop.set()
                calls.join()
                assert tracker.close(30).lost == 0
                assert between.lost
        finally:
            for daemon in daemons:
                daemon.kill()
    with psycopg.connect(database) as connection:
        sums = dict(connection.execute("SELECT thread_id, total_tokens::bigint FROM conversations").fetchall())
    verdict = digits.read(sums)
    assert verdict.exact, verdict
    assert registry.get_sample_value("tracker_flushes_total", {"outcome": "duplicate"})
