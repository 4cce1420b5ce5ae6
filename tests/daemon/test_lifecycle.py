"""The daemon's life: what it needs to start, what it tells the manager, how it ends and what is left then."""

from __future__ import annotations

import grp
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
from click.testing import CliRunner

from tests.daemon.harness import ROOT, Daemon, Manager, serving, socket_folder, turn
from tests.helpers import PATIENCE, away, refusing_port, totals, wait_until
from tracker_daemon.cli import program
from tracker_daemon.daemon.serve import _place

if TYPE_CHECKING:
    from collections.abc import Iterator

GOOD = "the settings are good; the database was not asked (`tracker-daemon migrate --check` does)\n"
TOKEN = "a-token-of-more-than-16"  # noqa: S105 - of the test alone


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name."""
    with socket_folder() as found:
        yield found


def tracker_daemon(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "tracker_daemon", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def checked(*options: str) -> str:
    """Return what `serve --check-config` refuses; in this process, for many of them."""
    words = ["serve", "--database", "postgresql:///none", *options, "--check-config"]
    done = CliRunner().invoke(program, words, prog_name="tracker-daemon")
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code != 0
    return " ".join(done.output.split())


def refused(*options: str, **environment: str) -> str:
    """Return what `serve` says when it does not start."""
    ended = tracker_daemon("serve", "--database", "postgresql:///none", *options, **environment)
    assert ended.returncode not in (0, -signal.SIGKILL), ended
    assert "Traceback" not in ended.stderr
    return " ".join(ended.stderr.split())


# -- the start -------------------------------------------------------------------------------------


def test_what_is_wrong_is_said_first(folder: Path) -> None:
    """A wrong setting stops the start with a message that names it; `--check-config` says the same and changes nothing."""
    socket_there = f"unix:{folder}/s"
    short = folder / "token"
    short.write_text("short\n")
    second = folder / "second"
    second.write_text(f"\n{TOKEN}\n")
    wrong = (
        (["--listen", "0.0.0.0:0"], "--token-file"),
        (["--listen", "[::]:0"], "--token-file"),
        (["--listen", "nonsense"], "(env var: 'TRACKER_LISTEN'): must be unix:PATH or HOST:PORT, got 'nonsense'"),
        (["--listen", socket_there, "--token-file", str(folder / "none")], "token_file cannot be read"),
        (["--listen", socket_there, "--token-file", str(short)], "at least 16"),
        (["--listen", socket_there, "--token-file", str(second)], "in its first line"),
        (["--listen", socket_there, "--socket-group", "no-such-group"], "socket_group"),
        (["--listen", socket_there, "--flush-interval", "-1"], "flush_interval"),
        (["--listen", socket_there, "--socket-mode", "999"], "octal"),
        (["--listen", socket_there, "--listen", socket_there], "listen names an address twice"),
        (["--listen", socket_there, "--read-timeout", "nan"], "read_timeout must be between 0.1 and 3600"),
        (["--listen", socket_there, "--read-timeout", "inf"], "read_timeout must be between 0.1 and 3600"),
        (["--listen", f"unix:{short}"], "is there already, and is no socket"),
        (["--listen", socket_there, "--linger", "601"], "linger"),
    )
    for options, words in wrong:
        said = checked(*options)
        assert words in said, said
    for options, words in wrong[::5]:
        said = refused(*options)
        assert words in said, said
    assert "is no directory" in refused("--listen", socket_there, "--journal", str(short), "--check-config")
    # Root may write anywhere by the rights that /proc shows, and cannot.
    assert "/proc cannot be written" in refused("--listen", socket_there, "--journal", "/proc/x", "--check-config")
    good = tracker_daemon("serve", "--database", "postgresql:///none", "--listen", socket_there, "--check-config")
    assert (good.returncode, good.stdout) == (0, GOOD)
    assert not (folder / "s").exists()
    assert "TRACKER_LISTNE" in refused("--listen", socket_there, TRACKER_LISTNE="unix:x")


def test_the_page_names_the_database_without_credentials() -> None:
    """Host, port and name are shown; user, password and whatever else the URL holds are not."""
    for given, shown in (
        ("postgresql://me:secret@db.example:6000/chat?sslpassword=hidden", "db.example, port 6000, database chat"),
        ("host=db.example dbname=chat user=me password=secret", "db.example, port 5432, database chat"),
        ("embedded:/var/lib/chat", "embedded:/var/lib/chat"),
    ):
        assert _place(given) == shown


def test_the_file_of_the_socket(database: str, folder: Path) -> None:
    """A stale socket is replaced, a live one and what is no socket refused and left; mode and group are as asked."""
    group = next(each for each in grp.getgrall() if each.gr_gid not in (0, os.getgid()))
    daemon = Daemon(database, folder, "--socket-mode", "640", "--socket-group", group.gr_name)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(daemon.path)
    try:
        daemon.start()
        status = Path(daemon.path).stat()
        assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o640, group.gr_gid)
        assert "in use by another process" in refused("--listen", daemon.url)
        assert daemon.get("/readyz").status == 200
        assert daemon.stop() == 0
        assert not Path(daemon.path).exists()
    finally:
        daemon.kill()
    (folder / "file").write_text("mine")
    assert "is no socket" in refused("--listen", f"unix:{folder}/file")
    assert (folder / "file").read_text() == "mine"


def test_another_ones_socket_is_left_alone(database: str) -> None:
    """A daemon that ends removes its own socket's file, not one that another daemon has put in its place."""
    with serving(database) as daemon:
        assert stat.S_IMODE(Path(daemon.path).stat().st_mode) == 0o660
        Path(daemon.path).rename(f"{daemon.path}.old")
        with socket.socket(socket.AF_UNIX) as another:
            another.bind(daemon.path)
            assert daemon.stop() == 0
            assert Path(daemon.path).is_socket()


