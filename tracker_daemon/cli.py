"""`tracker-daemon COMMAND`: arguments, environment, messages, exit status.

Rules:
1. Every option is also an environment variable `TRACKER_…`; a secret one may stand in a file named by `…_FILE`.
2. A `TRACKER_…` variable that no command knows stops the start: it is a setting with a typing error.
3. What goes wrong is one line on stderr; no message repeats the database's URL, which may hold a password.
4. Nothing but `click` is imported before a command runs. It comes with the extras; without it the program says so and
   ends, with status 2.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

try:
    import click
except ModuleNotFoundError as error:
    if error.name != "click":
        raise
    sys.stderr.write("tracker-daemon: the command line is not installed: pip install 'tracker-daemon[daemon]'\n")
    sys.exit(2)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

    from psycopg import AsyncConnection

_PREFIX: Final = "TRACKER_"
_FILE: Final = "_FILE"
_SECRET: Final = frozenset({"TRACKER_DATABASE"})
# What Kubernetes sets in every container for a service named tracker or tracker-daemon.
_OF_KUBERNETES: Final = re.compile(r"\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)")


def main() -> None:
    """Run the command that the arguments name, and exit."""
    program(prog_name="tracker-daemon")


def setting(flag: str, **attributes: Any) -> Callable[[Any], Any]:
    """Return the decorator of an option that is also the environment variable of the same name."""
    name = _PREFIX + flag.removeprefix("--").replace("-", "_").upper()
    shown: dict[str, Any] = {"envvar": name, "show_envvar": True, "show_default": "default" in attributes}
    return click.option(flag, **shown, **attributes)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version("tracker-daemon"), message="tracker-daemon %(version)s")
@click.pass_context
def program(context: click.Context) -> None:
    """Write-behind conversation tracking for chat servers.

    Every option is also an environment variable; those that hold secrets may be given as a file, by a variable
    with _FILE after its name.
    """
    group = context.command
    assert isinstance(group, click.Group)
    known = _variables(group)
    _refuse_unknown(known, os.environ)
    found = {parameter: _read_secret(variable, os.environ) for parameter, variable in known.items()}
    given = {parameter: value for parameter, value in found.items() if value is not None}
    context.default_map = dict.fromkeys(group.commands, given)


# -- the environment -------------------------------------------------------------------------------


def _variables(group: click.Group) -> dict[str, str]:
    """Return the environment variable of every option of every command, by the option's name."""
    return {
        option.name: str(option.envvar)
        for command in group.commands.values()
        for option in command.params
        if option.name and option.envvar
    }


def _refuse_unknown(known: Mapping[str, str], environment: Mapping[str, str]) -> None:
    names = {*known.values(), *(name + _FILE for name in _SECRET)}
    faults = []
    for name in sorted(environment):
        if name.startswith(_PREFIX) and name not in names and not _OF_KUBERNETES.fullmatch(name):
            (close,) = difflib.get_close_matches(name, names, n=1) or [""]
            faults.append(f"{name} is no setting" + (f" (did you mean {close}?)" if close else ""))
    if faults:
        raise click.UsageError(f"in the environment: {'; '.join(faults)}")


def _read_secret(variable: str, environment: Mapping[str, str]) -> str | None:
    """Return what the file named by *variable*`_FILE` holds; `None` if there is no such variable."""
    file = environment.get(variable + _FILE)
    if variable not in _SECRET or not file:
        return None
    if environment.get(variable):
        raise click.UsageError(f"both {variable} and {variable}{_FILE} are set; leave one")
    try:
        value = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise click.UsageError(f"{variable}{_FILE}: cannot read {file}: {reason}") from None
    if not value:
        raise click.UsageError(f"{variable}{_FILE}: {file} is empty")
    return value


# -- the values ------------------------------------------------------------------------------------


