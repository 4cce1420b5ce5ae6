"""Deltas as what Postgres takes: array literals for one statement, rows for COPY BINARY.

Rules:
1. Literals are made by hand: the driver's adaptation of lists costs four times as much.
2. Names of agents and resolutions recur: each distinct one is sent once, rows carry its number (from 1).
3. What does not fit COPY's fixed columns (`fits_stage`) goes as arrays, which take everything the door lets in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tracker_daemon.delta import COST_SCALE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tracker_daemon.delta import ThreadDelta

STAGE_NAME: Final = 120  # characters of thread_id in sql/stage.sql
_BIGINT: Final = 2**63
STAGE_TYPES: Final = ("text", "bool", "int8", "int8", "int8", "int4", "int8", "int8", "int4", "int8")


class Numbering:
    """Numbers distinct values from 1 in order of appearance."""

    def __init__(self) -> None:
        self._numbers: dict[object, int] = {}
        self.literals: list[str] = []

    def of(self, value: str | tuple[str, ...] | None) -> int | None:
        """Return the number of *value*, `None` for what is empty."""
        if not value:
            return None
        number = self._numbers.get(value)
        if number is None:
            number = self._numbers[value] = len(self._numbers) + 1
            self.literals.append(quoted(value if isinstance(value, str) else text_array(value)))
        return number

    def array(self) -> str:
        """Return the distinct values as a `text[]` literal."""
        return f"{{{','.join(self.literals)}}}"


def quoted(text: str) -> str:
    """Return *text* as an element of an array literal."""
    if "\\" in text or '"' in text:
        text = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def text_array(values: Iterable[str]) -> str:
    """Return a `text[]` literal."""
    return f"{{{','.join(map(quoted, values))}}}"


def _array(values: Iterable[object]) -> str:
    return f"{{{','.join(['NULL' if value is None else str(value) for value in values])}}}"


def arrays(deltas: Sequence[ThreadDelta]) -> dict[str, str]:
    """Return the parameters of sql/rows_arrays.sql and sql/merge.sql for *deltas*."""
    agents, resolutions = Numbering(), Numbering()
    return {
        "thread_ids": text_array(delta.thread_id for delta in deltas),
        "ensured": _array("t" if delta.ensures else "f" for delta in deltas),
        "first_us": _array(delta.first_at for delta in deltas),
        "last_turn_us": _array(delta.last_turn_at for delta in deltas),
        "turns": _array(delta.turns for delta in deltas),
        "agents": _array(agents.of(delta.agents) for delta in deltas),
        "tokens": _array(delta.tokens for delta in deltas),
        "costs": _array(_cost(delta) for delta in deltas),
        "resolution": _array(resolutions.of(delta.resolution_type) for delta in deltas),
        "resolved_us": _array(delta.resolved_at for delta in deltas),
        "agent_lists": agents.array(),
        "resolutions": resolutions.array(),
    }


def _cost(delta: ThreadDelta) -> str:
    if delta.cost_rest is None and -_BIGINT < delta.cost_units < _BIGINT:
        return f"{delta.cost_units}e-{COST_SCALE}"
    return format(delta.cost, "f")


def fits_stage(deltas: Sequence[ThreadDelta]) -> bool:
    """Say whether every delta fits the columns of sql/stage.sql."""
    return all(
        len(delta.thread_id) <= STAGE_NAME
        and delta.cost_rest is None
        and -_BIGINT < delta.cost_units < _BIGINT
        and -_BIGINT < delta.tokens < _BIGINT
        for delta in deltas
    )


class StageRows:
    """Deltas as rows of sql/stage.sql; the distinct names are complete once the rows are used up."""

    def __init__(self) -> None:
        self._agents, self._resolutions = Numbering(), Numbering()

    def row(self, delta: ThreadDelta) -> tuple[object, ...]:
        """Return one row, in the order of the columns."""
        return (
            delta.thread_id,
            delta.ensures > 0,
            delta.first_at,
            delta.last_turn_at,
            delta.turns,
            self._agents.of(delta.agents),
            delta.tokens,
            delta.cost_units,
            self._resolutions.of(delta.resolution_type),
            delta.resolved_at,
        )

    def parameters(self) -> dict[str, str]:
        """Return the remaining parameters of sql/merge.sql."""
        return {"agent_lists": self._agents.array(), "resolutions": self._resolutions.array()}
