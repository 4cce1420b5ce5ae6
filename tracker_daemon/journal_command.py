"""`tracker-daemon journal inspect | recover`: what an operator needs after a fault.

Nothing but `click` is imported before a command runs.
"""

from __future__ import annotations

import json
import logging
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tracker_daemon.options import DATABASE

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from uuid import UUID

    Setting = Callable[..., Callable[[Any], Any]]
    Check = Callable[[click.Context, click.Parameter, str], Any]
    Table = tuple[str | None, str]


def group(
    setting: Setting, one_line: Callable[[], AbstractContextManager[None]], database: Check, table: Check
) -> click.Group:
    """Return the commands; the arguments are the command line's own ways with options and errors."""

    @click.group("journal")
    def journal() -> None:
        """Look at a journal, or apply what is left in it."""

    def may_be_absent(context: click.Context, parameter: click.Parameter, value: str | None) -> Any:
        return None if value is None else database(context, parameter, value)

    directory = click.argument("directory", envvar="TRACKER_JOURNAL", type=click.Path(path_type=Path))
    where = partial(setting, "--database", metavar="URL", help=DATABASE)
    conversations = setting(
        "--table", default="conversations", callback=table, help="The conversations; may be schema.name."
    )

    @journal.command()
    @directory
    @where(callback=may_be_absent)
    @conversations
    @click.option("--json", "as_json", is_flag=True, help="A JSON object a window, one a line, with each of its files.")
    def inspect(directory: Path, database: str | None, table: Table, *, as_json: bool) -> None:
        """Print every window in DIRECTORY (env var: TRACKER_JOURNAL); with a database also what it does not have.

        Changes nothing, also while a tracker uses it. Exits with 1 if something is damaged.
        """
        with one_line():
            import anyio  # noqa: PLC0415

            from tracker_daemon import journal_operations as operations  # noqa: PLC0415

            report = anyio.run(operations.look, directory, database, table)
            texts = map(json.dumps, operations.as_values(report)) if as_json else operations.as_lines(report)
        for text in texts:
            click.echo(text)
        faults = operations.faults_of(report)
        for fault in faults:
            click.echo(fault, err=True)
        sys.exit(1 if faults else 0)

    @journal.command()
    @directory
    @where(required=True, callback=database)
    @conversations
    @click.option("--skip-damage", is_flag=True, help="Pass over what is damaged; what is uncertain by it is left out.")
    @click.option(
        "--again",
        metavar="PRODUCER",
        type=click.UUID,
        multiple=True,
        help="Apply all of a life whose row in the ledger is gone (a restored backup), as if none of it had been "
        "applied. You have checked that: calls that are there are doubled.",
    )
    def recover(directory: Path, database: str, table: Table, *, skip_damage: bool, again: tuple[UUID, ...]) -> None:
        """Apply what is left in DIRECTORY (env var: TRACKER_JOURNAL), each call exactly once.

        No tracker may be at work there. Safe to interrupt and to repeat. Exits with 1 if something is left.
        """
        logging.getLogger("tracker_daemon").addHandler(logging.NullHandler())  # all of it is told here
        tell = partial(click.echo, err=True)
        with one_line():
            import anyio  # noqa: PLC0415

            from tracker_daemon import journal_operations as operations  # noqa: PLC0415

            recover = partial(operations.recover, directory, database, table, tell=tell, again=again)
            done = anyio.run(partial(recover, skip_damage=skip_damage))
        for text in operations.told_of(done):
            click.echo(text)
        for text in [*operations.warned_of(done), *(f"not applied: {text}" for text in done.faults)]:
            tell(text)
        sys.exit(0 if operations.is_done(done) else 1)

    return journal
