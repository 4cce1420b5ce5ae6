"""`tracker-daemon COMMAND`: arguments, environment, messages, exit status.

Rules:
1. Every setting is also an environment variable `TRACKER_…`; a secret one may stand in a file named by `…_FILE`. What
   is of one run alone (`--check`, `--all`, `--skip-damage`) is none: forgotten in an environment it would do harm.
2. A `TRACKER_…` variable that no command knows stops the start: it is a setting with a typing error.
3. What goes wrong is one line on stderr; no message repeats the database's URL, which may hold a password.
4. Nothing but `click` is imported before a command runs. It comes with the extras; without it the program says so and
   ends, with status 2.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

try:
    import click
except ModuleNotFoundError as error:
    if error.name != "click":
        raise
    sys.stderr.write("tracker-daemon: the command line needs click: pip install click\n")
    sys.exit(2)

from tracker_daemon import journal_command, serve_command, stream_command
from tracker_daemon.options import DATABASE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_PREFIX: Final = "TRACKER_"
_FILE: Final = "_FILE"
_TOLD: Final = 20  # refused letters, of which each may have an error of some lines
_SECRET: Final = frozenset({"TRACKER_DATABASE", "TRACKER_STREAM"})
# What Kubernetes sets in every container for a service named tracker or tracker-daemon.
_OF_KUBERNETES: Final = re.compile(r"\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)")


def main() -> None:
    """Run the command that the arguments name, and exit."""
    program(prog_name="tracker-daemon")


def setting(flag: str, *names: str, **attributes: Any) -> Callable[[Any], Any]:
    """Return the decorator of an option, with other *names*, that is also the environment variable of its name."""
    name = _PREFIX + flag.removeprefix("--").replace("-", "_").upper()
    shown: dict[str, Any] = {"envvar": name, "show_envvar": True, "show_default": "default" in attributes}
    return click.option(flag, *names, **shown, **attributes)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version("tracker-daemon"), message="tracker-daemon %(version)s")
@click.pass_context
def program(context: click.Context) -> None:
    """Write-behind conversation tracking for chat servers.

    Every setting is also an environment variable, as --help shows; those that hold secrets may be given as a file, by
    a variable with _FILE after its name.
    """
    group = context.command
    assert isinstance(group, click.Group)
    known = _variables(group)
    # A client's, in an environment for all; to `serve` it would be a token that nobody is asked for.
    of_clients = set() if context.invoked_subcommand == "serve" else {"TRACKER_TOKEN"}
    _refuse_unknown({*known.values(), *of_clients}, os.environ)
    found = {parameter: _read_secret(variable, os.environ) for parameter, variable in known.items()}
    given = {parameter: value for parameter, value in found.items() if value is not None}
    context.default_map = _defaults(group, given)


# -- the environment -------------------------------------------------------------------------------


def _variables(group: click.Group) -> dict[str, str]:
    """Return the environment variable of every option of every command, by the option's name."""
    found: dict[str, str] = {}
    for command in group.commands.values():
        if isinstance(command, click.Group):
            found |= _variables(command)
        found |= {option.name: str(option.envvar) for option in command.params if option.name and option.envvar}
    return found


def _defaults(group: click.Group, given: dict[str, str]) -> dict[str, Any]:
    """Return *given* as the defaults of every command, as click nests them."""
    return {
        name: _defaults(command, given) if isinstance(command, click.Group) else given
        for name, command in group.commands.items()
    }


def _refuse_unknown(known: set[str], environment: Mapping[str, str]) -> None:
    names = {*known, *(name + _FILE for name in _SECRET)}
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
    from tracker_daemon.errors import ConfigError  # noqa: PLC0415 - rule 4
    from tracker_daemon.postgres.connection import Connector  # noqa: PLC0415

    try:
        Connector(value)
    except ConfigError as error:
        raise refuse(error.fault) from None
    return value


def _table(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str | None, str]:
    from tracker_daemon.errors import ConfigError  # noqa: PLC0415 - rule 4
    from tracker_daemon.settings import split_table  # noqa: PLC0415

    try:
        return split_table(value)
    except ConfigError as error:
        raise click.BadParameter(error.fault, context, parameter) from None


