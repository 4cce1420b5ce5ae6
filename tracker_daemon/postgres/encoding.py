"""Deltas as what Postgres takes: array literals for one statement, rows for COPY BINARY.

Rules:
1. Literals and rows are made by hand, from rows as the window keeps them (`delta`): the driver's adaptation costs four
   times as much, and objects in between as much again.
2. Names of agents and resolutions recur: each distinct one is sent once, rows carry its number (from 1).
3. What does not fit COPY's fixed columns (`fits_stage`) goes as arrays, which take everything the door lets in.
4. What is made of one part of a batch holds the interpreter for that part: the caller lets go of it in between.
"""

from __future__ import annotations

from functools import cache
from struct import Struct
from typing import TYPE_CHECKING, Final

from tracker_daemon.delta import COST_SCALE, rows_of, unpacked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tracker_daemon.delta import Row, ThreadDelta

STAGE_NAME: Final = 120  # characters of thread_id in sql/stage.sql
_BIGINT: Final = 2**63
_PARTS: Final = (
    "thread_ids",
    "ensured",
    "first_us",
    "last_turn_us",
    "turns",
    "agents",
    "tokens",
    "costs",
    "resolution",
    "resolved_us",
)
# PostgreSQL manual, "COPY", Binary Format: signature, flags and the length of an extension; -1 ends the rows.
COPY_HEADER: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)
COPY_END: Final = b"\xff\xff"


class Numbering:
    """Numbers distinct values from 1 in order of appearance.

    Args:
        literal: how one stands in a `text[]`.
    """

    def __init__(self, literal: Callable[[object], str]) -> None:
        self._literal = literal
        self.numbers: dict[object, int] = {}

    def new(self, value: object) -> int:
        """Return the number of *value*, which may be new."""
        # Of many names a dict, which is no key.
        key = tuple(value) if type(value) is dict else value
        return self.numbers.setdefault(key, len(self.numbers) + 1)

    def array(self) -> str:
        """Return the distinct values as a `text[]` literal."""
        return f"{{{','.join(map(self._literal, self.numbers))}}}"


def quoted(text: str) -> str:
    """Return *text* as an element of an array literal."""
    if "\\" in text or '"' in text:
        text = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def text_array(values: Iterable[str]) -> str:
    """Return a `text[]` literal."""
    return f"{{{','.join(map(quoted, values))}}}"


def _name(value: object) -> str:
    return quoted(str(value))


def _names(value: object) -> str:
    """Return the names of one row as an element of an array of literals."""
    return quoted(text_array((value,) if isinstance(value, str) else value))  # type: ignore[arg-type]


class Arrays:
    """The parameters of sql/rows_arrays.sql and sql/merge.sql, made part by part."""

    def __init__(self) -> None:
        self._agents, self._resolutions = Numbering(_names), Numbering(_name)
        self._parts: dict[str, list[str]] = {name: [] for name in _PARTS}

    def add(self, rows: Sequence[Row]) -> None:
        """Add some rows."""
        ids, turns, tokens, units, first, last, agents, ensures, rares = zip(*rows, strict=True)
        number = self._agents.new
        columns = (
            _texts(ids),
            ",".join(["t" if count else "f" for count in ensures]),
            ",".join(map(str, first)),
            _numbers(last),
            ",".join(map(str, turns)),
            ",".join(["NULL" if names is None else str(number(names)) for names in agents]),
            ",".join(map(str, tokens)),
            _costs(rows, units),
            *self._resolved(rares),
        )
        for name, text in zip(_PARTS, columns, strict=True):
            self._parts[name].append(text)

    def _resolved(self, rares: Sequence[tuple[object, ...] | None]) -> tuple[str, str]:
        if not any(rares):
            nothing = ",".join(["NULL"] * len(rares))
            return nothing, nothing
        names = [None if rare is None else rare[1] for rare in rares]
        return (
            _numbers([None if name is None else self._resolutions.new(name) for name in names]),
            _numbers([None if rare is None else rare[2] for rare in rares]),
        )

    def parameters(self) -> dict[str, str]:
        """Return what was added."""
        return {name: f"{{{','.join(parts)}}}" for name, parts in self._parts.items()} | {
            "agent_lists": self._agents.array(),
            "resolutions": self._resolutions.array(),
        }


def arrays(deltas: Sequence[ThreadDelta]) -> dict[str, str]:
    """Return the parameters of sql/rows_arrays.sql and sql/merge.sql for *deltas*."""
    made, rows = Arrays(), rows_of(deltas)
    if rows:
        made.add(rows)
    return made.parameters()


