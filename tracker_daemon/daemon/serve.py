"""From the settings to a running daemon."""

from __future__ import annotations

import os
import resource
import signal
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
from prometheus_client import GC_COLLECTOR, PLATFORM_COLLECTOR, PROCESS_COLLECTOR
from prometheus_client.registry import CollectorRegistry
from psycopg.conninfo import conninfo_to_dict

from tracker_daemon.clock import SystemClock
from tracker_daemon.daemon.bearer import Token
from tracker_daemon.daemon.log import log_to_stderr, set_level
from tracker_daemon.daemon.options import Options, group_id
from tracker_daemon.daemon.process import Process, bind_all, removed_at_end
from tracker_daemon.daemon.relay import Relay
from tracker_daemon.daemon.service import Service
from tracker_daemon.embedded import EmbeddedPostgres
from tracker_daemon.errors import ConfigError
from tracker_daemon.logs import get_logger
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.many import ManySink
from tracker_daemon.postgres.schema import migrate
from tracker_daemon.settings import Settings, quoted
from tracker_daemon.tracker import Tracker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tracker_daemon.daemon.options import Listen

_OTHER_FILES: Final = 256
LEVELS: Final = ("debug", "info", "warning", "error")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every setting of `serve`, checked when it is made.

    Raises:
        ConfigError: one is wrong; the message names it.
    """

    database: str
    listen: tuple[Listen, ...]
    token_file: Path | None
    socket_mode: int
    socket_group: str | None
    table: tuple[str | None, str]
    journal: Path | None
    journal_sync: float
    journal_retain: float
    journal_quota: int
    flush_interval: float
    relay_interval: float
    max_batch_size: int
    lanes: int
    max_queue_size: int
    max_pending: int
    create_missing: bool
    shutdown_timeout: float
    linger: float
    max_body: int
    max_line: int
    max_connections: int
    read_timeout: float
    log_level: str
    log_level_file: Path | None
    log_format: str

    def __post_init__(self) -> None:
        self.options()
        self.settings()
        self.level()
        if not 0 <= self.relay_interval <= 60:
            raise ConfigError("relay_interval", "must be between 0 and 60 seconds", self.relay_interval)
        if not 0 <= self.linger <= 600:
            raise ConfigError("linger", "must be between 0 and 600 seconds", self.linger)
        if self.token_file is not None:
            Token(self.token_file)

    def options(self) -> Options:
        """Return the daemon's own settings."""
        return Options(
            listen=self.listen,
            token_file=self.token_file,
            socket_mode=self.socket_mode,
            socket_group=None if self.socket_group is None else group_id(self.socket_group),
            window=self.relay_interval,
            max_body=self.max_body,
            max_line=self.max_line,
            max_connections=self.max_connections,
            read_timeout=self.read_timeout,
        )

    def settings(self) -> Settings:
        """Return those of the tracker."""
        return Settings(
            flush_interval=self.flush_interval,
            max_batch_size=self.max_batch_size,
            lanes=self.lanes,
            max_queue_size=self.max_queue_size,
            max_pending=self.max_pending,
            create_missing=self.create_missing,
            shutdown_timeout=self.shutdown_timeout,
            journal=self.journal,
            journal_sync=self.journal_sync,
            journal_retain=self.journal_retain,
            journal_quota=self.journal_quota,
        )

    def level(self) -> str:
        """Return the log level; what the file says now, if there is one.

        Raises:
            ConfigError: the file cannot be read, or holds no level.
        """
        if self.log_level_file is None:
            return self.log_level
        path = str(self.log_level_file)
        try:
            text = self.log_level_file.read_text(encoding="utf-8", errors="replace").strip().lower()
        except OSError as error:
            raise ConfigError("log_level_file", f"cannot be read: {error.strerror}", path) from None
        if text not in LEVELS:
            held = text[:80] if text else "nothing"
            raise ConfigError("log_level_file", f"must hold one of {', '.join(LEVELS)}, and holds {held}", path)
        return text

    @property
    def quoted_table(self) -> str:
        """The table as SQL has it."""
        return quoted(self.table)

    def shown(self) -> dict[str, Any]:
        """Return what the status page shows."""
        found = asdict(self) | {"database": _place(self.database)}
        found |= {"listen": [str(address) for address in self.listen], "socket_mode": f"{self.socket_mode:o}"}
        found["table"] = ".".join(part for part in self.table if part is not None)
        return {name: str(value) if isinstance(value, Path) else value for name, value in found.items()}


