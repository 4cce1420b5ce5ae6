"""`tracker-daemon consume` and `tracker-daemon stream …`: their options, and what they print.

Nothing but `click` is imported before a command runs.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from tracker_daemon import serve_command
from tracker_daemon.options import Size

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from tracker_daemon.daemon.options import Listen

    Setting = Callable[..., Callable[[Any], Any]]
    Check = Callable[[click.Context, click.Parameter, str], Any]
    OneLine = Callable[[], AbstractContextManager[None]]

_MOST_PARTITIONS = 256


def commands(setting: Setting, one_line: OneLine, database: Check, table: Check) -> list[click.Command]:
    """Return the commands; the arguments are the command line's own ways with options and errors."""

    def remote(context: click.Context, parameter: click.Parameter, value: str) -> Any:
        if value.startswith("embedded:"):
            raise click.BadParameter(
                "must be a server's, postgresql:… or a conninfo: an embedded one ends with its process, and consumers "
                "and commands share the stream's database",
                context,
                parameter,
            )
        return database(context, parameter, value)

    return [_consume(setting, one_line, remote, table), _stream(setting, one_line, remote, table)]


def _address(context: click.Context, parameter: click.Parameter, value: str) -> Any:
    from tracker_daemon.errors import ConfigError  # noqa: PLC0415
    from tracker_daemon.stream.address import address  # noqa: PLC0415

    try:
        return address(value)
    except ConfigError as error:
        raise click.BadParameter(error.fault, context, parameter) from None


def _listens(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[Listen, ...]:
    return serve_command.listens(context, parameter, values) if values else ()


def _imported(name: str) -> Any:
    from importlib import import_module  # noqa: PLC0415

    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("tracker_daemon"):
            raise
        raise click.ClickException("it is not installed: pip install '.[daemon,nats]' in a checkout") from None


def _where(setting: Setting) -> Callable[[Any], Any]:
    return setting(
        "--stream", required=True, callback=_address, metavar="URL", help="nats://HOST:PORT,…/NAME, or tls://…"
    )


def _consume(setting: Setting, one_line: OneLine, database: Check, table: Check) -> click.Command:
    options = [
        setting("--database", required=True, callback=database, metavar="URL", help="postgresql:…, a conninfo."),
        _where(setting),
        setting(
            "--listen",
            multiple=True,
            callback=_listens,
            metavar="ADDRESS",
            help="Where /metrics, /livez, /readyz and the status page are: unix:PATH or HOST:PORT; may be repeated.",
        ),
        setting("--socket-mode", default="660", callback=serve_command.octal, help="Of Unix sockets, octal."),
        setting("--socket-group", help="Of Unix sockets."),
        setting("--table", default="conversations", callback=table, help="The conversations; may be schema.name."),
        setting("--flush-interval", type=float, default=0.25, help="The window in which deltas are summed, seconds."),
        setting("--max-threads", type=int, default=100_000, help="Distinct threads in a transaction."),
        setting("--stream-retain", type=float, default=600.0, help="Seconds that applied messages stay in the stream."),
        setting("--lease", type=float, default=6.0, help="Seconds after which another takes over from a silent one."),
        setting("--shutdown-timeout", type=float, default=10.0, help="Seconds for the transactions that run."),
        setting("--log-level", type=click.Choice(serve_command.LEVELS), default="info", help="The least logged."),
        setting("--log-format", type=click.Choice(("text", "json")), default="text", help="Of the log, on stderr."),
        click.option("--check-config", is_flag=True, help="Check the settings, change nothing, and exit."),
    ]

    def consume(**given: Any) -> None:
        """Bring a stream into the database; any number of consumers share its partitions.

        SIGTERM or SIGINT ends it after the transactions that run; what is not applied stays in the stream.
        """
        check = given.pop("check_config")
        with one_line():
            module = _imported("tracker_daemon.daemon.consume")
            plan = module.Plan(**given)
            if check:
                click.echo("the settings are good")
                return
            code = module.run(plan)
        sys.exit(code)

    command: Any = consume
    for option in reversed(options):
        command = option(command)
    return click.command("consume", short_help="The stream's consumer.")(command)


def _stream(  # noqa: C901 - three small commands
    setting: Setting, one_line: OneLine, database: Check, table: Check
) -> click.Group:
    @click.group("stream")
    def stream() -> None:
        """Make and check the stream."""

    def operate(name: str, *arguments: Any) -> Any:
        with one_line():
            import anyio  # noqa: PLC0415

            return anyio.run(getattr(_imported("tracker_daemon.stream.operations"), name), *arguments)

    def may_be_absent(context: click.Context, parameter: click.Parameter, value: str | None) -> Any:
        return None if value is None else database(context, parameter, value)

    of_database = partial(setting, "--database", metavar="URL", help="postgresql:…, a conninfo.")
    conversations = setting(
        "--table", default="conversations", callback=table, help="The conversations; may be schema.name."
    )

    @stream.command()
    @_where(setting)
    @click.option("--partitions", type=click.IntRange(1, _MOST_PARTITIONS), required=True, help="Cannot change later.")
    @click.option(
        "--replicas", type=click.Choice(("1", "3", "5")), default="3", show_default=True, help="Of each partition."
    )
    @click.option("--max-bytes", type=Size(1 << 20), default="1GiB", show_default=True, help="Of each partition.")
    @click.option(
        "--duplicate-window",
        type=click.FloatRange(600.0),
        default=600.0,
        show_default=True,
        help="Seconds in which the servers themselves drop a message that comes again.",
    )
    def create(stream: Any, partitions: int, replicas: str, max_bytes: int, duplicate_window: float) -> None:
        """Make the stream, or what is missing of it; safe to repeat. Its number of partitions is for ever."""
        with one_line():
            limits = _imported("tracker_daemon.stream.facts").Limits(int(replicas), max_bytes, duplicate_window)
        made = operate("create", stream, partitions, limits)
        for line in [f"made {name}" for name in made] or ["nothing to do"]:
            click.echo(line)

    @stream.command()
    @_where(setting)
    @of_database(callback=may_be_absent)
    @conversations
    @click.option("--json", "as_json", is_flag=True, help="A JSON object a partition, one a line.")
    def status(stream: Any, database: str | None, table: Any, *, as_json: bool) -> None:
        """Print every partition's state; with a database also how far it is applied. Exit 1 if something is wrong."""
        found = operate("status", stream, database, table)
        for seen in found:
            click.echo(json.dumps(asdict(seen)) if as_json else _line(seen))
            if not as_json:
                for fault in seen.faults:
                    click.echo(f"  {fault}")
        sys.exit(1 if any(seen.faults for seen in found) else 0)

    @stream.command()
    @_where(setting)
    @of_database(required=True, callback=database)
    @conversations
    def adopt(stream: Any, database: str, table: Any) -> None:
        """Let consumers go on with the stream as it is now, after it was made anew or its beginning is gone.

        What an earlier stream held and was not applied, or what is gone, is not applied by this either.
        """
        for line in operate("adopt", stream, database, table):
            click.echo(f"adopted {line}")

    return stream


def _line(seen: Any) -> str:
    facts = seen.facts
    lag = "" if seen.position is None else f", applied {seen.position}, lag {facts.last - seen.position}"
    return (
        f"partition {facts.partition}: messages {facts.first} to {facts.last}{lag}, "
        f"{facts.bytes} of {facts.max_bytes} bytes, leader {facts.leader or '-'}, "
        f"{facts.current} of {facts.replicas} replicas"
    )
