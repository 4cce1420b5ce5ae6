"""What is shown of the demo: the numbers of one moment, and how it ended. Nothing here measures or decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


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


def milliseconds(seconds: float) -> str:
    """Return a latency as people read it."""
    value = seconds * 1_000
    return f"{value:.0f} ms" if value >= 10 else f"{value:.1f} ms"


def columns(figure: Figure) -> tuple[str, str, str]:
    """Return a line's three parts, padded."""
    return f"   {figure.label:<22}", f"{figure.value:>10}", f"   {figure.note}"