def test_health(database: str, folder: Path) -> None:
    """`health` exits 0 when the daemon is ready, 1 when it is not or does not answer, with a line that says why."""
    with serving(database) as daemon:
        found = tracker_daemon("health", "--listen", daemon.url)
        assert (found.returncode, found.stdout) == (0, f"{daemon.url} is ready\n")
    found = tracker_daemon("health", TRACKER_LISTEN=f"unix:{folder}/none")
    assert found.returncode == 1
    assert found.stdout == f"unix:{folder}/none does not answer: No such file or directory\n"
    with refusing_port() as port, serving(f"host=127.0.0.1 port={port}", ready=False) as daemon:
        found = tracker_daemon("health", "--listen", daemon.url)
        assert found.returncode == 1
        assert "is not ready: connecting: " in found.stdout
        assert "Connection refused; Is the server running" in found.stdout  # libpq says it on two lines


# -- the manager -----------------------------------------------------------------------------------


SINCE = r"STATUS=not ready since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC, "


def test_manager_is_told(database: str, folder: Path) -> None:
    """READY at once, with what is the case, signs of life, STOPPING at SIGTERM; while the database is away what waits."""
    with (
        Manager(str(folder / "notify")) as manager,
        serving(database, "--journal", str(folder / "journal"), **manager.environment) as daemon,
    ):
        assert manager.hears() == "READY=1"
        manager.hears_until("STATUS=ready")
        assert [manager.hears() for _ in range(3)] == ["WATCHDOG=1"] * 3
        with away(database):
            manager.hears_until(SINCE + "0 calls wait: .*not currently accepting connections.*")
            assert daemon.post(turn() + turn()).status == 202
            manager.hears_until(SINCE + "2 calls wait: .*")
        manager.hears_until("STATUS=ready")
        daemon.signal(signal.SIGTERM)
        manager.hears_until("STOPPING=1")
        assert daemon.end() == 0


def test_manager_of_a_daemon_that_finds_no_database(folder: Path) -> None:
    """READY is told all the same, at an abstract address too, and why it cannot write."""
    with (
        Manager(f"@{folder}/abstract") as manager,
        refusing_port() as port,
        serving(f"host=127.0.0.1 port={port}", ready=False, **manager.environment),
    ):
        assert manager.hears() == "READY=1"
        manager.hears_until(SINCE + "0 calls wait: the database was not reached yet")
        manager.hears_until(SINCE + "0 calls wait: connecting: .*Connection refused.*")


