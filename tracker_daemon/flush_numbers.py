"""What the worker counts beside the books: plain integers, read by the Prometheus collector at a scrape.

Only the worker writes; a reader sees each number whole.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ROWS: Final = (1, 10, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000)
_RECENT: Final = 4_096


class Histogram:
    """Counts of observations by upper bound (the last one has none), their sum, and the most recent ones."""

    __slots__ = ("bounds", "counts", "recent", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        self.recent: deque[float] = deque(maxlen=_RECENT)

    def observe(self, value: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value
        self.recent.append(value)

    def quantile(self, share: float) -> float:
        """Return the *share* quantile of the most recent observations, 0 without any."""
        values = sorted(self.recent.copy())
        return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0


@dataclass(slots=True)
class FlushNumbers:
    """The flush stage's counters and gauges."""

    flush_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    flush_rows: Histogram = field(default_factory=lambda: Histogram(ROWS))
    commit_lag_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    flushes: Counter[str] = field(default_factory=Counter)
    """By outcome: ok, duplicate, retry, error."""
    errors: Counter[str] = field(default_factory=Counter)
    """By kind of fault."""
    last_success: float = 0.0
    """Seconds since 1970 of the last commit."""
    regressions: int = 0
    fenced: bool = False
    ledger: tuple[str, int, int] = ("", 0, 0)
    """Producer, epoch and sequence of the last batch that the sink acknowledged."""
    last_error: BaseException | None = None
    """What the sink raised last, until a batch goes through."""