def _place(database: str) -> str:
    """Name a database by host, port and name: no user, no password, whatever else its URL holds."""
    if database.startswith("embedded:"):
        return database
    given = conninfo_to_dict(database)
    host = given.get("host") or given.get("hostaddr") or os.environ.get("PGHOST") or "local socket"
    port = given.get("port") or os.environ.get("PGPORT") or "5432"
    name = given.get("dbname") or os.environ.get("PGDATABASE") or "the user's own"
    return f"{host}, port {port}, database {name}"


def check(plan: Plan) -> None:
    """Look at what *plan* would use on this machine, as far as that changes nothing.

    Raises:
        ConfigError: a start would fail by it.
    """
    for address in plan.listen:
        if address.path is not None:
            if address.path.exists() and not address.path.is_socket():
                raise ConfigError("listen", "is there already, and is no socket", str(address))
            _check_directory("listen", address.path.parent)
    if plan.journal is not None:
        _check_directory("journal", plan.journal)


def _check_directory(setting: str, directory: Path) -> None:
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(setting, f"cannot be had: {there} is no directory", str(directory))
    try:
        # What a directory says of its rights is not all: /proc, or a file system that is read-only.
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(
            setting, f"cannot be had: {there} cannot be written: {error.strerror}", str(directory)
        ) from None


def run(plan: Plan) -> int:
    """Serve until told to end; return the exit status.

    Raises:
        ConfigError, JournalError, EmbeddedPostgresError: it cannot start.
    """
    log_to_stderr(plan.level(), plan.log_format)
    with _until_it_serves(), ExitStack() as stack:
        database = plan.database
        if (directory := database.removeprefix("embedded:")) != database:
            server = EmbeddedPostgres(Path(directory))
            stack.enter_context(server)
            database = server.conninfo
            anyio.run(_migrate, database, plan.table)
        options = plan.options()
        sockets = bind_all(options)
        for address in plan.listen:
            if address.path is not None:
                stack.enter_context(removed_at_end(address.path))
        _allow_files(plan.max_connections)
        return anyio.run(_serve, plan, options, database, sockets)


@contextmanager
def _until_it_serves() -> Iterator[None]:
    """Before it serves, a signal to end does so, cleanly; one to read settings again finds them read just now."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}

    def end(number: int, _: object) -> None:
        get_logger().info("stopping", signal=signal.Signals(number).name)
        raise SystemExit(0)  # nothing was accepted yet

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    except BaseException:  # it did not come to serving: whoever called goes on
        for number, handler in before.items():
            signal.signal(number, handler)
        raise


def _allow_files(connections: int) -> None:
    """Raise the soft limit on open files as far as the connections need it and the hard one lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _migrate(database: str, table: tuple[str | None, str]) -> None:
    connection = await Connector(database).connect()
    async with connection:
        await migrate(connection, *table)


async def _serve(plan: Plan, options: Options, database: str, sockets: list[Any]) -> int:
    registry = CollectorRegistry()
    for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR):
        registry.register(collector)
    token = None if plan.token_file is None else Token(plan.token_file)
    parts: list[Service] = []
    tracker = Tracker(
        database,
        flush_interval=plan.flush_interval,
        max_batch_size=plan.max_batch_size,
        lanes=plan.lanes,
        max_queue_size=plan.max_queue_size,
        max_pending=plan.max_pending,
        create_missing=plan.create_missing,
        journal=plan.journal,
        journal_sync=plan.journal_sync,
        journal_retain=plan.journal_retain,
        journal_quota=plan.journal_quota,
        table=plan.quoted_table,
        shutdown_timeout=plan.shutdown_timeout,
        registry=registry,
        on_error=lambda error: parts[0].note(error) if parts else None,
    )
    relay = Relay(
        ManySink(Connector(database), plan.table),
        SystemClock(),
        window=plan.relay_interval,
        max_batch_size=plan.max_batch_size,
        max_waiting=plan.max_pending,
    )
    service = Service(options, tracker, relay, token, registry, plan.shown(), max_calls=plan.max_queue_size)
    parts.append(service)

    def reload() -> None:
        # The level first: a token that cannot be read is when one wants more of the log. That is looked for by itself.
        set_level(plan.level())
        if token is not None:
            token.reload()

    return await Process(service, sockets, plan.shutdown_timeout, plan.linger, reload).run()