def _database(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """Check a database's URL without repeating it."""
    refuse = partial(click.BadParameter, ctx=context, param=parameter)
    scheme, _, rest = value.partition(":")
    if scheme == "embedded":
        if not rest:
            raise refuse("must name a directory after embedded:")
        return value
    if scheme not in ("postgresql", "postgres") and "=" not in value:
        raise refuse("must begin with postgresql: or embedded:, or be a key=value conninfo")
    if scheme in ("postgresql", "postgres") and _badly_escaped(rest):
        raise refuse("has a character in its user or password that a URL must have as %XX (@ %40, / %2F, : %3A, ? %3F)")
    from tracker_daemon.errors import ConfigError  # noqa: PLC0415 - rule 4
    from tracker_daemon.postgres.connection import Connector  # noqa: PLC0415

    try:
        Connector(value)
    except ConfigError as error:
        raise refuse(error.fault) from None
    return value


def _badly_escaped(rest: str) -> bool:
    """Tell whether libpq would take part of a password for the host, port or database, and show it in an error."""
    # As libpq reads it: the user and password end at the first @, if that comes before the first slash.
    text = rest.removeprefix("//")
    user, at, after = text.partition("@")
    location = (after if at and "/" not in user else text).partition("?")[0]
    hosts = [re.sub(r"\[.*?(\]|$)", "", host) for host in location.partition("/")[0].split(",")]
    ports = [host.partition(":")[2] for host in hosts]
    return "@" in location or any(port and not port.isdecimal() for port in ports)


def _table(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str | None, str]:
    from tracker_daemon.errors import ConfigError  # noqa: PLC0415 - rule 4
    from tracker_daemon.settings import split_table  # noqa: PLC0415

    try:
        return split_table(value)
    except ConfigError as error:
        raise click.BadParameter(error.fault, context, parameter) from None


@contextmanager
def _one_line() -> Iterator[None]:
    """Turn what is the user's or the database's affair into one line and exit status 1."""
    try:
        import psycopg  # noqa: PLC0415 - rule 4
    except ImportError:
        raise click.ClickException("libpq is not installed: pip install 'tracker-daemon[daemon]'") from None
    from tracker_daemon.errors import TrackerError  # noqa: PLC0415 - rule 4

    try:
        yield
    except (psycopg.Error, TrackerError, OSError) as error:
        raise click.ClickException(" ".join(str(error).split())) from None


# -- the commands ----------------------------------------------------------------------------------


@program.command(short_help="Live chat traffic, then a verdict on every row.")
@setting("--seconds", type=click.FloatRange(0.1, 3_600), default=10.0, help="How long the traffic lasts.")
@setting("--rate", type=click.FloatRange(0, 1_000_000, min_open=True), default=20_000.0, help="Calls a second.")
@setting("--threads", type=click.IntRange(1, 1_000_000), default=5_000, help="Distinct conversations.")
def demo(seconds: float, rate: float, threads: int) -> None:
    """Drive live chat traffic on a Postgres of its own, then give a verdict on every row.

    Exits with 0 only if every row is exact and no call was refused or lost. Ctrl-C ends the traffic early.
    """
    with _one_line():
        try:
            from tracker_daemon.demo.run import run  # noqa: PLC0415 - rule 4
        except ModuleNotFoundError:
            raise click.ClickException("the demo is not installed: pip install 'tracker-daemon[embedded]'") from None
        status = run(seconds=seconds, rate=rate, threads=threads)
    sys.exit(status)


@program.command()
@setting(
    "--database", required=True, callback=_database, metavar="URL", help="postgresql:…, a conninfo, or embedded:DIR."
)
@setting("--table", default="conversations", callback=_table, help="The conversations; may be schema.name.")
@setting("--check", is_flag=True, help="Change nothing; exit 1 if something is missing.")
def migrate(database: str, table: tuple[str | None, str], *, check: bool) -> None:
    """Create the tables, or upgrade them in place; safe to repeat."""
    with _one_line():
        import anyio  # noqa: PLC0415 - rule 4

        lines, status = anyio.run(_check if check else _migrate, database, table)
    for line in lines:
        click.echo(line)
    sys.exit(status)


async def _migrate(database: str, table: tuple[str | None, str]) -> tuple[list[str], int]:
    from tracker_daemon.postgres import schema  # noqa: PLC0415 - rule 4

    async with _connection(database) as connection:
        applied = await schema.migrate(connection, *table)
    return [f"applied {step}" for step in applied] or ["nothing to do"], 0


async def _check(database: str, table: tuple[str | None, str]) -> tuple[list[str], int]:
    from tracker_daemon.postgres import schema  # noqa: PLC0415 - rule 4

    directory = database.removeprefix("embedded:")
    if directory != database and not (Path(directory) / "data" / "PG_VERSION").exists():
        return [f"{directory} holds no database"], 1  # starting the server would make one
    async with _connection(database) as connection:
        name = table[1]
        faults = await schema.faults_of(connection, await schema.find_schema(connection, *table), name)
    return (faults, 1) if faults else (["nothing is missing"], 0)


@asynccontextmanager
async def _connection(database: str) -> AsyncIterator[AsyncConnection[Any]]:
    """Connect; to a server of our own, started for as long as it takes, if *database* is `embedded:DIR`."""
    from tracker_daemon.embedded import EmbeddedPostgres  # noqa: PLC0415 - rule 4
    from tracker_daemon.postgres.connection import Connector  # noqa: PLC0415

    with ExitStack() as stack:
        scheme, _, directory = database.partition(":")
        if scheme == "embedded":
            database = stack.enter_context(EmbeddedPostgres(directory)).conninfo
        async with await Connector(database).connect() as connection:
            yield connection


if __name__ == "__main__":
    main()
