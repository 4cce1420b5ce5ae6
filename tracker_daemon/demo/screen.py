"""What the demo shows: a quiet table on a terminal, a line a second elsewhere, and at the end the same report.

Rules:
1. Both ways show the same numbers; only the terminal has colours and redraws.
2. Nothing here measures or decides: it is told.
"""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

_BAR: Final = 32
_BARS_SHOWN: Final = 20
_HEIGHTS: Final = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Progress:
    """The numbers of one moment."""

    phase: str
    elapsed: float
    seconds: float
    calls: int = 0
    calls_rate: float = 0.0
    waiting_calls: int = 0
    waiting_threads: int = 0
    rows: int = 0
    rows_rate: float = 0.0
    flushes: int = 0
    p50: float = 0.0
    p99: float = 0.0
    recent: tuple[float, ...] = ()
    """The latest flushes, seconds each."""

    @property
    def calls_per_row(self) -> float:
        """Calls that are in the table, by row written for them."""
        return (self.calls - self.waiting_calls) / self.rows if self.rows else 0.0


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the report."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """How it ended."""

    exact: bool
    verdict: str
    headline: str
    differences: Sequence[str]
    sections: Sequence[tuple[str, Sequence[Figure]]]
    more: int = 0
    """Differences that are not named."""


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
    console = Console(highlight=False)
    return Terminal(console) if console.is_terminal and not console.is_dumb_terminal else Lines()


def milliseconds(seconds: float) -> str:
    """Return a latency as people read it."""
    value = seconds * 1_000
    return f"{value:.0f} ms" if value >= 10 else f"{value:.1f} ms"


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
                self.say("".join(_columns(figure)).rstrip())
        self.say("")
        for difference in report.differences:
            self.say(f"   {difference}")
        if report.more:
            self.say(f"   and {report.more:,} more")
        self.say(f"{report.verdict}  {report.headline}")


class Terminal:
    """The same numbers, redrawn in place four times a second."""

    every = 0.25

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._waiting: deque[float] = deque(maxlen=_BARS_SHOWN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._live.stop()

    def head(self, title: str) -> None:
        """See `Screen.head`."""
        self._print(Text(f"\n {title}", "bold"))

    def say(self, text: str) -> None:
        """See `Screen.say`."""
        self._print(Text(f" {text}", "dim"))

    def show(self, progress: Progress) -> None:
        """See `Screen.show`."""
        self._waiting.append(progress.waiting_threads)
        self._live.start()
        self._live.update(self._picture(progress), refresh=True)

    def report(self, report: Report) -> None:
        """See `Screen.report`."""
        self._live.stop()
        for title, figures in report.sections:
            self._print(Text(f"\n {title}\n", "bold"))
            for figure in figures:
                self._print(_text(figure))
        self._print(Text())
        for difference in report.differences:
            self._print(Text.assemble(("   ✗ ", "red"), difference))
        if report.more:
            self._print(Text(f"     and {report.more:,} more"))
        mark, style = ("✔", "bold green") if report.exact else ("✗", "bold red")
        self._print(Text.assemble((f" {mark} {report.verdict}", style), "  ", report.headline, "\n"))

    def _picture(self, now: Progress) -> RenderableType:
        figures = [
            Figure("calls made", f"{now.calls:,}", f"{now.calls_rate:>7,.0f} a second"),
            Figure("rows written", f"{now.rows:,}", f"{now.rows_rate:>7,.0f} a second"),
            Figure("calls per row written", f"{now.calls_per_row:.1f}"),
            Figure(
                "queue depth, threads",
                f"{now.waiting_threads:,}",
                f"{now.waiting_calls:>7,} calls  {_bars(self._waiting)}",
            ),
            Figure("flush p50", milliseconds(now.p50), f"{now.flushes:>7,} flushes"),
            Figure("flush p99", milliseconds(now.p99), f"{_bars(now.recent[-_BARS_SHOWN:])}"),
        ]
        passed = min(now.elapsed, now.seconds)
        filled = round(_BAR * passed / now.seconds)
        bar = Text.assemble("\n   ", ("━" * filled, "cyan"), ("━" * (_BAR - filled), "bright_black"))
        bar.append(f"  {passed:.1f} of {now.seconds:g} s   {now.phase}", "dim")
        return Group(Text(), *map(_text, figures), bar)

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)


def _columns(figure: Figure) -> tuple[str, str, str]:
    return f"   {figure.label:<22}", f"{figure.value:>10}", f"   {figure.note}"


def _text(figure: Figure) -> Text:
    label, value, note = _columns(figure)
    return Text.assemble((label, "dim"), (value, "bold"), (note, "dim"), no_wrap=True, overflow="ellipsis")


def _bars(values: Sequence[float]) -> str:
    """Return one bar a value; the highest is the tallest."""
    top = max(values, default=0.0) or 1.0
    return "".join(_HEIGHTS[min(len(_HEIGHTS) - 1, int(value / top * len(_HEIGHTS)))] for value in values)
