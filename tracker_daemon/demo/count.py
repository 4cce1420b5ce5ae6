"""What the calls must add up to, counted beside the traffic by other means than the tracker's.

Rules:
1. Plain Python: names in a list, `Decimal` sums. Nothing of the tracker is imported.
2. A conversation is counted by whoever holds it, and held by one at a time: so the order of its calls is known.
3. The moment of a call is known as a span: the clock before it and after it, nanoseconds since 1970.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Context, Decimal, Inexact, InvalidOperation
from typing import Any, Literal, NamedTuple, TypeAlias

Method: TypeAlias = Literal["ensure_conversation", "record_turn", "resolve"]
Span: TypeAlias = tuple[int, int]

# Wide enough for every sum here; a digit that would be rounded away is an error instead.
_EXACT = Context(prec=200, traps=[Inexact, InvalidOperation])


class Call(NamedTuple):
    """One call: the method's name and its arguments after the thread id."""

    method: Method
    arguments: tuple[Any, ...] = ()


@dataclass(slots=True)
class Counted:
    """One conversation: what its row must say."""

    calls: int = 0
    refused: int = 0
    turns: int = 0
    tokens: int = 0
    cost: Decimal = Decimal(0)
    agents: list[str] = field(default_factory=list)
    resolution: str | None = None
    resolves: int = 0
    first: Span | None = None
    """When the first call was made."""
    active: Span | None = None
    """When the last turn was recorded, or the row came into being."""
    ended: Span | None = None
    """When it was last resolved."""

    def add(self, call: Call, span: Span) -> None:
        """Count one accepted call."""
        self.calls += 1
        if self.first is None:
            self.first = self.active = span
        if call.method == "record_turn":
            self._add_turn(*call.arguments)
            self.active = span
        elif call.method == "resolve":
            (self.resolution,) = call.arguments
            self.resolves += 1
            self.ended = span

    def _add_turn(self, agent: str | None, tokens: int, cost: float | Decimal) -> None:
        self.turns += 1
        self.tokens += tokens
        # A float counts as the decimal that it prints as.
        self.cost = _EXACT.add(self.cost, Decimal(str(cost)))
        if agent is not None and agent not in self.agents:
            self.agents.append(agent)