# -- the token -------------------------------------------------------------------------------------


def test_token(database: str, folder: Path) -> None:
    """Without the token 401 and nothing taken; a replaced file holds at once, a broken one leaves the last; SIGHUP says so."""
    file = folder / "token"
    file.write_text(f"{TOKEN}\nwhat follows does not count\n")
    with serving(database, "--token-file", str(file)) as daemon:

        def status(token: str | None, scheme: str = "Bearer") -> int:
            headers = {} if token is None else {"Authorization": f"{scheme} {token}"}
            return daemon.post(turn(), headers=headers).status

        assert [status(token) for token in (None, "", TOKEN[:-1], TOKEN + "x", "é", "x" * 8_000)] == [401] * 6
        assert status(TOKEN, "Basic") == 401
        reply = daemon.request("POST", "/v1/batches", b"")
        assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
        assert daemon.request("POST", "/v1/producers", b"").status == 401
        assert (status(TOKEN), status(TOKEN, "bearer")) == (202, 202)
        assert daemon.get("/metrics").status == daemon.get("/readyz").status == 200
        (folder / "new").write_text("another-token-of-that-length")
        (folder / "new").replace(file)
        assert (status(TOKEN), status("another-token-of-that-length")) == (401, 202)
        daemon.signal(signal.SIGHUP)
        daemon.says("reloaded")
        daemon.says("event=token_changed")
        file.write_text("short")
        assert status("another-token-of-that-length") == 202
        daemon.says("event=token_unreadable")
        daemon.signal(signal.SIGHUP)
        daemon.says("reload_failed")
        assert status("another-token-of-that-length") == 202
        assert TOKEN not in daemon.log + daemon.get("/status.json").body.decode()
        daemon.stop()
    assert totals(database).turns == 5


# -- the log -----------------------------------------------------------------------------------------


def test_log_level(database: str, folder: Path) -> None:
    """SIGHUP reads the level's file again, up and down; what it cannot read stops the start, and later leaves the last."""
    file = folder / "level"
    for text in ("", "loud"):
        file.write_text(text)
        assert "log_level_file must hold one of debug, info" in refused("--log-level-file", str(file), "--check-config")
    assert "log_level_file cannot be read" in refused("--log-level-file", str(folder / "none"))
    file.write_text("error\n")
    token = folder / "token"
    token.write_text(TOKEN)
    with serving(database, "--log-level-file", str(file), "--token-file", str(token)) as daemon:
        assert "listening" not in daemon.log
        file.write_text("info\n")
        daemon.signal(signal.SIGHUP)
        daemon.says("log_level_changed to=info")
        daemon.says("reloaded")
        file.write_text("loud\n")
        daemon.signal(signal.SIGHUP)
        daemon.says("reload_failed")
        token.unlink()  # does not keep the level
        file.write_text("warning\n")
        daemon.signal(signal.SIGHUP)
        daemon.says("log_level_changed to=warning")
        assert daemon.stop() == 0
        assert "stopped" not in daemon.log


# -- the end ---------------------------------------------------------------------------------------


def test_idle_and_mid_window(database: str) -> None:
    """SIGTERM or SIGINT: exit 0, with what was taken in the database."""
    with serving(database, "--flush-interval", "60") as daemon:
        assert daemon.stop() == 0
        daemon.start()
        assert daemon.post(turn() * 10).status == 202
        daemon.signal(signal.SIGINT)
        assert daemon.end() == 0
        assert "applied=10" in daemon.log
    assert totals(database).turns == 10


