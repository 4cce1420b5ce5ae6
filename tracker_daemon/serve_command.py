"""`tracker-daemon serve` and `tracker-daemon health`: their options, and the parts they are made of.

Nothing but `click` is imported before a command runs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tracker_daemon.options import DATABASE, Size

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from tracker_daemon.daemon.options import Listen

    Setting = Callable[..., Callable[[Any], Any]]
    Check = Callable[[click.Context, click.Parameter, str], Any]

LEVELS = ("debug", "info", "warning", "error")


def commands(
    setting: Setting, one_line: Callable[[], AbstractContextManager[None]], database: Check, table: Check
) -> list[click.Command]:
    """Return the commands; the arguments are the command line's own ways with options and errors."""
    return [_serve(setting, one_line, database, table), _health(setting, one_line)]


def listens(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[Listen, ...]:
    """Return the addresses in *values*, or the default's."""
    from tracker_daemon.daemon.options import DEFAULT_SOCKET, listen  # noqa: PLC0415
    from tracker_daemon.errors import ConfigError  # noqa: PLC0415

    found = []
    for value in values or (DEFAULT_SOCKET,):
        try:
            found.append(listen(value))
        except ConfigError as error:
            raise click.BadParameter(f"{error.fault}, got {value!r}", context, parameter) from None
    return tuple(found)


def octal(context: click.Context, parameter: click.Parameter, value: str) -> int:
    """Return the mode in *value*."""
    try:
        mode = int(value, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise click.BadParameter(f"must be three octal digits, got {value!r}", context, parameter)
    return mode


def _serve(
    setting: Setting, one_line: Callable[[], AbstractContextManager[None]], database: Check, table: Check
) -> click.Command:
    options = [
        setting("--database", required=True, callback=database, metavar="URL", help=DATABASE),
        setting(
            "--listen",
            multiple=True,
            callback=listens,
            metavar="ADDRESS",
            help="unix:PATH or HOST:PORT; may be repeated.  [default: unix:/run/tracker-daemon/tracker.sock]",
        ),
        setting("--token-file", type=click.Path(path_type=Path), help="Its first line is the bearer token for /v1/."),
        setting("--socket-mode", default="660", callback=octal, help="Of Unix sockets, octal."),
        setting("--socket-group", help="Of Unix sockets: the workers' group."),
        setting("--table", default="conversations", callback=table, help="The conversations; may be schema.name."),
        setting("--journal", type=click.Path(path_type=Path), metavar="DIR", help="Keeps calls through a crash."),
        setting("--journal-sync", type=float, default=0.1, help="Seconds between two fsyncs; 0: each window."),
        setting("--journal-retain", type=float, default=600.0, help="Seconds that applied windows are kept."),
        setting("--journal-quota", type=Size(), default="1GiB", help="Bytes that the journal may take."),
        setting("--flush-interval", type=float, default=0.25, help="The window for calls, seconds."),
        setting("--relay-interval", type=float, default=0.05, help="The window for trackers' batches, seconds."),
        setting("--max-batch-size", type=int, default=10_000, help="Threads in a transaction."),
        setting("--lanes", type=int, default=1, help="Connections that flush calls at the same time."),
        setting("--max-queue-size", type=int, default=100_000, help="Calls taken and not yet coalesced."),
        setting("--max-pending", type=int, default=1_000_000, help="Threads with uncommitted change."),
        setting("--create-missing", type=bool, default=True, help="Whether a turn may create its row."),
        setting("--shutdown-timeout", type=float, default=10.0, help="Seconds for the drain."),
        setting("--linger", type=float, default=0.0, help="Seconds to answer on, if calls were lost, to a scrape."),
        setting("--max-body", type=Size(1_024), default="32MiB", help="Bytes in a request."),
        setting("--max-line", type=Size(64), default="64KiB", help="Bytes in a line of NDJSON."),
        setting("--max-connections", type=click.IntRange(1), default=2_000, help="At once."),
        setting(
            "--read-timeout",
            type=click.FloatRange(0.1),
            default=20.0,
            help="Seconds for a head, or an answer to be read.",
        ),
        setting("--log-level", type=click.Choice(LEVELS), default="info", help="The least that is logged."),
        setting("--log-level-file", type=click.Path(path_type=Path), help="Holds the level; read again at SIGHUP."),
        setting("--log-format", type=click.Choice(("text", "json")), default="text", help="Of the log, on stderr."),
        click.option("--check-config", is_flag=True, help="Check the settings, change nothing, and exit."),
    ]

    def serve(**given: Any) -> None:
        """Take calls and trackers' batches over HTTP, for many processes and other languages.

        SIGTERM or SIGINT drains and exits: 0 when all is applied or journaled, 1 when calls were lost.
        """
        check = given.pop("check_config")
        with one_line():
            try:
                from tracker_daemon.daemon import serve as daemon  # noqa: PLC0415
            except ModuleNotFoundError as error:
                if (error.name or "").startswith("tracker_daemon"):
                    raise
                raise click.ClickException(
                    f"the daemon needs {error.name}, which its extra has: pip install '.[daemon]' in a checkout"
                ) from None
            plan = daemon.Plan(**given)
            if check:
                daemon.check(plan)
                click.echo("the settings are good; the database was not asked (`tracker-daemon migrate --check` does)")
                return
            status = daemon.run(plan)
        sys.exit(status)

    command: Any = serve
    for option in reversed(options):
        command = option(command)
    return click.command("serve", short_help="The daemon.")(command)


def _health(setting: Setting, one_line: Callable[[], AbstractContextManager[None]]) -> click.Command:
    @click.command("health", short_help="Exit 0 when the daemon is ready.")
    @setting(
        "--listen",
        multiple=True,
        callback=listens,
        metavar="ADDRESS",
        help="Where the daemon is; the first counts.  [default: unix:/run/tracker-daemon/tracker.sock]",
    )
    @setting("--timeout", type=click.FloatRange(0.1), default=3.0, help="Seconds to wait for the answer.")
    def health(listen: tuple[Listen, ...], timeout: float) -> None:
        """Ask /readyz; exit 0 when the daemon can accept and write, 1 when it cannot or does not answer."""
        with one_line():
            from tracker_daemon.daemon.health import ask  # noqa: PLC0415

            ready, text = ask(listen[0], timeout)
        click.echo(text)
        sys.exit(0 if ready else 1)

    return health
