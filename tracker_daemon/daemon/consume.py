"""`tracker-daemon consume`: from the settings to a running consumer.

The first SIGTERM or SIGINT ends it after the transactions that run, and gives its partitions up; a second one at once.
Nothing can be lost either way: what is not applied stays in the stream.
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import anyio
from prometheus_client import GC_COLLECTOR, PLATFORM_COLLECTOR, PROCESS_COLLECTOR
from prometheus_client.registry import CollectorRegistry

from tracker_daemon.clock import SystemClock
from tracker_daemon.daemon.app import make_pages
from tracker_daemon.daemon.consuming import ConsumerService
from tracker_daemon.daemon.log import log_to_stderr
from tracker_daemon.daemon.notify import notify, tell_manager
from tracker_daemon.daemon.options import Options, group_id
from tracker_daemon.daemon.process import LAST_ANSWERS, bind_all, make_server, removed_at_end
from tracker_daemon.errors import ConfigError
from tracker_daemon.logs import get_logger
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.leases import Leases
from tracker_daemon.postgres.partitions import PartitionSink
from tracker_daemon.stream.consumer import Consumer
from tracker_daemon.stream.partition import Following

if TYPE_CHECKING:
    import socket
    from uuid import UUID

    from tracker_daemon.daemon.options import Listen
    from tracker_daemon.stream.address import Address

_HIDDEN: Final = frozenset({"database", "stream"})


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every setting of `consume`, checked when it is made.

    Raises:
        ConfigError: one is wrong; the message names it.
    """

    database: str
    stream: Address
    listen: tuple[Listen, ...]
    socket_mode: int
    socket_group: str | None
    table: tuple[str | None, str]
    flush_interval: float
    max_threads: int
    stream_retain: float
    lease: float
    shutdown_timeout: float
    log_level: str
    log_format: str

    def __post_init__(self) -> None:
        self.options()
        for name, least, most in (
            ("flush_interval", 0.001, 60.0),
            ("stream_retain", 0.0, 86_400.0 * 365),
            ("lease", 1.0, 600.0),
            ("shutdown_timeout", 0.0, 86_400.0),
        ):
            if not least <= getattr(self, name) <= most:
                raise ConfigError(name, f"must be between {least:g} and {most:g} seconds", getattr(self, name))
        if not 1 <= self.max_threads <= 100_000:
            raise ConfigError("max_threads", "must be between 1 and 100000", self.max_threads)

    def options(self) -> Options | None:
        """Return where it is shown, or `None`."""
        if not self.listen:
            return None
        return Options(
            listen=self.listen,
            socket_mode=self.socket_mode,
            socket_group=None if self.socket_group is None else group_id(self.socket_group),
            read_only=True,
        )

    def shown(self) -> dict[str, Any]:
        """Return what the status page shows."""
        found = {name: value for name, value in asdict(self).items() if name not in _HIDDEN}
        found |= {"listen": [str(address) for address in self.listen], "socket_mode": f"{self.socket_mode:o}"}
        found["table"] = ".".join(part for part in self.table if part is not None)
        return {"stream": self.stream.name, **found}


def run(plan: Plan) -> int:
    """Consume until told to end; return the exit status.

    Raises:
        ConfigError: it cannot start.
    """
    log_to_stderr(plan.log_level, plan.log_format)
    options = plan.options()
    with ExitStack() as stack:
        sockets: list[socket.socket] = []
        if options is not None:
            sockets = bind_all(options)
            for address in plan.listen:
                if address.path is not None:
                    stack.enter_context(removed_at_end(address.path))
        return anyio.run(_Consume(plan, options, sockets).run)


class _Consume:
    def __init__(self, plan: Plan, options: Options | None, sockets: list[socket.socket]) -> None:
        self._plan, self._sockets = plan, sockets
        self._log = get_logger()
        registry = CollectorRegistry()
        for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR):
            registry.register(collector)
        self._consumer = Consumer(
            plan.stream,
            self._leases,
            lambda: PartitionSink(Connector(plan.database), plan.table),
            SystemClock(),
            Following(window=plan.flush_interval, max_threads=plan.max_threads, retain=plan.stream_retain),
            lease=plan.lease,
            note=self._note,
        )
        self._service = ConsumerService(self._consumer, options, registry, plan.shown())
        self._server = None if options is None else make_server(make_pages(self._service), options)

    def _leases(self, partitions: int, name: UUID) -> Leases:
        plan = self._plan
        return Leases(
            Connector(plan.database),
            plan.table,
            stream=plan.stream.name,
            partitions=partitions,
            consumer=name,
            lease=plan.lease,
        )

    def _note(self, error: BaseException) -> None:
        self._service.note(error)

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told, number)
        async with anyio.create_task_group() as tasks:
            served = anyio.Event()
            if self._server is not None:
                tasks.start_soon(self._serve, served)
            tasks.start_soon(self._service.sample)
            tasks.start_soon(tell_manager, self._service)
            self._log.info(
                "consuming",
                stream=self._plan.stream.name,
                addresses=", ".join(map(str, self._plan.listen)),
                pid=os.getpid(),
            )
            await self._consumer.run()
            if self._server is not None:
                self._server.should_exit = True
                with anyio.move_on_after(LAST_ANSWERS):
                    await served.wait()
            tasks.cancel_scope.cancel()
        self._log.info("stopped", messages=self._consumer.messages, deltas=self._consumer.deltas)
        return 0

    async def _serve(self, served: anyio.Event) -> None:
        assert self._server is not None
        await self._server.serve(self._sockets)
        served.set()

    def _told(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._service.draining:
            self._log.warning("cut_short", signal=name)
            self._consumer.hurry()
            return
        self._log.info("stopping", signal=name)
        self._service.draining = True
        notify("STOPPING=1")
        self._consumer.stop()
        asyncio.get_running_loop().call_later(self._plan.shutdown_timeout, self._hurry)

    def _hurry(self) -> None:
        self._log.warning("cut_short", after=self._plan.shutdown_timeout)
        self._consumer.hurry()