def _texts(values: Sequence[str]) -> str:
    text = '","'.join(values)
    if "\\" in text or text.count('"') > 2 * (len(values) - 1):
        return ",".join(map(quoted, values))
    return f'"{text}"'


def _numbers(values: Sequence[object]) -> str:
    if None in values:
        return ",".join(["NULL" if value is None else str(value) for value in values])
    return ",".join(map(str, values))


def _costs(rows: Sequence[Row], units: Sequence[int]) -> str:
    if min(units) > -_BIGINT and max(units) < _BIGINT and not any(map(_rest, rows)):
        return f"e-{COST_SCALE},".join(map(str, units)) + f"e-{COST_SCALE}"
    return ",".join(map(_cost, rows))


def _cost(row: Row) -> str:
    if not _rest(row) and -_BIGINT < row[3] < _BIGINT:
        return f"{row[3]}e-{COST_SCALE}"
    return format(unpacked(row).cost, "f")


def _rest(row: Row) -> bool:
    return row[8] is not None and row[8][3] is not None


def fits_stage(rows: Sequence[Row]) -> bool:
    """Say whether every one of *rows* fits the columns of sql/stage.sql."""
    ids, _, tokens, units, _, _, _, _, rares = zip(*rows, strict=True)
    return (
        max(map(len, ids)) <= STAGE_NAME
        and all(min(column) > -_BIGINT and max(column) < _BIGINT for column in (tokens, units))
        and not (any(rares) and any(map(_rest, rows)))
    )


@cache
def _stage_row(*, turned: bool, named: bool, resolved: bool) -> Struct:
    """Return what packs a row behind its thread_id: lengths and values, a length of -1 alone for NULL."""
    last, agents = "iq" if turned else "i", "ii" if named else "i"
    return Struct(f">i?iq{last}iq{agents}iqiq{'iiiq' if resolved else 'ii'}")


@cache
def _ordinary_row(size: int) -> Callable[..., bytes]:
    """Return what packs a whole row of a thread_id of so many bytes with a turn, an agent and no resolution.

    As few values as can be, for each of them costs: what stands between two columns is one string of bytes with what is
    known of them, and the two lengths at the end are one integer.
    """
    return Struct(f">6s{size}s9sqiqiq12sqiqq").pack


class StageRows:
    """Deltas as rows of sql/stage.sql in COPY's binary format; the distinct names are complete once all are made."""

    def __init__(self) -> None:
        self._agents, self._resolutions = Numbering(_names), Numbering(_name)
        self._agent_columns: dict[object, bytes] = {}

    def block(self, rows: Sequence[Row]) -> bytes:
        """Return *rows*, one behind the other."""
        columns, made = self._agent_columns, list[bytes]()
        add = made.append
        for row in rows:
            thread_id, turns, tokens, units, first, last, agents, ensures, rare = row
            name = thread_id.encode()
            size = len(name)
            if last is None or agents is None or rare is not None or type(agents) is dict:
                add(b"".join((_heads(size), name, self._unusual(row))))
                continue
            agent = columns.get(agents) or self._agent_column(agents)
            flag = _FLAGS[ensures > 0]
            add(_ordinary_row(size)(_heads(size), name, flag, first, 8, last, 8, turns, agent, tokens, 8, units, -1))
        return b"".join(made)

    def _agent_column(self, agents: object) -> bytes:
        """Return the agents' number, with its length and that of the column behind it."""
        made = self._agent_columns[agents] = Struct(">iii").pack(4, self._agents.new(agents), 8)
        return made

    def _unusual(self, row: Row) -> bytes:
        _, turns, tokens, units, first, last, agents, ensures, rare = row
        resolution, at = (None, None) if rare is None else rare[1:3]
        return _stage_row(turned=last is not None, named=agents is not None, resolved=at is not None).pack(
            *(1, ensures > 0, 8, first),
            *((-1,) if last is None else (8, last)),
            *(8, turns),
            *((-1,) if agents is None else (4, self._agents.new(agents))),
            *(8, tokens, 8, units),
            *((-1, -1) if at is None else (4, self._resolutions.new(resolution), 8, at)),
        )

    def parameters(self) -> dict[str, str]:
        """Return the remaining parameters of sql/merge.sql."""
        return {"agent_lists": self._agents.array(), "resolutions": self._resolutions.array()}


@cache
def _heads(size: int) -> bytes:
    """Return what stands before a thread_id: how many columns follow, and its length."""
    return Struct(">hi").pack(10, size)


# The column `ensured` with its length and that of the column behind it.
_FLAGS: Final = tuple(Struct(">i?i").pack(1, flag, 8) for flag in (False, True))
