"""Servers of a test's own, which it may kill: one alone, or a primary with a standby. And a stream of calls meanwhile."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.helpers import query, wait_until
from tracker_daemon.embedded import EmbeddedPostgres
from tracker_daemon.server_binaries import server_identity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.digits import Digits
    from tracker_daemon import Tracker
    from tracker_daemon.batch import Batch
    from tracker_daemon.sink import Applied, Opened, Sink

PATIENT = {"max_connections": "50", "deadlock_timeout": "200ms"}


@contextmanager
def folder_for_servers() -> Iterator[Path]:
    """A folder that the servers' user can reach, removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="tracker-faults-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def server(folder: Path, **settings: str) -> Iterator[EmbeddedPostgres]:
    """Run a server that writes to the disk as in earnest, and may be killed."""
    running = EmbeddedPostgres(folder, settings={**PATIENT, **settings}, port=0)
    try:
        running.start()
        yield running
    finally:
        running.stop("immediate")


# -- a role that needs a password ------------------------------------------------------------------


@contextmanager
def needing_password(server: EmbeddedPostgres, name: str, password: str) -> Iterator[None]:
    """Have the server ask the role *name*, which is there, for *password*, over TCP."""
    rules = server.directory / "data" / "pg_hba.conf"
    before = rules.read_text()
    role = sql.Identifier(name)
    with psycopg.connect(server.conninfo, autocommit=True) as admin:
        admin.execute(sql.SQL("ALTER ROLE {} LOGIN PASSWORD {}").format(role, password))
        rules.write_text(f"host all {name} 127.0.0.1/32 scram-sha-256\n{before}")
        admin.execute("SELECT pg_reload_conf()")
        wait_until(lambda: _wants_password(make_conninfo(server.tcp_conninfo, user=name)), "the new rule")
        yield
        rules.write_text(before)
        admin.execute("SELECT pg_reload_conf()")


def _wants_password(conninfo: str) -> bool:
    try:
        psycopg.connect(conninfo).close()
    except psycopg.OperationalError as error:
        return "password" in str(error)
    return False


# -- a primary and its standby ---------------------------------------------------------------------


def as_server(command: list[str]) -> None:
    """Run *command* as the user that runs the servers."""
    identity = server_identity()
    as_user: dict[str, Any] = {}
    if identity is not None:
        as_user = {"user": identity[0], "group": identity[1], "extra_groups": []}
    ended = subprocess.run(command, check=False, capture_output=True, text=True, cwd="/", env={}, **as_user)
    assert ended.returncode == 0, ended.stderr


def own_directory(folder: Path) -> Path:
    """Make *folder* one that `EmbeddedPostgres` takes for its own; return where its cluster goes."""
    folder.mkdir(mode=0o711)
    (folder / "postgres.lock").touch()
    data = folder / "data"
    data.mkdir(mode=0o700)
    if identity := server_identity():
        shutil.chown(data, *identity)
    return data


@contextmanager
def standby_of(primary: EmbeddedPostgres, folder: Path) -> Iterator[EmbeddedPostgres]:
    """Run an asynchronous streaming standby of *primary*, which follows it as soon as this returns."""
    data = own_directory(folder)
    program = str(primary.bin_directory / "pg_basebackup")
    as_server([program, "-D", str(data), "-d", primary.conninfo, "-R", "-X", "stream", "-c", "fast", "--no-sync"])
    with server(folder, fsync="off") as standby:
        wait_until(lambda: receivers(standby), "streaming")
        yield standby


def receivers(standby: EmbeddedPostgres) -> int:
    """Return how many processes receive the primary's log: one, or none."""
    return len(query(standby.conninfo, "SELECT pid FROM pg_stat_wal_receiver WHERE status = 'streaming'"))


def catch_up(primary: EmbeddedPostgres, standby: EmbeddedPostgres) -> None:
    """Wait until the standby has what the primary has now."""
    [(there,)] = query(primary.conninfo, "SELECT pg_current_wal_lsn()::text")
    behind = f"SELECT pg_wal_lsn_diff('{there}', pg_last_wal_replay_lsn()) > 0"
    wait_until(lambda: query(standby.conninfo, behind) == [(False,)], "the standby catching up")


