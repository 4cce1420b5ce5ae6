"""What the demo shows: a quiet table on a terminal, a line a second elsewhere, and at the end the same report.

Rules:
1. Both ways show the same numbers; only the terminal has colours and redraws.
2. Nothing here measures or decides: it is told.
3. The terminal's way needs `rich`; where that is not installed, as in the daemon's image, there are lines.
"""

from __future__ import annotations

import sys
from typing import Protocol, Self

from tracker_daemon.demo.figures import Progress, Report, columns, milliseconds


class Screen(Protocol):
    """Shows progress, then the report."""

    every: float
    """Seconds between two showings."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exc_info: object) -> None: ...

    def head(self, title: str) -> None:
        """Say what this is."""
        ...

    def say(self, text: str) -> None:
        """Say something that stays."""
        ...

    def show(self, progress: Progress) -> None:
        """Show the numbers of this moment."""
        ...

    def report(self, report: Report) -> None:
        """Show the end; nothing is shown after it."""
        ...


def screen() -> Screen:
    """Return the terminal's screen if stdout is a terminal, plain lines otherwise."""
    try:
        from tracker_daemon.demo.terminal import terminal  # noqa: PLC0415 - rule 3
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        return Lines()
    return terminal() or Lines()


class Lines:
    """Plain text, a line a second."""

    every = 1.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def head(self, title: str) -> None:
        """See `Screen.head`."""
        self.say(title)

    def say(self, text: str) -> None:
        """See `Screen.say`."""
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    def show(self, progress: Progress) -> None:
        """See `Screen.show`."""
        now = progress
        self.say(
            f"{now.elapsed:5.1f} s  {now.phase}: calls {now.calls:,} ({now.calls_rate:,.0f}/s)"
            f", waiting {now.waiting_threads:,} threads ({now.waiting_calls:,} calls)"
            f", rows {now.rows:,} ({now.rows_rate:,.0f}/s, {now.calls_per_row:.1f} calls each)"
            f", flush p50 {milliseconds(now.p50)} p99 {milliseconds(now.p99)}"
        )

    def report(self, report: Report) -> None:
        """See `Screen.report`."""
        for title, figures in report.sections:
            self.say(f"\n{title}")
            for figure in figures:
                self.say("".join(columns(figure)).rstrip())
        self.say("")
        for difference in report.differences:
            self.say(f"   {difference}")
        if report.more:
            self.say(f"   and {report.more:,} more")
        self.say(f"{report.verdict}  {report.headline}")
