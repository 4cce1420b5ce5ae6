"""Eight workers, a daemon and a server that are killed in turn, with the digits oracle: `make soak-daemon SECONDS=300`.

Workers with a journal are killed and started again, as is the daemon (`kill -9`, SIGTERM), and now and then the
server. Every so often a daemon's answer is lost on the way. Beside the workers two clients post lines: one with
`Tracker-Producer`, which repeats until it is answered, and one without, whose calls count once if they were answered
202 and at most once if they were not.

Exit status 0: nothing missing, nothing doubled, and each kind of trouble was really met.
"""

from __future__ import annotations

import argparse
import http.client
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from uuid import uuid4

from tests.conftest import run_migrate
from tests.daemon.between import Between
from tests.daemon.harness import ROOT, Daemon, turn
from tests.digits import CALLS_PER_THREAD, of_lives
from tests.helpers import PROGRAMS, query, wait_until
from tracker_daemon.embedded import EmbeddedPostgres

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WORKERS = 8
_PAUSE = 0.7


class Worker:
    """One worker through its lives. One without a journal is never killed: it would lose what was not flushed."""

    def __init__(self, url: str, name: str, folder: Path, *, journal: bool) -> None:
        self._url, self.name, self._folder = url, name, folder
        self.journal = str(folder / f"{name}.journal") if journal else "-"
        self.log = folder / f"{name}.log"
        self.lives: list[tuple[str, Path, bool]] = []
        self.process: subprocess.Popen[bytes]

    def start(self) -> None:
        """Begin another life."""
        name = f"{self.name}.{len(self.lives)}"
        numbers = self._folder / name
        numbers.write_bytes(bytes(32))
        self.lives.append((name, numbers, False))
        program = str(PROGRAMS / "daemon_worker.py")
        with self.log.open("a") as log:
            print("-- life", name, file=log, flush=True)
            self.process = subprocess.Popen(
                [sys.executable, program, self._url, name, str(numbers), self.journal],
                stdout=subprocess.DEVNULL,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )

    def kill(self) -> None:
        """End this life at once."""
        self.process.kill()
        self.process.wait()
        self.lives[-1] = (*self.lives[-1][:2], True)

    def numbers(self) -> Iterator[tuple[str, int, int, int, int, bool]]:
        """Yield of each life: its name, calls made, batches found done, tries failed, calls left in the journal, killed."""
        for name, file, killed in self.lives:
            yield name, *struct.unpack("<qqqq", file.read_bytes()), killed


class Poster(threading.Thread):
    """A client that posts lines: with an identity it repeats until it is answered, without one it goes on."""

    def __init__(self, daemon: Daemon, *, identity: bool) -> None:
        super().__init__()
        self._daemon, self.name = daemon, "identified" if identity else "plain"
        self._producer = str(uuid4()) if identity else None
        self.stop = threading.Event()
        self.made = 0
        self.unanswered: set[int] = set()
        self.repeats = self.duplicates = 0

    def run(self) -> None:
        """Post until told to stop; what is under way is brought to its end."""
        while not self.stop.wait(0.003):
            line = turn(f"{self.name}.0.{self.made // CALLS_PER_THREAD}", tokens=4 ** (self.made % CALLS_PER_THREAD))
            while not self._post(line) and self._producer is not None:
                self.repeats += 1
                time.sleep(0.02)  # a client's own patience
            self.made += 1

    def _post(self, line: str) -> bool:
        headers = {}
        if self._producer is not None:
            headers = {"Tracker-Producer": self._producer, "Tracker-Sequence": str(self.made + 1)}
        try:
            reply = self._daemon.post(line, headers=headers)
        except (OSError, http.client.HTTPException):
            self.unanswered.add(self.made)
            return False
        if reply.status == 202:
            self.duplicates += bool(reply.json.get("duplicate"))
            return True
        assert reply.status in (429, 503), reply
        self.unanswered.add(self.made)
        return False