def cut_off(standby: EmbeddedPostgres) -> None:
    """Have the standby receive no more from its primary."""
    with psycopg.connect(standby.conninfo, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET primary_conninfo = ''")
        connection.execute("SELECT pg_reload_conf()")
    wait_until(lambda: not query(standby.conninfo, "SELECT pid FROM pg_stat_wal_receiver"), "the end of streaming")


def promote(standby: EmbeddedPostgres) -> None:
    """Make the standby a primary."""
    assert query(standby.conninfo, "SELECT pg_promote()") == [(True,)]


# -- processes that stand still ----------------------------------------------------------------------


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Keep a process from running, for as long as the block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: stands_still(pid), "the stop")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def stands_still(pid: int) -> bool:
    """Say whether every thread has stopped: the signal reaches one of them, and that one the others."""
    tasks = Path(f"/proc/{pid}/task")
    if not tasks.exists():  # not Linux: nothing to look at
        return True
    with suppress(FileNotFoundError):  # a thread has just ended
        return all((task / "stat").read_text().rpartition(")")[2].split()[0] in "tT" for task in tasks.iterdir())
    return False


# -- calls, and what became of them ----------------------------------------------------------------


class Calling:
    """Makes calls in a thread of its own, for as long as the block: what breaks then breaks under load.

    Every call's tokens are a digit of their own.
    """

    def __init__(self) -> None:
        self._stop, self._thread = threading.Event(), threading.Thread(target=self._run, name="calls")
        self.made = 0

    def call(self) -> None:
        """Make some calls, and count them in `made`."""
        raise NotImplementedError

    def _run(self) -> None:
        while not self._stop.wait(0.0005):
            self.call()

    def more(self, calls: int = 20) -> None:
        """Wait until some more calls were made."""
        wanted = self.made + calls
        wait_until(lambda: self.made >= wanted, "more calls")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()


class Stream(Calling):
    """Calls a tracker; they go round over *threads* threads, then over new ones."""

    def __init__(self, tracker: Tracker, digits: Digits, threads: int = 40, name: str = "s") -> None:
        super().__init__()
        self._tracker, self._digits, self._threads, self._name = tracker, digits, threads, name

    def call(self) -> None:
        """Make one call."""
        round_, place = divmod(self.made, self._threads)
        thread_id = f"{self._name}-{round_ // 31}-{place}"
        assert self._tracker.record_turn(thread_id, "agent", self._digits.tokens(thread_id))
        self.made += 1


class Recording:
    """A sink in front of another: remembers what each batch held that was acknowledged, and with which answer."""

    def __init__(self, sink: Sink) -> None:
        self.inner = sink
        self.opened: list[Opened] = []
        self.moved_on: list[Opened] = []
        """Of `opened`: where the ledger was moved on over what it lacks."""
        self.acknowledged: dict[tuple[int, int], dict[str, int]] = {}
        """Tokens by thread, by epoch and sequence."""

    async def open(self, producer: Any, lane: int, *, known: Opened | None = None, after: int = 0) -> Opened:
        """See `Sink.open`."""
        opened = await self.inner.open(producer, lane, known=known, after=after)
        self.opened.append(opened)
        if after:
            self.moved_on.append(opened)
        return opened

    async def apply(self, batch: Batch) -> Applied:
        """See `Sink.apply`."""
        applied = await self.inner.apply(batch)
        tokens = {delta.thread_id: delta.tokens for delta in batch.deltas}
        self.acknowledged[batch.epoch, batch.sequence] = tokens
        return applied

    def abort(self) -> None:
        """See `Sink.abort`."""
        self.inner.abort()

    async def aclose(self, producer: Any, lane: int, *, clean: bool) -> None:
        """See `Sink.aclose`."""
        await self.inner.aclose(producer, lane, clean=clean)

    def forgotten(self, kept: int) -> list[dict[str, int]]:
        """Return the batches that a database forgot which has those to *kept* of the first life, and all of the last."""
        first, last = self.opened[0].epoch, self.opened[-1].epoch
        held = self.acknowledged.items()
        return [tokens for (epoch, n), tokens in held if not (epoch == last or (epoch == first and n <= kept))]