def _daemon(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and value.partition(":")[0] not in ("unix", "http", "https"):
        raise click.BadParameter("must be unix:PATH, http://HOST:PORT or https://HOST:PORT", context, parameter)
    return value


class _WrongSetting(click.ClickException):
    """Starting again would not help; a status of 1 from `serve` says that calls were lost."""

    exit_code = 2


def _address(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, int] | None:
    if value is None:
        return None
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise click.BadParameter("must be HOST:PORT", context, parameter)
    return host.strip("[]"), int(port)


@contextmanager
def _one_line() -> Iterator[None]:
    """Turn what is the user's or the database's affair into one line and exit status 1; a wrong setting, 2."""
    try:
        import psycopg  # noqa: PLC0415 - rule 4
    except ImportError:
        raise click.ClickException("libpq is not installed: pip install 'psycopg[binary]'") from None
    from tracker_daemon.errors import ConfigError, TrackerError, one_line  # noqa: PLC0415 - rule 4

    try:
        yield
    except ConfigError as error:
        raise _WrongSetting(str(error)) from None
    except (psycopg.Error, TrackerError, OSError) as error:
        # Of what the server refused its own words, without the place in a statement that nobody typed.
        text = (isinstance(error, psycopg.Error) and error.diag.message_primary) or str(error)
        raise click.ClickException(one_line(text)) from None


# -- the commands ----------------------------------------------------------------------------------


@program.command(short_help="Live chat traffic, then a verdict on every row.")
@setting("--seconds", type=click.FloatRange(0.1, 3_600), default=10.0, help="How long the traffic lasts.")
@setting("--rate", type=click.FloatRange(0, 100_000, min_open=True), default=20_000.0, help="Calls a second.")
@setting("--threads", type=click.IntRange(1, 1_000_000), default=5_000, help="Distinct conversations.")
@setting("--daemon", callback=_daemon, metavar="URL", help="Only traffic, against unix:PATH or http://HOST:PORT.")
@setting("--metrics", callback=_address, metavar="HOST:PORT", help="With --daemon: serve the numbers to Prometheus.")
def demo(seconds: float, rate: float, threads: int, daemon: str | None, metrics: tuple[str, int] | None) -> None:
    """Drive live chat traffic on a Postgres of its own, then give a verdict on every row.

    Exits with 0 only if every row is exact and no call was refused or lost. Ctrl-C ends the traffic early. With
    --daemon there is only traffic, against a daemon that runs already: 0 if it has brought every call to the database.
    """
    with _one_line():
        if metrics is not None and daemon is None:
            raise click.UsageError("--metrics goes with --daemon")
        if daemon is not None:
            from tracker_daemon.demo.drive import drive  # noqa: PLC0415 - rule 4

            sys.exit(drive(daemon, seconds=seconds, rate=rate, threads=threads, metrics=metrics))
        from tracker_daemon.demo.run import run  # noqa: PLC0415 - rule 4

        status = run(seconds=seconds, rate=rate, threads=threads)
    sys.exit(status)


@program.command()
@setting("--database", required=True, callback=_database, metavar="URL", help=DATABASE)
@setting("--table", default="conversations", callback=_table, help="The conversations; may be schema.name.")
@click.option("--check", is_flag=True, help="Change nothing; exit 1 if something is missing.")
@click.option("--create-schema", is_flag=True, help="Make the table's schema, too, if it does not exist.")
def migrate(database: str, table: tuple[str | None, str], *, check: bool, create_schema: bool) -> None:
    """Create the tables, or upgrade them in place; safe to repeat."""
    if check:
        found, unknown = _operate("missing", database, table)
        _print(found or ["nothing is missing"])
        if unknown:
            click.echo(f"not known: {unknown}", err=True)
        sys.exit(1 if found else 0)
    steps = _operate("migrate", database, table, create_schema=create_schema)
    _print([f"applied {step}" for step in steps] or ["nothing to do"])


@program.command(short_help="Write-behind beside one statement a call, on your database.")
@setting(
    "--database", required=True, callback=_database, metavar="URL", help="postgresql:…, a conninfo, or embedded:DIR."
)
@setting("--seconds", type=click.FloatRange(0.1, 3_600), default=5.0, help="How long each round of each of them lasts.")
@setting("--threads", type=click.IntRange(1, 1_000_000), default=10_000, help="Distinct conversations.")
@click.option(
    "--connections", type=click.IntRange(1, 100), default=10, show_default=True, help="Of one statement a call."
)
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True, help="How often both have a turn.")
def bench(database: str, seconds: float, threads: int, connections: int, rounds: int) -> None:
    """Measure write-behind beside one statement a call on the database, in a schema of its own.

    The schema tracker_bench_… is made and removed again, after Ctrl-C too; no table that exists is touched. The role
    needs the right to create in the database.
    """
    with _one_line():
        import anyio  # noqa: PLC0415 - rule 4

        from tracker_daemon import comparison  # noqa: PLC0415 - rule 4

        settings = comparison.Settings(seconds, threads, connections, rounds)
        status = anyio.run(comparison.run, database, settings, click.echo)
    sys.exit(status)