class Kills:
    """One run.

    Args:
        folder: whose subfolders the server's user can reach.
        seconds: how long things are killed.
        seed: of what is killed when.
        say: takes a line about what was met.
    """

    def __init__(self, folder: Path, seconds: float, seed: int, say: Callable[[str], object] = print) -> None:
        self._folder, self._seconds, self._say = folder, seconds, say
        self._random = random.Random(seed)
        self.met: Counter[str] = Counter()

    def run(self) -> bool:
        """Kill until the time is up; return whether every call was counted once."""
        settings = {"max_connections": "60", "deadlock_timeout": "200ms"}
        with EmbeddedPostgres(self._folder / "pg", settings=settings, port=0) as self._postgres:
            run_migrate(self._postgres.conninfo)
            options = [
                "--journal",
                str(self._folder / "journal"),
                "--flush-interval",
                "0.05",
                "--relay-interval",
                "0.01",
            ]
            self._daemon = Daemon(self._postgres.conninfo, self._folder, *options)
            try:
                self._daemon.start()
                with Between(str(self._folder / "b"), self._daemon.path, lose_every=40) as between:
                    self._with_workers(between)
                self.met["answers lost"] = between.lost
                assert self._daemon.stop() == 0, self._daemon.log
            finally:
                self._daemon.kill()
            return self._verdict()

    def _with_workers(self, between: Between) -> None:
        names = [f"w{number}" for number in range(WORKERS)]
        self._workers = [Worker(between.url, name, self._folder, journal=i % 2 == 0) for i, name in enumerate(names)]
        self._posters = [Poster(self._daemon, identity=identity) for identity in (True, False)]
        try:
            for worker in self._workers:
                worker.start()
            for poster in self._posters:
                poster.start()
            wait_until(self._all_at_work, "every worker", 60)
            self._kill_in_turn()
            wait_until(self._all_at_work, "every worker", 60)
        finally:
            for poster in self._posters:
                poster.stop.set()
            for worker in self._workers:
                worker.process.send_signal(signal.SIGTERM)
            for poster in self._posters:
                poster.join()
            statuses = [worker.process.wait(90) for worker in self._workers]
        assert statuses == [0] * WORKERS, statuses

    def _all_at_work(self) -> bool:
        return all(list(worker.numbers())[-1][1] for worker in self._workers)

    def _kill_in_turn(self) -> None:
        until, rounds = time.monotonic() + self._seconds, 0
        while time.monotonic() < until:
            time.sleep(self._random.uniform(0.3, 1.0) * _PAUSE)  # the length of a run is the point
            rounds += 1
            if rounds % 8 == 4:
                self.met["server restarted"] += 1
                self._postgres.restart("immediate")
            elif rounds % 2:
                worker = self._random.choice([each for each in self._workers if each.journal != "-"])
                self.met["worker killed"] += 1
                worker.kill()
                worker.start()
            elif rounds % 8 == 6:
                self.met["daemon ended"] += 1
                self._daemon.signal(signal.SIGTERM)
                assert self._daemon.end(60) == 0, self._daemon.log
                self._daemon.start()
            else:
                self.met["daemon killed"] += 1
                self._daemon.kill()
                self._daemon.start(ready=False)

    def _verdict(self) -> bool:
        missing, doubled, once = of_lives(sums_of(self._postgres.conninfo), self._made())
        self._say(f"{once} calls counted once, missing {len(missing)}, doubled {len(doubled)}; {dict(self.met)}")
        if missing or doubled:
            self._say(f"missing {missing[:3]} {missing[-3:]}, doubled {doubled[:20]}\n{self._daemon.log}")
            bad = {name.partition(".")[0] for name in missing + doubled}
            for worker in self._workers:
                if worker.name in bad:
                    self._say(worker.log.read_text())
        return not missing and not doubled and once > 0

    def _made(self) -> Iterator[tuple[str, int, set[int]]]:
        """Yield under each name how many calls were made, and which of them may be counted or not."""
        for worker in self._workers:
            for name, calls, duplicates, retries, journaled, killed in worker.numbers():
                self.met["found done"] += duplicates
                self.met["tries failed"] += retries
                self.met["left in the journal"] += journaled
                # The last call of a killed one may have been taken without having returned.
                yield name, calls, {calls} if killed else set()
        for poster in self._posters:
            self.met[f"{poster.name} repeats"] += poster.repeats
            self.met[f"{poster.name} duplicates"] += poster.duplicates
            yield f"{poster.name}.0", poster.made, set() if poster.name == "identified" else poster.unanswered


def sums_of(conninfo: str) -> dict[str, int]:
    """Return the tokens of every thread."""
    return dict(query(conninfo, "SELECT thread_id, total_tokens::bigint FROM conversations"))


class Run(Protocol):
    """A run of some kind of kills."""

    def __init__(self, folder: Path, seconds: float, seed: int) -> None: ...

    def run(self) -> bool:
        """Kill until the time is up; return whether every call was counted once."""
        ...


def main(kills: type[Run]) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="trk-"))
    folder.chmod(0o755)
    print(f"seed {arguments.seed}")  # noqa: T201
    try:
        return 0 if kills(folder, arguments.seconds, arguments.seed).run() else 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(Kills))