def test_told_to_end_before_it_serves(server_folder: Path, folder: Path) -> None:
    """While its own Postgres is being made, SIGHUP changes nothing and SIGTERM ends it with 0, and no server is left."""
    directory = server_folder / "never-there"
    daemon = Daemon(f"embedded:{directory}", folder)
    process = subprocess.Popen(
        daemon.arguments,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        wait_until(lambda: list(directory.glob("data*")), "the making of the server")
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, said
    assert "event=stopping signal=SIGTERM" in said
    assert "Traceback" not in said
    assert not list(directory.glob("data/postmaster.pid"))


@pytest.mark.parametrize("journal", [False, True])
def test_database_away(database: str, folder: Path, *, journal: bool) -> None:
    """At the deadline: exit 1 and the number of calls in the log, or 0 with them in the journal, for the next life."""
    options = ["--shutdown-timeout", "1", "--flush-interval", "0.05"]
    if journal:
        options += ["--journal", str(folder / "journal")]
    with serving(database, *options) as daemon:
        with psycopg.connect(database) as blocker:
            blocker.execute("LOCK TABLE conversations IN ACCESS EXCLUSIVE MODE")
            assert daemon.post(turn() * 7).status == 202
            assert daemon.stop() == (0 if journal else 1)
        assert ("journaled=7" if journal else "lost=7") in daemon.log
        if journal:
            daemon.start()
            wait_until(lambda: totals(database).turns == 7, "what the journal had")


def test_second_signal(database: str) -> None:
    """A second signal ends the drain at once, also with a batch under way; what is lost by that is counted."""
    with serving(database, "--shutdown-timeout", "60") as daemon, psycopg.connect(database) as blocker:
        blocker.execute("LOCK TABLE conversations IN ACCESS EXCLUSIVE MODE")
        assert daemon.post(turn() * 3).status == 202
        daemon.signal(signal.SIGTERM)
        daemon.says("stopping")
        assert daemon.get("/livez").status == 200
        daemon.signal(signal.SIGTERM)
        assert daemon.end() == 1
        assert "drain_cut_short" in daemon.log
        assert "lost=3" in daemon.log


def test_loss_is_seen_by_a_last_scrape(database: str) -> None:
    """With `--linger` a daemon that lost calls answers /metrics for so long, then exits with 1; a signal cuts it short."""
    options = ["--shutdown-timeout", "0", "--flush-interval", "60", "--linger", "600"]
    with serving(database, *options) as daemon, psycopg.connect(database) as blocker:
        blocker.execute("LOCK TABLE conversations IN ACCESS EXCLUSIVE MODE")
        assert daemon.post(turn() * 4).status == 202
        assert daemon.metric("tracker_calls_lost_total") == 0
        daemon.signal(signal.SIGTERM)
        daemon.says("lost=4")
        daemon.says("event=lingering seconds=600")
        lost_at = daemon.get("/status.json").json["now"]
        # For longer than the last answers get in any case.
        wait_until(lambda: daemon.get("/status.json").json["now"] > lost_at + 3, "three seconds")
        assert daemon.metric("tracker_calls_lost_total") == 4
        assert (daemon.get("/livez").status, daemon.get("/readyz").status) == (200, 503)
        assert daemon.post(turn()).status == 503
        daemon.signal(signal.SIGTERM)
        assert daemon.end() == 1
        assert "drain_cut_short" in daemon.log, "it was there still"
    with serving(database, *options) as daemon:
        assert daemon.stop() == 0, "nothing was lost: nothing to wait for"


def test_killed_with_a_journal(database: str, folder: Path) -> None:
    """What was answered 202 is there after `kill -9` and a restart, once."""
    with serving(database, "--journal", str(folder / "journal"), "--flush-interval", "60") as daemon:
        for _ in range(20):
            assert daemon.post(turn() * 5).status == 202
        daemon.kill()
        assert totals(database).turns == 0
        daemon.start()
        wait_until(lambda: totals(database).turns == 100, "what the journal had")
        assert daemon.stop() == 0
    assert totals(database).turns == 100


def test_a_server_of_its_own(server_folder: Path) -> None:
    """`--database embedded:DIR` runs a Postgres, with the tables made; what was applied is there the next time."""
    directory = server_folder / "of-its-own"
    with serving(f"embedded:{directory}") as daemon:
        for number in (1, 2):
            assert daemon.post(turn() * 5, wait=True).status == 200
            assert daemon.metric("tracker_calls_applied_total") == 5
            assert daemon.stop() == 0
            assert not list(directory.glob("data/postmaster.pid")), number
            if number == 1:
                daemon.start()
