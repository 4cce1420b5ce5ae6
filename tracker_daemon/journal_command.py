"""`tracker-daemon journal inspect | recover`: what an operator needs after a fault.

Nothing but `click` is imported before a command runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    Setting = Callable[..., Callable[[Any], Any]]
    Check = Callable[[click.Context, click.Parameter, str], Any]


def group(
    setting: Setting, one_line: Callable[[], AbstractContextManager[None]], database: Check, table: Check
) -> click.Group:
    """Return the commands; the arguments are the command line's own ways with options and errors."""

    @click.group("journal")
    def journal() -> None:
        """Look at a journal, or apply what is left in it."""

    directory = click.argument("directory", type=click.Path(path_type=Path))

    @journal.command()
    @directory
    @click.option("--json", "as_json", is_flag=True, help="A JSON object a window, one a line.")
    def inspect(directory: Path, *, as_json: bool) -> None:
        """Print every window in DIRECTORY; exit 1 if one is damaged. Changes nothing, also while a tracker uses it."""
        with one_line():
            from tracker_daemon.journal.inspection import inspect as look  # noqa: PLC0415

            windows = look(directory)
        if not as_json:
            click.echo(
                f"{'producer':36} {'batches':>15} {'state':6} {'files':>5} {'bytes':>11} {'calls':>9} {'torn':>6}"
            )
        for seen in windows:
            if as_json:
                click.echo(json.dumps(seen.as_json()))
                continue
            batches = f"{seen.first}-{'?' if seen.last is None else seen.last}"
            state = "sealed" if seen.sealed else "open"
            click.echo(
                f"{seen.producer} {batches:>15} {state:6} {len(seen.files):>5} {seen.size:>11,} {seen.calls:>9,}"
                f" {seen.torn:>6,}"
            )
            if seen.damage:
                click.echo(f"  {seen.damage}", err=True)
        sys.exit(1 if any(seen.damage for seen in windows) else 0)

    @journal.command()
    @directory
    @setting("--database", required=True, callback=database, metavar="URL", help="postgresql:…, a conninfo.")
    @setting("--table", default="conversations", callback=table, help="The conversations; may be schema.name.")
    @setting("--create-missing", type=bool, default=True, help="Whether a turn may create its row.")
    @click.option("--skip-damage", is_flag=True, help="Pass over what is damaged, and apply the rest.")
    @click.option("--timeout", type=click.FloatRange(0.1), default=600.0, show_default=True, help="Seconds.")
    def recover(directory: Path, database: str, **options: Any) -> None:
        """Apply what is left in DIRECTORY, each call exactly once; exit 1 if something stays there."""
        with one_line():
            from tracker_daemon.recovery import recover as apply  # noqa: PLC0415

            done = apply(directory, database, **options)
        click.echo(f"applied {done.calls:,} calls, {done.torn:,} torn bytes passed over")
        for text in done.skipped:
            click.echo(f"passed over: {text}", err=True)
        for text in done.problems:
            click.echo(f"not applied: {text}", err=True)
        sys.exit(1 if done.problems else 0)

    return journal
