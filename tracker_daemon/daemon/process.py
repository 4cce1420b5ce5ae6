"""`tracker-daemon serve`: sockets, signals, and the order of start and end.

Rules:
1. What can be wrong with the settings is said before anything starts.
2. Ready is told (`/readyz`, systemd) once the database would take a batch; not ready before anything is drained.
3. The first SIGTERM or SIGINT drains; a second one cuts that short. The exit status says whether calls were lost.
4. Calls lost at the end are counted when no scrape comes any more: with `linger` the process answers on for so long.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import stat
from typing import TYPE_CHECKING, Any, Final

import anyio
import uvicorn

from tracker_daemon.daemon.app import make_app
from tracker_daemon.daemon.connections import bounded
from tracker_daemon.daemon.notify import notify, tell_manager
from tracker_daemon.errors import ConfigError
from tracker_daemon.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from tracker_daemon.daemon.options import Listen, Options
    from tracker_daemon.daemon.service import Service

_HEAD: Final = 16 << 10
_BACKLOG: Final = 2_048
_KEEP_ALIVE: Final = 75
LAST_ANSWERS: Final = 2.0
"""Seconds for answers under way at the end."""


# -- sockets ---------------------------------------------------------------------------------------


def bind(address: Listen, options: Options) -> socket.socket:
    """Return a listening socket at *address*.

    A socket's file that nobody listens on is replaced.

    Raises:
        ConfigError: somebody listens there, or the address cannot be had; the message says which.
    """
    if address.path is None:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        where: Any = (address.host, address.port)
    else:
        _remove_stale(address)
        found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        where = str(address.path)
    try:
        # Until the mode is set nobody else may connect.
        before = os.umask(0o177)
        try:
            found.bind(where)
        finally:
            os.umask(before)
        if address.path is not None:
            if options.socket_group is not None:
                os.chown(address.path, -1, options.socket_group)
            address.path.chmod(options.socket_mode)
        found.listen(_BACKLOG)
    except OSError as error:
        found.close()
        raise ConfigError("listen", f"cannot be had: {error.strerror or error}", str(address)) from None
    found.setblocking(False)
    return found


def _remove_stale(address: Listen) -> None:
    path = address.path
    assert path is not None
    try:
        status = path.lstat()
    except FileNotFoundError:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fault = f"cannot be had: the directory {path.parent} cannot be made: {error.strerror}"
            raise ConfigError("listen", fault, str(address)) from None
        return
    except OSError as error:
        raise ConfigError("listen", f"cannot be had: {error.strerror}", str(address)) from None
    if not stat.S_ISSOCK(status.st_mode):
        raise ConfigError("listen", "is there already, and is no socket", str(address))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            return
        except OSError as error:
            raise ConfigError("listen", f"cannot be had: {error.strerror or error}", str(address)) from None
    raise ConfigError("listen", "is in use by another process", str(address))


@contextlib.contextmanager
def removed_at_end(path: Path) -> Iterator[None]:
    """Remove the socket's file at the end, if it is the same still: another daemon may have put its own there."""
    made = path.lstat()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if os.path.samestat(made, path.lstat()):
                path.unlink()


def bind_all(options: Options) -> list[socket.socket]:
    """Return a listening socket for each address, or none of them."""
    found: list[socket.socket] = []
    try:
        for address in options.listen:
            found.append(bind(address, options))  # noqa: PERF401 - those that are open must be closed
    except ConfigError:
        for each in found:
            each.close()
        raise
    return found


# -- the server ------------------------------------------------------------------------------------


class _Server(uvicorn.Server):
    """A server whose signals are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_server(app: Any, options: Options) -> uvicorn.Server:
    """Return a server of *app* within the bounds of *options*, which leaves signals alone."""
    config = uvicorn.Config(
        app,
        http=bounded(options),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE,
        h11_max_incomplete_event_size=_HEAD,
        timeout_graceful_shutdown=round(LAST_ANSWERS),
    )
    return _Server(config)


# -- the process -----------------------------------------------------------------------------------


class Process:
    """Runs a service until it is told to end.

    Args:
        service: what is served.
        sockets: where.
        shutdown_timeout: seconds for the drain.
        linger: seconds for which it answers after a drain that lost calls, so that a scrape sees them.
        reload: called at SIGHUP.
    """

    def __init__(
        self,
        service: Service,
        sockets: Sequence[socket.socket],
        shutdown_timeout: float,
        linger: float,
        reload: Callable[[], None],
    ) -> None:
        self._service, self._sockets = service, list(sockets)
        self._timeout, self._linger, self._reload = shutdown_timeout, linger, reload
        self._server = make_server(make_app(service), service.options)
        self._stop = anyio.Event()
        self._hurry = anyio.Event()
        self._served = anyio.Event()
        self._log = get_logger()

    async def run(self) -> int:
        """Serve; return the exit status: 0 when every accepted call is applied or in the journal."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told, number)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        async with self._service.tracker, anyio.create_task_group() as tasks:
            tasks.start_soon(self._serve)
            tasks.start_soon(self._service.run)
            tasks.start_soon(tell_manager, self._service)
            self._log.info("listening", addresses=", ".join(map(str, self._service.options.listen)), pid=os.getpid())
            await self._stop.wait()
            status = await self._drain()
            if status and self._linger:
                self._log.info("lingering", seconds=self._linger)
                with anyio.move_on_after(self._linger):
                    await self._hurry.wait()
            self._server.should_exit = True
            with anyio.move_on_after(LAST_ANSWERS):
                await self._served.wait()
            # Else the driver asks a server that may be deaf to cancel what is under way, and waits for that.
            self._service.hurry()
            tasks.cancel_scope.cancel()
        await self._service.relay.aclose()
        return status

    async def _serve(self) -> None:
        await self._server.serve(self._sockets)
        self._served.set()
        self._stop.set()

    def _told(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._stop.is_set():
            self._log.warning("drain_cut_short", signal=name)
            self._hurry.set()
        else:
            self._log.info("stopping", signal=name)
            self._stop.set()

    def _hang_up(self) -> None:
        try:
            self._reload()
        except ConfigError as error:
            self._log.error("reload_failed", error=str(error))
        else:
            self._log.info("reloaded")

    async def _drain(self) -> int:
        self._service.stop_accepting()
        notify("STOPPING=1")
        report = None

        async def drain() -> None:
            nonlocal report
            report = await self._service.drain(self._timeout)
            tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(drain)
            await self._hurry.wait()
            self._service.hurry()
            report = await self._service.tracker.aclose(0)
            tasks.cancel_scope.cancel()
        if report is None:
            report = await self._service.tracker.aclose(0)
        level = "error" if report.lost else "info"
        getattr(self._log, level)(
            "stopped",
            applied=report.applied,
            dead_lettered=report.dead_lettered,
            journaled=report.journaled,
            lost=report.lost,
        )
        return 1 if report.lost else 0
