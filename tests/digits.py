"""Conservation with digits: call number k on a thread carries 4**k tokens.

Each base-4 digit of a thread's sum says how often its call was counted: 0 missing, 1 once, 2 or 3 doubled. So a loss
cannot hide behind a duplicate, as it could in a plain count.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping

CALLS_PER_THREAD = 31  # 4**31 - 1 fits bigint


def of_lives(
    sums: Mapping[str, int], made: Iterable[tuple[str, int, Container[int]]]
) -> tuple[list[str], list[str], int]:
    """Return what is missing, what is doubled, and how many calls were counted once.

    Args:
        sums: the table's.
        made: of each life its name, how many calls it made, and the numbers of those that may be counted or not; call
            number *calls* may have been taken by a life that was killed before it heard of it. A life NAME calls on the
            threads NAME.0, NAME.1 and so on.
    """
    missing, doubled, once = list[str](), list[str](), 0
    for name, calls, maybe in made:
        for number in range(calls + 1):
            group, place = divmod(number, CALLS_PER_THREAD)
            digit = sums.get(f"{name}.{group}", 0) // 4**place % 4
            once += digit == 1
            if digit > 1 or (number == calls and number not in maybe and digit):
                doubled.append(f"{name} {number} of {calls}")
            elif digit == 0 and number < calls and number not in maybe:
                missing.append(f"{name} {number} of {calls}")
    return missing, doubled, once


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
