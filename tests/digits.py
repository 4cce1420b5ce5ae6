"""Conservation with digits: call number k on a thread carries 4**k tokens.

Each base-4 digit of a thread's sum says how often its call was counted: 0 missing, 1 once, 2 or 3 doubled. So a loss
cannot hide behind a duplicate, as it could in a plain count.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

CALLS_PER_THREAD = 31  # 4**31 - 1 fits bigint


@dataclass
class Verdict:
    """Calls by how often the table counted them."""

    missing: list[tuple[str, int]] = field(default_factory=list)
    doubled: list[tuple[str, int]] = field(default_factory=list)
    once: int = 0

    @property
    def exact(self) -> bool:
        """Every call was counted once."""
        return not self.missing and not self.doubled


class Digits:
    """Hands out the tokens of each call and reads the sums."""

    def __init__(self) -> None:
        self.made: dict[str, int] = {}

    def tokens(self, thread_id: str) -> int:
        """Return the tokens of the next call on *thread_id*."""
        number = self.made.get(thread_id, 0)
        assert number < CALLS_PER_THREAD, f"{thread_id} has no digit left"
        self.made[thread_id] = number + 1
        return 4**number

    def read(self, sums: Mapping[str, int]) -> Verdict:
        """Compare the table's sums with what was handed out."""
        verdict = Verdict()
        for thread_id, calls in self.made.items():
            rest = sums.get(thread_id, 0)
            for number in range(calls):
                rest, digit = divmod(rest, 4)
                if digit == 1:
                    verdict.once += 1
                else:
                    (verdict.doubled if digit else verdict.missing).append((thread_id, number))
            if rest:
                verdict.doubled.append((thread_id, calls))
        verdict.doubled += [(thread_id, 0) for thread_id in sums.keys() - self.made.keys()]
        return verdict