@program.group("dead-letters")
def dead_letters() -> None:
    """Look after the deltas that the database would not take."""


def _on_letters(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that every command on dead letters has."""
    options = [
        setting("--database", required=True, callback=_database, metavar="URL", help=DATABASE),
        setting("--table", default="conversations", callback=_table, help="The conversations; may be schema.name."),
        click.option("--thread-id", help="Only those of this thread."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@dead_letters.command("list")
@_on_letters
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="How many, oldest first.")
def list_letters(database: str, table: tuple[str | None, str], thread_id: str | None, limit: int) -> None:
    """Print dead letters as JSON, one a line, oldest first."""
    letters, total = _operate("letters", database, table, thread_id, limit)
    for letter in letters:
        click.echo(json.dumps(asdict(letter), default=str, ensure_ascii=False))
    if total > len(letters):
        click.echo(f"{len(letters)} of {total} shown; --limit shows more", err=True)


@dead_letters.command()
@_on_letters
@click.option("--all", "everything", is_flag=True, help="Those of every thread.")
def retry(database: str, table: tuple[str | None, str], thread_id: str | None, *, everything: bool) -> None:
    """Apply dead letters again, each once; exit 1 if one is refused again. Says which, and why."""
    _choose(thread_id, everything=everything)
    applied, refused = _operate("retry", database, table, thread_id)
    click.echo(f"applied {applied}, refused again {len(refused)}")
    for letter in refused[:_TOLD]:
        click.echo(f"refused: {letter.thread_id!r}: {letter.error} [{letter.sqlstate}]", err=True)
    if len(refused) > _TOLD:
        click.echo(f"and {len(refused) - _TOLD} more: tracker-daemon dead-letters list", err=True)
    _tell_if_none(applied + len(refused), thread_id)
    sys.exit(1 if refused else 0)


@dead_letters.command()
@_on_letters
@click.option("--all", "everything", is_flag=True, help="Those of every thread.")
def drop(database: str, table: tuple[str | None, str], thread_id: str | None, *, everything: bool) -> None:
    """Delete dead letters for good."""
    _choose(thread_id, everything=everything)
    dropped = _operate("drop", database, table, thread_id)
    click.echo(f"dropped {dropped}")
    _tell_if_none(dropped, thread_id)


def _tell_if_none(number: int, thread_id: str | None) -> None:
    if not number:
        of_whom = "" if thread_id is None else f" of thread {thread_id!r}"
        click.echo(f"there is no dead letter{of_whom}", err=True)


def _choose(thread_id: str | None, *, everything: bool) -> None:
    if (thread_id is None) != everything:
        raise click.UsageError("say which: --thread-id ID or --all")


def _operate(name: str, *arguments: Any, **options: Any) -> Any:
    """Run one of `operations`; what goes wrong is one line."""
    with _one_line():
        import anyio  # noqa: PLC0415 - rule 4

        from tracker_daemon import operations  # noqa: PLC0415 - rule 4

        return anyio.run(partial(getattr(operations, name), *arguments, **options))


def _print(lines: list[str]) -> None:
    for line in lines:
        click.echo(line)


program.add_command(journal_command.group(setting, _one_line, _database, _table))
for _command in (
    *serve_command.commands(setting, _one_line, _database, _table),
    *stream_command.commands(setting, _one_line, _database, _table),
):
    program.add_command(_command)


if __name__ == "__main__":
    main()
