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
import json
import logging
import os
import re
import sys
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib import import_module
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
    from collections.abc import Callable, Iterator, Mapping

_PREFIX: Final = "TRACKER_"
_FILE: Final = "_FILE"
_SECRET: Final = frozenset({"TRACKER_DATABASE"})
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

    Every option is also an environment variable; those that hold secrets may be given as a file, by a variable
    with _FILE after its name.
    """
    group = context.command
    assert isinstance(group, click.Group)
    known = _variables(group)
    _refuse_unknown(known, os.environ)
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


def _database(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Check a database's URL without repeating it."""
    if value is None:  # where it is not required
        return None
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
@setting("--rate", type=click.FloatRange(0, 100_000, min_open=True), default=20_000.0, help="Calls a second.")
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
    if check:
        found = _operate("missing", database, table)
        _print(found or ["nothing is missing"])
        sys.exit(1 if found else 0)
    _print([f"applied {step}" for step in _operate("migrate", database, table)] or ["nothing to do"])


@program.group("dead-letters")
def dead_letters() -> None:
    """Look after the deltas that the database would not take."""


def _on_letters(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that every command on dead letters has."""
    options = [
        setting("--database", required=True, callback=_database, metavar="URL", help="postgresql:…, a conninfo."),
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
    for letter in _operate("letters", database, table, thread_id, limit):
        click.echo(json.dumps(asdict(letter), default=str, ensure_ascii=False))


@dead_letters.command()
@_on_letters
@click.option("--all", "everything", is_flag=True, help="Those of every thread.")
def retry(database: str, table: tuple[str | None, str], thread_id: str | None, *, everything: bool) -> None:
    """Apply dead letters again, each once; exit 1 if one is refused again."""
    _choose(thread_id, everything=everything)
    applied, refused = _operate("retry", database, table, thread_id)
    click.echo(f"applied {applied}, refused again {refused}")
    sys.exit(1 if refused else 0)


@dead_letters.command()
@_on_letters
@click.option("--all", "everything", is_flag=True, help="Those of every thread.")
def drop(database: str, table: tuple[str | None, str], thread_id: str | None, *, everything: bool) -> None:
    """Delete dead letters for good."""
    _choose(thread_id, everything=everything)
    click.echo(f"dropped {_operate('drop', database, table, thread_id)}")


def _choose(thread_id: str | None, *, everything: bool) -> None:
    if (thread_id is None) != everything:
        raise click.UsageError("say which: --thread-id ID or --all")


@program.group()
def journal() -> None:
    """Look after a journal's directory."""


def _on_journal(*, required: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return the decorator that adds what every command on a journal has."""
    parts = [
        click.argument("directory", envvar=f"{_PREFIX}JOURNAL", type=click.Path(path_type=Path)),
        setting("--database", required=required, callback=_database, metavar="URL", help="postgresql:…, a conninfo."),
        setting("--table", default="conversations", callback=_table, help="The conversations; may be schema.name."),
    ]

    def add(command: Callable[..., None]) -> Callable[..., None]:
        for part in reversed(parts):
            command = part(command)
        return command

    return add


@journal.command("inspect")
@_on_journal(required=False)
@setting("--json", "as_json", is_flag=True, help="All of it as JSON, each file by itself.")
def inspect_journal(directory: Path, database: str | None, table: tuple[str | None, str], *, as_json: bool) -> None:
    """Say what stands in DIRECTORY (env var: TRACKER_JOURNAL); with a database also what it does not have.

    Changes nothing, and works beside a tracker. Exits with 1 if something is damaged.
    """
    report = _operate("look", directory, database, table, module="journal_operations")
    from tracker_daemon.journal_operations import as_lines, as_values  # noqa: PLC0415 - rule 4

    _print([json.dumps(as_values(report), ensure_ascii=False)] if as_json else as_lines(report))
    sys.exit(1 if any(life.damage or life.fault for life in report.lives) else 0)


@journal.command("recover")
@_on_journal(required=True)
@setting("--skip-damage", is_flag=True, help="Pass over what is damaged; what of it is uncertain is left out.")
def recover_journal(directory: Path, database: str, table: tuple[str | None, str], *, skip_damage: bool) -> None:
    """Apply what is left in DIRECTORY (env var: TRACKER_JOURNAL), exactly once; safe to repeat and to interrupt.

    No tracker may be at work there. Exits with 1 if something is left.
    """
    logging.getLogger("tracker_daemon").addHandler(logging.NullHandler())  # all of it is told here
    tell = partial(click.echo, err=True)
    recover = partial(_operate, "recover", directory, database, table, module="journal_operations")
    recovery = recover(skip_damage=skip_damage, tell=tell)
    from tracker_daemon.journal_operations import is_done, told_of  # noqa: PLC0415 - rule 4

    _print(told_of(recovery))
    for fault in recovery.faults:
        click.echo(f"Error: {fault}", err=True)
    sys.exit(0 if is_done(recovery) else 1)


def _operate(name: str, *arguments: Any, module: str = "operations", **named: Any) -> Any:
    """Run one of `operations`, or of another module; what goes wrong is one line."""
    with _one_line():
        import anyio  # noqa: PLC0415 - rule 4

        operation = getattr(import_module(f"tracker_daemon.{module}"), name)
        return anyio.run(partial(operation, *arguments, **named))


def _print(lines: list[str]) -> None:
    for line in lines:
        click.echo(line)


if __name__ == "__main__":
    main()
