"""How long to wait before a batch is tried again: full jitter, so that a thousand hosts do not come back as one.

Source: Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from random import Random


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits of a random share of `first * 2**tries`, at most `most`; seconds."""

    first: float
    most: float
    least: float = 0.0

    def wait(self, tries: int, random: Random) -> float:
        """Return the seconds to wait after *tries* failures (from 1)."""
        ceiling = min(self.most, self.first * 2.0 ** min(tries - 1, 32))
        return max(self.least, random.uniform(0.0, ceiling))


PASSING: Final = Backoff(first=0.05, most=5.0)
"""What passes by itself: a lost connection, a lock, a full server."""

STANDING: Final = Backoff(first=1.0, most=15.0, least=0.5)
"""What somebody has to mend: a missing table, a wrong password. Not hammered, and found mended within seconds."""
