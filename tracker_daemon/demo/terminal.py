"""The demo's numbers on a terminal: a quiet table, redrawn in place."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final, Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from tracker_daemon.demo.figures import Figure, Progress, Report, columns, milliseconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

_BAR: Final = 32
_BARS_SHOWN: Final = 20
_HEIGHTS: Final = "▁▂▃▄▅▆▇█"


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


def _text(figure: Figure) -> Text:
    label, value, note = columns(figure)
    return Text.assemble((label, "dim"), (value, "bold"), (note, "dim"), no_wrap=True, overflow="ellipsis")


def _bars(values: Sequence[float]) -> str:
    """Return one bar a value; the highest is the tallest."""
    top = max(values, default=0.0) or 1.0
    return "".join(_HEIGHTS[min(len(_HEIGHTS) - 1, int(value / top * len(_HEIGHTS)))] for value in values)


def terminal() -> Terminal | None:
    """Return the screen if stdout is a terminal that can redraw."""
    console = Console(highlight=False)
    return Terminal(console) if console.is_terminal and not console.is_dumb_terminal else None
